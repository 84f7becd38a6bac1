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

from assembly.inference import Generator, InferenceConfig, open_generator
from core import config, errors
from core.config import Section
from core.errors import UserError
from core.generate import SamplingConfig, fit_prompt, generate


@dataclass(frozen=True)
class SampleConfig(Section):
    prompt: str = ""  # "" without the other ways to ask: the model begins by itself
    chat: bool = False  # talk turn by turn
    stop: tuple[str, ...] = ()  # strings that end a text, without them

    def __post_init__(self):
        if "" in self.stop:
            raise ValueError("stop must not be empty")


SECTIONS = {
    "inference": InferenceConfig,
    "sample": SampleConfig,
    "sampling": SamplingConfig,
    "many": "extras.decoding.prompts:ManyConfig",
    "retrieval": "extras.retrieval.bm25:RetrievalConfig",
}


def main() -> None:
    cfg = config.load(__doc__, SECTIONS, sys.argv[1:])
    many = cfg.many is not None and cfg.many.wanted
    if cfg.sample.chat and many:
        raise UserError("chat goes neither with prompts nor with n, beams, logprobs or output")
    generator = open_generator(cfg.inference)
    shelf = open_shelf(generator, cfg) if cfg.retrieval is not None and cfg.retrieval.retrieve else None
    # Many answers at once, a conversation, or one text as it comes.
    if many:
        from extras.decoding.prompts import answer_all

        answer_all(generator, cfg, shelf)
    elif cfg.sample.chat:
        from extras.decoding.conversation import converse

        converse(generator, lambda messages: stream(generator, messages, cfg, shelf))
    else:
        stream(generator, cfg.sample.prompt, cfg, shelf)


def stream(generator: Generator, prompt: str | list[dict], cfg, shelf=None) -> str:
    """Print the continuation or answer as it comes, and return it."""
    if shelf:
        prompt, told = shelf.put_and_tell(prompt)
        print(told, file=sys.stderr)
    # What will not work is said before anything is printed.
    ids = generator.encode(prompt)
    fit_prompt(ids, generator.model, cfg.sampling)
    if note := generator.describe_room([ids], cfg.sampling):
        print(f"note: {note}", file=sys.stderr)
    # A continuation reads on from its prompt, an answer stands alone.
    if not generator.chat_format:
        print(prompt, end="")
    # Piece by piece, so that a reader need not wait for the whole text.
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

    # A character may be spread over several ids: the decoder gives it out when it is whole.
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
    # A compiled step pays where steps are many, and is another wing's.
    if not generator.compile:
        return generate(generator.model, ids, sampling, generator.stop_ids)
    from extras.decoding.batching import generate_all

    steps = generate_all(generator.model, [ids], sampling, generator.stop_ids, compiled=True)
    return (id for step in steps for _, id in step)


def open_shelf(generator: Generator, cfg):
    """The passages to answer from."""
    from extras.retrieval.bm25 import open_shelf

    return open_shelf(generator, cfg.retrieval, cfg.sampling)


if __name__ == "__main__":
    errors.run(main)
