"""Model and prompt in, text out: a base model continues, a chat model answers.

    python sample.py --prompt "曹操字什么？"
    python sample.py --model out/pretrain --prompt "话说天下大势，" --temperature 0
    python sample.py --adapter out/lora --prompt "曹操字什么？"       # its base, and LoRA's weights
    python sample.py --chat                                         # a conversation, empty line or Ctrl-D ends it
    python sample.py --prompts questions.txt                        # one prompt a line
    python sample.py --prompts data/sft_val.jsonl --output out/answers.jsonl --temperature 0
    python sample.py --retrieve notes/ --prompt "刘表字什么？"        # passages that bear on it go before the question

A JSONL prompt file has a line {"prompt": "..."} or {"messages": [...]} each; the answers come in the same order.
Where the messages end with an assistant's turn, that turn is the reference: it is held back, and the share of exact
matches is printed, by the line's "kind" where it has one. With --n, --beams or --logprobs a single prompt is answered
in such lines, too. With --retrieve each line has its "passages"; the prompt in it is what was asked.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from assembly.inference import Generator, InferenceConfig, open_generator
from core import config, errors
from core.config import Range, Section
from core.errors import UserError
from core.generate import SamplingConfig, fit_prompt, generate


@dataclass(frozen=True)
class SampleConfig(Section):
    prompt: str = ""  # "" without the other ways to ask: the model begins by itself
    prompts: str = ""  # a file of prompts, .jsonl or one a line
    output: str = ""  # where the answers go as JSONL; "": printed
    chat: bool = False  # talk turn by turn
    stop: tuple[str, ...] = ()  # strings that end a text, without them
    n: Annotated[int, Range(least=1, most=1024)] = 1  # texts for each prompt, drawn with seed, seed + 1 ...
    # Beam search of this width instead of drawing: the n likeliest texts.
    beams: Annotated[int, Range(least=0, most=1024)] = 0
    # Beams: scores are divided by the length to this power; above 0 longer texts gain.
    length_penalty: Annotated[float, Range(least=-100, most=100)] = 1.0
    # With each token its log-probability, and those of so many likeliest ones.
    logprobs: Annotated[int, Range(least=0, most=100)] = 0
    batch: Annotated[int, Range(least=1)] = 16  # texts that are continued at once

    def __post_init__(self):
        super().__post_init__()
        if "" in self.stop:
            raise ValueError("stop must not be empty")
        if self.beams and self.n > self.beams:
            raise ValueError(f"n = {self.n}, beams = {self.beams}: n must be at most beams")
        if self.logprobs and self.beams:
            raise ValueError(f"logprobs = {self.logprobs} does not go with beams")
        if self.chat and (self.prompts or self.n > 1 or self.beams or self.logprobs):
            raise ValueError("chat goes neither with prompts nor with n, beams or logprobs")


SECTIONS = {
    "inference": InferenceConfig,
    "sample": SampleConfig,
    "sampling": SamplingConfig,
    "retrieval": "extras.retrieval.bm25:RetrievalConfig",
}


def main() -> None:
    cfg = config.load(__doc__, SECTIONS, sys.argv[1:])
    asked = cfg.sample
    if asked.beams and cfg.inference.compile:
        raise UserError("beams do not go with compile")
    generator = open_generator(cfg.inference)
    shelf = open_shelf(generator, cfg) if cfg.retrieval is not None and cfg.retrieval.retrieve else None
    # A conversation, many answers at once, or one text as it comes.
    if asked.chat:
        converse(generator, cfg, shelf)
    elif asked.prompts or asked.n > 1 or asked.beams or asked.logprobs or asked.output:
        from extras.decoding.prompts import answer_all

        answer_all(generator, cfg, shelf)
    else:
        stream(generator, asked.prompt, cfg, shelf)


def stream(generator: Generator, prompt: str | list[dict], cfg, shelf=None) -> str:
    """Print the continuation or answer as it comes, and return it."""
    if shelf:
        prompt, passages, left_out = shelf.put(prompt)
        told = " ".join(f"{n}. {passage}" for n, passage in enumerate(passages, 1)) or "none"
        told = "".join(c if c.isprintable() else "?" for c in told)  # no control characters on the terminal
        print(f"passages: {told}" + (f" ({left_out} more had no room)" if left_out else ""), file=sys.stderr)
    ids = generator.encode(prompt)
    fit_prompt(ids, generator.model, cfg.sampling)  # an impossible prompt is refused before it is printed
    if note := generator.describe_room([ids], cfg.sampling):
        print(f"note: {note}", file=sys.stderr)
    if not generator.chat_format:
        print(prompt, end="")
    said = ""
    for piece in write(generator, ids, cfg):
        # Some formats put a space between the role's name and the answer.
        piece = piece.lstrip() if generator.chat_format and not said else piece
        print(piece, end="", flush=True)
        said += piece
    print(flush=True)
    return generator.trim(said)


def write(generator: Generator, ids: list[int], cfg) -> Iterator[str]:
    """The text behind a prompt in pieces, each as soon as it is certain: never half a character."""

    def pieces() -> Iterator[str]:
        decoder = generator.decoder(ids)
        yield from (decoder.push(id) for id in write_ids(generator, ids, cfg.sampling))
        yield decoder.flush()

    if not cfg.sample.stop:
        return pieces()
    from extras.decoding.stop import cut_at_stop

    return cut_at_stop(pieces(), cfg.sample.stop)


def write_ids(generator: Generator, ids: list[int], sampling: SamplingConfig) -> Iterator[int]:
    """New ids, one by one."""
    if not generator.compile:
        return generate(generator.model, ids, sampling, generator.stop_ids)
    from extras.decoding.batching import generate_all

    steps = generate_all(generator.model, [ids], sampling, generator.stop_ids, compiled=True)
    return (id for step in steps for _, id in step)


def converse(generator: Generator, cfg, shelf) -> None:
    """Turn by turn on the terminal, the whole conversation in front of each answer; passages before the newest only."""
    if not generator.chat_format:
        raise UserError("--chat needs a chat model", "python sft.py makes one")
    messages: list[dict] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        try:
            reply = stream(generator, messages, cfg, shelf)
        except UserError as e:
            print(f"{e}; the conversation starts anew", file=sys.stderr)
            messages = []
            continue
        # An empty answer would not be a valid turn.
        messages.append({"role": "assistant", "content": reply}) if reply else messages.pop()


def open_shelf(generator: Generator, cfg):
    """The passages to answer from; an answer of up to a quarter of the context has room behind them."""
    from extras.retrieval.bm25 import Shelf

    if not generator.chat_format:
        raise UserError("--retrieve needs a chat model", "python sft.py makes one")
    room = generator.context - min(cfg.sampling.max_new_tokens, generator.context // 4)
    shelf = Shelf(cfg.retrieval, generator.encode, room)
    print(f"note: {shelf.told}", file=sys.stderr)
    return shelf


if __name__ == "__main__":
    errors.run(main)
