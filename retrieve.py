"""Chats and passages in, the same chats with passages before their last question out: to teach a model to read them.

    python retrieve.py --input data/sft_train.jsonl --retrieve passages/ --output data/augmented.jsonl
    python sft.py --train data/augmented.jsonl --out_dir out/reader
    python sample.py --model out/reader --retrieve passages/ --prompt "刘表字什么？"

docs/retrieval.md says which passages, and what came of it.
"""

import sys

from core import config, errors
from extras.retrieval.augment import AugmentConfig, write_chats
from extras.retrieval.bm25 import RetrievalConfig


def main() -> None:
    cfg = config.load(__doc__, {"augment": AugmentConfig, "retrieval": RetrievalConfig}, sys.argv[1:])
    write_chats(cfg.augment, cfg.retrieval)


if __name__ == "__main__":
    errors.run(main)
