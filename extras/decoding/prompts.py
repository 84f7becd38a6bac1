"""A file of prompts, or one prompt answered several times: answers in the order of the prompts, as lines of JSON.

In:  a model that answers (assembly/inference.py), options of sample.py. Out: lines of JSON, shares of exact matches.
Knows nothing of how a model is opened.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from core.config import Range, Section
from core.errors import UserError
from core.files import read_jsonl, write_text
from extras.decoding.beams import beam_search
from tokenizer import TokenizerError


@dataclass(frozen=True)
class ManyConfig(Section):
    prompts: str = ""  # a file of prompts, .jsonl or one a line
    output: str = ""  # where the answers go as JSONL; "": printed
    n: Annotated[int, Range(least=1, most=1024)] = 1  # texts for each prompt, drawn with seed, seed + 1 ...
    # Beam search of this width instead of drawing: the n likeliest texts.
    beams: Annotated[int, Range(least=0, most=1024)] = 0
    # Beams: scores are divided by the length to this power; above 0 longer texts gain.
    length_penalty: Annotated[float, Range(least=-100, most=100)] = 1.0
    # With each token its log-probability, and those of so many likeliest ones.
    logprobs: Annotated[int, Range(least=0, most=100)] = 0
    batch: Annotated[int, Range(least=1)] = 16  # texts that are continued at once

    @property
    def wanted(self) -> bool:
        """Whether lines of JSON are asked for, not one text on the terminal."""
        return bool(self.prompts or self.output or self.n > 1 or self.beams or self.logprobs)

    def __post_init__(self):
        super().__post_init__()
        if self.beams and self.n > self.beams:
            raise ValueError(f"n = {self.n}, beams = {self.beams}: must be n at most beams")
        if self.logprobs and self.beams:
            raise ValueError(f"logprobs = {self.logprobs} does not go with beams")


def answer_all(generator, cfg, shelf) -> None:
    """All prompts of a file, or the one that is given; answers in the order of the prompts, as lines of JSON."""
    if cfg.many.beams and generator.compile:
        raise UserError("beams do not go with compile")
    asked, sampling = cfg.many, cfg.sampling
    items = list(read_prompts(asked.prompts)) if asked.prompts else [("prompt", cfg.sample.prompt, None, "")]
    if not items:
        raise UserError(f"{asked.prompts}: no prompts in it")
    ids, passages, left_out = [], [], 0
    for where, prompt, _, _ in items:
        try:
            if shelf:
                prompt, found, more = shelf.put(prompt)
                passages.append(found)
                left_out += more
            ids.append(generator.encode(prompt))
        except (UserError, TokenizerError) as e:
            raise UserError(f"{where}: {e}") from None
    long = [k for k in range(len(ids)) if len(ids[k]) > generator.context and sampling.truncate == "none"]
    if long:
        raise UserError(
            f"{items[long[0]][0]}: {len(ids[long[0]])} tokens, the model has {generator.context} positions",
            f"as in {len(long)} of {len(ids)} prompts; --truncate left",
        )
    if left_out:
        print(f"note: {left_out} of the passages that were found had no room in their prompts", file=sys.stderr)
    if note := generator.describe_room(ids, sampling):
        print(f"note: {note}", file=sys.stderr)
    lines, right = [], defaultdict(list)
    for n, texts in enumerate(answers(generator, ids, cfg)):
        _, prompt, reference, kind = items[n]
        for text in texts:
            line = {"prompt": prompt} | ({"passages": passages[n]} if shelf else {}) | text
            if reference is not None:
                right[kind].append(text["answer"] == reference)
                line |= {"reference": reference, "exact_match": text["answer"] == reference}
            lines.append(json.dumps(line, ensure_ascii=False))
    if asked.output:
        Path(asked.output).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(asked.output), "\n".join(lines) + "\n")
    else:
        print("\n".join(lines))
    everything = [r for results in right.values() for r in results]
    for kind, results in [*(sorted(right.items()) if len(right) > 1 else []), ("all", everything)]:
        if results:
            print(f"exact match {kind:10} {sum(results) / len(results):6.1%}  ({sum(results)} of {len(results)})")


def answers(generator, prompts: list[list[int]], cfg) -> Iterator[list[dict]]:
    """For each prompt its texts: {"answer": ..., "end": ...}, with what else was asked for."""
    asked, sampling, stop = cfg.many, cfg.sampling, cfg.sample.stop
    if asked.beams:
        for ids in prompts:
            best = beam_search(generator.model, ids, sampling, generator.stop_ids, asked.beams, asked.length_penalty)
            yield [{"answer": generator.decode(ids, new, stop), "score": score} for new, score in best[: asked.n]]
        return
    for ids, texts in zip(prompts, generator.continue_all(prompts, sampling, asked.batch, asked.n, asked.logprobs)):
        lines = [{"answer": generator.decode(ids, text.added, stop), "end": text.end} for text in texts]
        for line, text in zip(lines, texts):
            if asked.logprobs:
                line["logprobs"] = [
                    {"id": t.id, "token": generator.tokenizer.decode([t.id]), "logprob": t.logprob, "top": t.top}
                    for t in text.tokens
                ]
        yield lines


def read_prompts(path: str):
    """(where, prompt or messages, reference answer or None, kind) of each line."""
    if not path.endswith(".jsonl"):
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
        yield from ((f"{path}:{n}", line.rstrip("\r"), None, "") for n, line in enumerate(lines, 1) if line.strip())
        return
    for where, item in read_jsonl(path):
        prompt, reference = item.get("prompt", item.get("messages")), None
        last = prompt[-1] if isinstance(prompt, list) and prompt else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            prompt, reference = prompt[:-1], last.get("content")
        if not isinstance(prompt, (str, list)):
            raise UserError(f"{where}: needs a prompt (text) or messages (a list)", f"keys here: {', '.join(item)}")
        yield where, prompt, reference, str(item.get("kind", ""))
