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
    except UserError as e:
        code = _fail(str(e), e.exit_code, debug)
    except TokenizerError as e:
        code = _fail(str(e), 2, debug)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130, debug)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (RuntimeError, MemoryError) as e:
        # torch's classes for a GPU and the processor; torch is not imported here, and for the latter has no class.
        gpu, cpu = type(e).__name__ == "OutOfMemoryError", isinstance(e, MemoryError) or "allocate memory" in str(e)
        if not (gpu or cpu):
            raise
        code = _fail(
            f"out of {'GPU ' * gpu}memory -- when training a smaller --micro_batch or "
            "--gradient_checkpointing full; --max_memory_gb tells before the start",
            2,
            debug,
        )
    except OSError as e:
        name = f"{e.filename}: " if e.filename else ""
        if e.errno in STORAGE_ERRNOS:
            code = _fail(f"{name}{e.strerror}", 4, debug)
        elif e.filename:
            code = _fail(f"{name}{e.strerror}", 2, debug)
        else:
            raise
    sys.exit(code)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    prefix = "stopped" if code in (75, 130) else "error"
    print(f"{prefix}: {message}", file=sys.stderr, flush=True)
    return code
