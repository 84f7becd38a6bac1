"""The options of all benchmarks.

In:  a command line. Out: BenchConfig, and the sizes of the model that it names.
"""

import tomllib
from dataclasses import dataclass
from typing import Annotated, Literal

from bench import decoders, peers
from core.config import Range, Section
from model import ModelConfig


@dataclass(frozen=True)
class BenchConfig(Section):
    tokenizer: str = "data/tokenizer"
    input: str = ""  # a UTF-8 text, a document a line
    model: str = ""  # a config with a [model] section, for all that trains
    rounds: Annotated[int, Range(least=1)] = 5
    documents: Annotated[int, Range(least=1000)] = 100_000  # of dedup
    peers: tuple[str, ...] = ("ours", "transformers", "trainer", "litgpt", "classic")  # of train
    dtype: Literal["fp32", "bf16"] = "fp32"  # of train and finetune
    compile: bool = False
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    # of decode: ours (-bf16, -int8, -int4; -compiled; -batch16), transformers (-bf16), llama.cpp-f32 (-bf16, -q8_0 ...)
    contestants: tuple[str, ...] = ("ours", "ours-compiled", "ours-bf16", "ours-batch16", "transformers")
    prompt_tokens: int = 32
    new_tokens: int = 128
    threads: int = 2  # of decode
    rows: int = 4
    seq_len: int = 512
    micro_batches: int = 1
    alike: bool = True  # the same settings of threads and allocator for all; false: each as it comes

    def __post_init__(self):
        super().__post_init__()
        if not (self.input or self.model):
            raise ValueError("input or model must be given")
        if unknown := set(self.peers) - set(peers.PEERS):
            raise ValueError(f"peers: {', '.join(sorted(unknown))} is none of {', '.join(peers.PEERS)}")
        if unknown := {name.split("-")[0] for name in self.contestants} - set(decoders.PEERS):
            raise ValueError(f"contestants: {', '.join(sorted(unknown))} is none of {', '.join(decoders.PEERS)}")


def read_sizes(path: str) -> ModelConfig:
    """The [model] section, with the demo's vocabulary where it leaves it to the tokenizer."""
    with open(path, "rb") as f:
        sizes = tomllib.load(f)["model"]
    return ModelConfig(**(sizes | {"vocab_size": sizes.get("vocab_size") or 4096}))
