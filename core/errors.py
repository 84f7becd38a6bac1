"""One exception for what the user can mend, and the one place where a command ends.

In:  a command's `main()`. Out: an exit code, and for a mistake one line on stderr.
Knows nothing of tasks, files or tensors.

    exit code   meaning
    0           done
    1           our bug: the traceback is shown
    2           bad input: `error: PATH:LINE: what -- hint`
    3           training diverged (non-finite loss or gradient)
    4           storage failed (disk full, read-only, I/O error)
    69          another rank hangs or is gone (EX_UNAVAILABLE: run it again to go on)
    75          interrupted and saved (EX_TEMPFAIL of sysexits.h: run it again to go on)
    130         interrupted with nothing to save
"""

import errno
import os
import sys
import traceback

from tokenizer import TokenizerError

STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


class UserError(Exception):
    """What the user did wrong and how to mend it, in one line."""

    exit_code = 2

    def __init__(self, what: str, hint: str = ""):
        line = " ".join((f"{what} -- {hint}" if hint else what).split("\n"))
        # What stands in somebody's file must not move the cursor or end the line.
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class Diverged(UserError):
    """Loss or gradient is not a finite number; the weights were left as they were."""

    exit_code = 3


class StorageError(UserError):
    """The disk did not take what had to be written."""

    exit_code = 4


class RankLost(UserError):
    """Another rank did not answer in time, or ended."""

    exit_code = 69


class Interrupted(UserError):
    """Stopped by a signal after everything was saved."""

    exit_code = 75


def run(main) -> None:
    """Call `main()` and turn what it raises into an exit code. `--debug` on the command line shows tracebacks."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (Exception, KeyboardInterrupt) as e:
        code, message = _explain(e)
        if code == 1:
            raise
        if debug:
            traceback.print_exc()
        print(f"{'stopped' if code in (75, 130) else 'error'}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _explain(e: BaseException) -> tuple[int, str]:
    """Exit code, and a line on what the user can mend; code 1 where that is not known."""
    # What our own code has refused.
    if isinstance(e, UserError):
        return e.exit_code, str(e)
    if isinstance(e, TokenizerError):
        return 2, str(e)
    if isinstance(e, KeyboardInterrupt):
        return 130, "interrupted"
    # What the system has refused.
    if isinstance(e, OSError) and (e.filename or e.errno in STORAGE_ERRNOS):
        name = f"{e.filename}: " if e.filename else ""
        return 4 if e.errno in STORAGE_ERRNOS else 2, f"{name}{e.strerror}"
    # torch's classes for a GPU and the processor; torch is not imported here, and for the latter has no class.
    gpu, cpu = type(e).__name__ == "OutOfMemoryError", isinstance(e, MemoryError) or "allocate memory" in str(e)
    if isinstance(e, RuntimeError | MemoryError) and (gpu or cpu):
        hint = "when training a smaller --micro_batch or --gradient_checkpointing full"
        return 2, f"out of {'GPU ' * gpu}memory -- {hint}; --max_memory_gb tells before the start"
    return 1, ""
