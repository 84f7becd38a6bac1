"""Each wing in turn deleted from a copy of the house, and what is left run: a line of JSON for each command.

    python without_wings.py HOUSE LESSON '{"serve": ["serve.py"], ...}'

In:  the copy; a folder with the lesson's data; wing -> commands that are the wing's own. With the wing "*" all are gone.
Out: {"wing", "words", "code", "said"} of each command's --help, and of the lesson's three commands.

A command runs in a fork of this process, which has loaded torch and nothing of the house: 250 of them in a minute.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import safetensors.torch  # noqa: F401
import sentencepiece  # noqa: F401
import torch
import torch._dynamo  # what optimizers load when they are made, and then takes longer than two steps
import tqdm  # noqa: F401

SIZES = "--hidden_size 32 --intermediate_size 48 --num_attention_heads 2 --num_hidden_layers 2"
STEPS = "--max_steps 2 --batch_tokens 256 --micro_batch 2 --device cpu"
LESSON = (
    ["pretrain.py", *SIZES.split(), "--max_position_embeddings", "64", *STEPS.split()],
    ["sft.py", *STEPS.split()],
    ["sample.py", "--prompt", "话说", "--max_new_tokens", "4", "--device", "cpu"],
)
PATIENCE = 120  # seconds for one command


def run(house: Path, folder: Path, words: list[str]) -> tuple[int, str]:
    """Exit code and output of a command of the house, as if it were typed in the folder."""
    said = folder / "said.txt"
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, said.read_text(encoding="utf-8", errors="replace")
    # The child never returns: whatever happens, it ends here.
    code = 1
    try:
        signal.alarm(PATIENCE)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        sys.path[0], sys.argv = str(house), words
        runpy.run_path(str(house / words[0]), run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def delete(house: Path, aside: Path, wing: str, own: dict[str, list[str]]) -> list[tuple[Path, Path]]:
    """Move a wing and its commands out of the house; returns (where it was, where it is) of each."""
    gone = [f"extras/{wing}", *own[wing]] if wing != "*" else ["extras", *{c for many in own.values() for c in many}]
    moves = [(house / name, aside / name.replace("/", "-")) for name in gone]
    for here, there in moves:
        here.rename(there)
    return moves


def main() -> None:
    house, lesson, own = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    aside = house.with_name("aside")
    aside.mkdir()
    for number, wing in enumerate([*own, "*"]):
        moves = delete(house, aside, wing, own)
        folder = house.with_name(f"without-{number}")
        folder.mkdir()
        (folder / "data").symlink_to(lesson / "data")
        commands = sorted(p.name for p in house.glob("*.py") if p.name not in ("model.py", "trainer.py"))
        for words in [*([name, "--help"] for name in commands), *LESSON]:
            code, said = run(house, folder, words)
            print(json.dumps({"wing": wing, "words": words, "code": code, "said": said}), flush=True)
        for here, there in moves:
            there.rename(here)


if __name__ == "__main__":
    main()
