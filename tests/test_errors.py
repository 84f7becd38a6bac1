"""Promises of `core/errors.py`: every ending has its exit code and at most one line, no traceback unless asked for."""

import os
import subprocess
import sys

import pytest

from core.errors import Diverged, Interrupted, StorageError, UserError

START = "import errno, os, sys, time\nfrom core import config, errors, files\nfrom tokenizer import TokenizerError\n"


def run(root, body, *argv, **kw):
    """A tiny command whose main() has this body, in a process of its own."""
    script = START + "def main():\n    " + body.replace("\n", "\n    ") + "\nerrors.run(main)"
    return subprocess.run([sys.executable, "-c", script, *argv], cwd=root, capture_output=True, text=True, **kw)


@pytest.mark.parametrize(
    "body, code, line",
    [
        ("print('fine')", 0, ""),
        ("return 3", 3, ""),
        ("raise errors.UserError('a.txt:3: bad', 'mend it')", 2, "error: a.txt:3: bad -- mend it"),
        ("raise errors.UserError('two\\nlines', 'and\\nmore')", 2, "error: two lines -- and more"),
        ("raise TokenizerError('t.model: damaged')", 2, "error: t.model: damaged"),
        ("open('/no/such/file')", 2, "error: /no/such/file: No such file or directory"),
        ("raise errors.Diverged('step 7: loss nan')", 3, "error: step 7: loss nan"),
        ("raise errors.StorageError('out: full')", 4, "error: out: full"),
        ("raise OSError(errno.ENOSPC, 'No space left on device', 'out/x')", 4, "error: out/x: No space left on device"),
        ("raise OSError(errno.EROFS, 'Read-only file system')", 4, "error: Read-only file system"),
        ("raise errors.Interrupted('saved out/checkpoint-3')", 75, "stopped: saved out/checkpoint-3"),
        ("raise KeyboardInterrupt", 130, "stopped: interrupted"),
    ],
)
def test_each_ending_has_its_exit_code_and_one_line(root, body, code, line):
    done = run(root, body)
    assert (done.returncode, done.stderr) == (code, line + "\n" if line else "")


@pytest.mark.parametrize("body", ["[][0]", "raise OSError(22, 'Invalid argument')", "assert False, 'ours'"])
def test_our_own_bug_shows_its_traceback_and_exits_with_1(root, body):
    done = run(root, body)
    assert done.returncode == 1 and "Traceback" in done.stderr and 'File "<string>"' in done.stderr


def test_debug_shows_the_traceback_and_is_taken_off_the_command_line(root):
    done = run(root, "raise errors.UserError(f'saw {sys.argv[1:]}')", "--lr", "--debug", "1")
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.endswith("\nerror: saw ['--lr', '1']\n")


def test_a_full_disk_is_told_as_such(root):
    done = run(root, "with open('/dev/full', 'w') as f:\n    f.write('x')")
    assert done.returncode == 4 and done.stderr == "error: No space left on device\n"


# The pipe is closed before anything is printed: each print, or the flush at the end, meets a reader that is gone.
@pytest.mark.parametrize(
    "body", ["for i in range(20000): print(i)", "print('short')", "config.load('Help.', {}, ['--help'])"]
)
def test_a_reader_that_goes_away_is_not_an_error(root, body):
    script = START + f"def main():\n    sys.stdin.read()\n    {body}\nerrors.run(main)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=root,
        text=True,
        env=buffered,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)
    process.stderr.close()


def test_every_refusal_is_a_user_error_with_its_own_code():
    assert [c("x").exit_code for c in (UserError, Diverged, StorageError, Interrupted)] == [2, 3, 4, 75]
    assert all(issubclass(c, UserError) for c in (Diverged, StorageError, Interrupted))


LARGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))  # a limit on addresses stands in for a small machine
import small_run
from core import errors
from model import Llama, ModelConfig
errors.run(lambda: small_run.run(sys.argv[1], Llama(ModelConfig(vocab_size=1 << 20, hidden_size=1024))))
"""


@pytest.mark.heavy
def test_memory_that_is_not_there_is_one_line_with_what_needs_less(root, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path / "run"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"},
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: out of memory -- when training"), (
        done.stderr
    )
    assert "Traceback" not in done.stderr
