"""How fast is it, beside what others do? Rounds of all contestants in turn, so that a busy minute hits all of them.

    python -m bench tokenize --tokenizer chatglm2/tokenizer.model --input corpus.txt    # a document a line
    python -m bench dedup --input corpus.txt                                            # pip install datasketch rensa
    python -m bench memory --tokenizer chatglm2/tokenizer.model --input corpus.txt      # Linux; writes 4 GB to a folder
    python -m bench activations --model configs/llama-92m.toml                          # Linux; training's memory
    python -m bench finetune --model configs/llama-218m.toml --dtype bf16               # Linux; LoRA, QLoRA's memory
    python -m bench train --model configs/llama-92m.toml --dtype bf16                   # Linux; steps beside others'
    python -m bench loader --model configs/llama-92m.toml                               # Linux; from a 50 GB bin
    python -m bench decode --model configs/llama-92m.toml --tokenizer tokenizer.model   # new tokens beside others'
    python -m bench saving --model configs/llama-218m.toml                              # writes 2.6 GB three times

Prints a table of medians and, as its last line, the same as JSON.
"""

import sys

from bench import corpus_memory, decode, dedup, step_memory, storage, tokenize, train
from bench.options import BenchConfig
from core import config, errors
from core.errors import UserError

WAYS = {
    "tokenize": tokenize.tokenize,
    "dedup": dedup.deduplicate,
    "memory": corpus_memory.memory,
    "activations": step_memory.activations,
    "finetune": step_memory.finetune,
    "train": train.train,
    "loader": storage.loader,
    "saving": storage.saving,
    "decode": decode.decode,
}


def main() -> None:
    words = sys.argv[1:2]
    if not words or words[0] not in WAYS:
        raise UserError(f"{' '.join(words) or 'nothing'} cannot be timed", f"python -m bench {' or '.join(WAYS)}")
    WAYS[words[0]](config.load(__doc__, {"bench": BenchConfig}, sys.argv[2:]).bench)


if __name__ == "__main__":
    errors.run(main)
