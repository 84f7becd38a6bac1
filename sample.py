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

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tokenizer
from assembly.inference import Speaker, SpeakerConfig
from core import config, errors, files
from core.errors import UserError
from core.generate import SamplingConfig, beam_search, continued, fitting, generate
from extras.retrieval import bm25 as retrieval


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = ""  # "" without the other ways to ask: the model begins by itself
    prompts: str = ""  # a file of prompts, .jsonl or one a line
    output: str = ""  # where the answers go as JSONL; "": printed
    chat: bool = False  # talk turn by turn
    stop: tuple[str, ...] = ()  # strings that end a text, without them
    n: int = 1  # texts for each prompt, drawn with seed, seed + 1 ...
    beams: int = 0  # beam search of this width instead of drawing: the n likeliest texts
    length_penalty: float = 1.0  # beams: scores are divided by the length to this power; above 0 longer texts gain
    logprobs: int = 0  # with each token its log-probability, and those of so many likeliest ones
    batch: int = 16  # texts that are continued at once

    def __post_init__(self):
        if "" in self.stop:
            raise ValueError("stop must not be empty")
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}, must be at least 1")
        if not 1 <= self.n <= 1024 or (self.beams and not self.n <= self.beams <= 1024):
            raise ValueError(f"n = {self.n}, beams = {self.beams}: must be from 1 to 1024, and n at most beams")
        if not -100 <= self.length_penalty <= 100:
            raise ValueError(f"length_penalty = {self.length_penalty}, must be from -100 to 100")
        if not 0 <= self.logprobs <= 100 or (self.logprobs and self.beams):
            raise ValueError(f"logprobs = {self.logprobs}, must be from 0 to 100, and not with beams")
        if self.chat and (self.prompts or self.n > 1 or self.beams or self.logprobs):
            raise ValueError("chat goes neither with prompts nor with n, beams or logprobs")


def main() -> None:
    sections = {
        "speaker": SpeakerConfig,
        "sample": SampleConfig,
        "sampling": SamplingConfig,
        "retrieval": retrieval.RetrievalConfig,
    }
    cfg = config.load(__doc__, sections, sys.argv[1:])
    asked = cfg.sample
    if asked.beams and cfg.speaker.compile:
        raise UserError("beams do not go with compile")
    speaker = Speaker(cfg.speaker)
    shelf = open_shelf(speaker, cfg) if cfg.retrieval.retrieve else None
    if asked.chat:
        converse(speaker, cfg, shelf)
    elif asked.prompts or asked.n > 1 or asked.beams or asked.logprobs or asked.output:
        answer_all(speaker, cfg, shelf)
    else:
        stream(speaker, asked.prompt, cfg, shelf)


def open_shelf(speaker: Speaker, cfg) -> retrieval.Shelf:
    """The passages to answer from; an answer of up to a quarter of the context has room behind them."""
    if not speaker.chat_format:
        raise UserError("--retrieve needs a chat model", "python sft.py makes one")
    room = speaker.context - min(cfg.sampling.max_new_tokens, speaker.context // 4)
    shelf = retrieval.Shelf(cfg.retrieval, speaker.ids, room)
    print(f"note: {shelf.told}", file=sys.stderr)
    return shelf


def stream(speaker: Speaker, prompt: str | list[dict], cfg, shelf: retrieval.Shelf | None = None) -> str:
    """Print the continuation or answer as it comes, and return it."""
    if shelf:
        prompt, passages, left_out = shelf.put(prompt)
        told = " ".join(f"{n}. {passage}" for n, passage in enumerate(passages, 1)) or "none"
        told = "".join(c if c.isprintable() else "?" for c in told)  # no control characters on the terminal
        print(f"passages: {told}" + (f" ({left_out} more had no room)" if left_out else ""), file=sys.stderr)
    ids, said = speaker.ids(prompt), ""
    decoder, until = speaker.decoder(ids), speaker.until(cfg.sample.stop)
    fitting(ids, speaker.model, cfg.sampling)  # an impossible prompt is refused before it is printed
    tell_room(speaker, [ids], cfg.sampling)
    if not speaker.chat_format:
        print(prompt, end="")

    def tell(piece: str) -> str:
        # Some formats put a space between the role's name and the answer.
        piece = piece.lstrip() if speaker.chat_format and not said else piece
        print(piece, end="", flush=True)
        return piece

    for step in generate(speaker.model, [ids], cfg.sampling, speaker.stop_ids, compiled=speaker.compile):
        for _, token in step:
            said += tell(until.push(decoder.push(token)))
        if until.stopped:
            break
    said += tell(until.push(decoder.flush()) + until.flush())
    print(flush=True)
    return speaker.trimmed(said)


def tell_room(speaker: Speaker, prompts: list[list[int]], sampling: SamplingConfig) -> None:
    """Say it where the context, not max_new_tokens, will end the text, and what of prompts is left out."""
    context, longest = speaker.context, max(map(len, prompts))
    if sampling.truncate == "left":
        cut = [len(ids) - len(kept) for ids in prompts if len(kept := fitting(ids, speaker.model, sampling)) < len(ids)]
        if cut:
            print(
                f"note: {len(cut)} of {len(prompts)} prompts without their first tokens, {sum(cut):,} altogether",
                file=sys.stderr,
            )
    elif longest < context < longest + sampling.max_new_tokens:
        print(f"note: the context of {context} tokens leaves room for {context - longest} new ones", file=sys.stderr)


def converse(speaker: Speaker, cfg, shelf: retrieval.Shelf | None) -> None:
    """Turn by turn on the terminal, the whole conversation in front of each answer; passages before the newest only."""
    if not speaker.chat_format:
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
            reply = stream(speaker, messages, cfg, shelf)
        except UserError as e:
            print(f"{e}; the conversation starts anew", file=sys.stderr)
            messages = []
            continue
        # An empty answer would not be a valid turn.
        messages.append({"role": "assistant", "content": reply}) if reply else messages.pop()


def answer_all(speaker: Speaker, cfg, shelf: retrieval.Shelf | None) -> None:
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
            ids.append(speaker.ids(prompt))
        except (UserError, tokenizer.TokenizerError) as e:
            raise UserError(f"{where}: {e}") from None
    long = [k for k in range(len(ids)) if len(ids[k]) > speaker.context and sampling.truncate == "none"]
    if long:
        raise UserError(
            f"{items[long[0]][0]}: {len(ids[long[0]])} tokens, the model has {speaker.context} positions",
            f"as in {len(long)} of {len(ids)} prompts; --truncate left",
        )
    if left_out:
        print(f"note: {left_out} of the passages that were found had no room in their prompts", file=sys.stderr)
    tell_room(speaker, ids, sampling)
    lines, right = [], defaultdict(list)
    for n, texts in enumerate(answers(speaker, ids, asked, sampling)):
        _, prompt, reference, kind = items[n]
        for text in texts:
            line = {"prompt": prompt} | ({"passages": passages[n]} if shelf else {}) | text
            if reference is not None:
                right[kind].append(text["answer"] == reference)
                line |= {"reference": reference, "exact_match": text["answer"] == reference}
            lines.append(json.dumps(line, ensure_ascii=False))
    if asked.output:
        Path(asked.output).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(Path(asked.output), "\n".join(lines) + "\n")
    else:
        print("\n".join(lines))
    everything = [r for results in right.values() for r in results]
    for kind, results in [*(sorted(right.items()) if len(right) > 1 else []), ("all", everything)]:
        if results:
            print(f"exact match {kind:10} {sum(results) / len(results):6.1%}  ({sum(results)} of {len(results)})")


def answers(speaker: Speaker, prompts: list[list[int]], asked: SampleConfig, sampling: SamplingConfig):
    """For each prompt its texts: {"answer": ..., "end": ...}, with what else was asked for."""
    if asked.beams:
        for ids in prompts:
            best = beam_search(speaker.model, ids, sampling, speaker.stop_ids, asked.beams, asked.length_penalty)
            yield [{"answer": speaker.told(ids, new, asked.stop), "score": score} for new, score in best[: asked.n]]
        return
    groups = continued(
        speaker.model,
        prompts,
        sampling,
        speaker.stop_ids,
        rows=asked.batch,
        n=asked.n,
        logprobs=asked.logprobs,
        compiled=speaker.compile,
    )
    for ids, texts in zip(prompts, groups):
        told = [{"answer": speaker.told(ids, text.added, asked.stop), "end": text.end} for text in texts]
        for line, text in zip(told, texts):
            if asked.logprobs:
                line["logprobs"] = [
                    {"id": t.id, "token": speaker.text.decode([t.id]), "logprob": t.logprob, "top": t.top}
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
    for where, item in files.read_jsonl(path):
        prompt, reference = item.get("prompt", item.get("messages")), None
        last = prompt[-1] if isinstance(prompt, list) and prompt else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            prompt, reference = prompt[:-1], last.get("content")
        if not isinstance(prompt, (str, list)):
            raise UserError(f"{where}: needs a prompt (text) or messages (a list)", f"keys here: {', '.join(item)}")
        yield where, prompt, reference, str(item.get("kind", ""))


if __name__ == "__main__":
    errors.run(main)
