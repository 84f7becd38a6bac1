"""A file of prompts, or one prompt answered several times: answers in the order of the prompts, as lines of JSON.

In:  a model that answers (assembly/inference.py), options of sample.py. Out: lines of JSON, shares of exact matches.
Knows nothing of how a model is opened.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from core.errors import UserError
from core.files import read_jsonl, write_text
from core.generate import SamplingConfig
from extras.decoding.batching import continued
from extras.decoding.beams import beam_search
from tokenizer import TokenizerError


def answer_all(generator, cfg, shelf) -> None:
    """All prompts of a file, or the one that is given; answers in the order of the prompts, as lines of JSON."""
    asked, sampling = cfg.sample, cfg.sampling
    items = list(read_prompts(asked.prompts)) if asked.prompts else [("prompt", asked.prompt, None, "")]
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
    for n, texts in enumerate(answers(generator, ids, asked, sampling)):
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


def answers(generator, prompts: list[list[int]], asked, sampling: SamplingConfig):
    """For each prompt its texts: {"answer": ..., "end": ...}, with what else was asked for."""
    if asked.beams:
        for ids in prompts:
            best = beam_search(generator.model, ids, sampling, generator.stop_ids, asked.beams, asked.length_penalty)
            yield [{"answer": generator.decode(ids, new, asked.stop), "score": score} for new, score in best[: asked.n]]
        return
    groups = continued(
        generator.model,
        prompts,
        sampling,
        generator.stop_ids,
        rows=asked.batch,
        n=asked.n,
        logprobs=asked.logprobs,
        compiled=generator.compile,
    )
    for ids, texts in zip(prompts, groups):
        told = [{"answer": generator.decode(ids, text.added, asked.stop), "end": text.end} for text in texts]
        for line, text in zip(told, texts):
            if asked.logprobs:
                line["logprobs"] = [
                    {"id": t.id, "token": generator.tokenizer.decode([t.id]), "logprob": t.logprob, "top": t.top}
                    for t in text.tokens
                ]
        yield told


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
