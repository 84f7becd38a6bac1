"""Model and prompt in, text out: a base model continues, a chat model answers.

    python sample.py --prompt "曹操字什么？"
    python sample.py --model out/pretrain --prompt "话说天下大势，" --temperature 0
    python sample.py --adapter out/lora --prompt "曹操字什么？"       # its base, and LoRA's weights
    python sample.py --chat                                         # a conversation, empty line or Ctrl-D ends it
    python sample.py --prompts questions.txt                        # one prompt a line
    python sample.py --prompts data/sft_val.jsonl --output out/answers.jsonl --temperature 0

A JSONL prompt file has a line {"prompt": "..."} or {"messages": [...]} each; the answers come in the same order.
Where the messages end with an assistant's turn, that turn is the reference: it is held back, and the share of exact
matches is printed, by the line's "kind" where it has one.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

import tokenizer
from core import checkpoint, config, data, errors, files
from core.distributed import start
from core.errors import UserError
from core.generate import SamplingConfig, complete, generate
from extras import families, lora
from tokenizer import chat


@dataclass(frozen=True)
class SampleConfig:
    model: str = ""  # a model folder; "": out/sft if it is there, else out/pretrain
    adapter: str = ""  # a folder that sft.py with LoRA, or PEFT, has made; "" as model: its base
    allow_pickle: bool = False  # its weights may be a .bin, .pt or .pth: only tensors are read from it
    prompt: str = ""  # "" without the other ways to ask: the model begins by itself
    prompts: str = ""  # a file of prompts, .jsonl or one a line
    output: str = ""  # where the answers go as JSONL; "": printed
    chat: bool = False  # talk turn by turn
    chat_format: str = "auto"  # auto: the model's own; none: continue even with a chat model
    stop: tuple[str, ...] = ()  # strings that end a text, without them
    batch: int = 16  # prompts of a file that are continued at once
    device: str = "auto"
    dtype: str = "fp32"  # fp32, bf16, fp16: of the weights

    def __post_init__(self):
        if "" in self.stop:
            raise ValueError("stop must not be empty")
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}, must be at least 1")
        if self.dtype not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"dtype = {self.dtype!r}, must be one of fp32, bf16, fp16")
        if self.chat_format not in ("auto", "none", *chat.FORMATS):
            raise ValueError(f"chat_format = {self.chat_format!r}, must be auto, none or {', '.join(chat.FORMATS)}")


class Speaker:
    """A model with its tokenizer and the way it is spoken to."""

    def __init__(self, cfg: SampleConfig, sampling: SamplingConfig):
        families.register()
        asked = cfg.model or (lora.base_of(cfg.adapter) if cfg.adapter else newest_model())
        folder = checkpoint.model_folder(asked)
        self.text, self.sampling, self.stop = tokenizer.load(folder), sampling, cfg.stop
        model, fill = checkpoint.open_model(folder, cfg.allow_pickle)
        own = checkpoint.load_about(folder).get("chat_format")
        if cfg.adapter:
            model, fill, adapter = lora.attach(model, fill, cfg.adapter, folder)
            own = checkpoint.load_about(adapter).get("chat_format", own)
        self.chat_format = {"auto": own, "none": None}.get(cfg.chat_format, cfg.chat_format)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.dtype]
        self.model = checkpoint.build(model, fill, start(cfg.device).device, dtype).eval()
        checkpoint.check_tokenizer(folder, self.model, self.text)
        self.stop_ids = chat.end_ids(self.text, self.chat_format) if self.chat_format else {self.text.eos_id}

    def ids(self, prompt: str | list[dict]) -> list[int]:
        """Token ids of a text to continue, or of the messages to answer."""
        if isinstance(prompt, str) and not self.chat_format:
            return self.text.encode(prompt, bos=True)
        if not self.chat_format:
            raise UserError("a base model continues text, it has no answers", "python sft.py makes a chat model")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(chat.render(messages, self.text, self.chat_format, generation=True)[0])

    def stream(self, prompt: str | list[dict]) -> str:
        """Print the continuation or answer as it comes, and return it."""
        ids, said = self.ids(prompt), ""
        decoder, until = self.decoder(ids), tokenizer.UntilStop(self.stop)
        tell_room(self, [ids])

        def tell(piece: str) -> str:
            # Some formats put a space between the role's name and the answer.
            piece = piece.lstrip() if self.chat_format and not said else piece
            print(piece, end="", flush=True)
            return piece

        for step in generate(self.model, [ids], self.sampling, self.stop_ids):
            for _, token in step:
                said += tell(until.push(decoder.push(token)))
            if until.stopped:
                break
        said += tell(until.push(decoder.flush()) + until.flush())
        print(flush=True)
        return self.trimmed(said)

    def decoder(self, prompt_ids: list[int]):
        """Where generated ids become text: after a base model's prompt their first space is text, in an answer not."""
        decoder = self.text.stream()
        for token in [] if self.chat_format else prompt_ids:
            decoder.push(token)
        return decoder

    def told(self, prompt_ids: list[int], new_ids: list[int]) -> str:
        """Text of generated ids."""
        decoder, until = self.decoder(prompt_ids), tokenizer.UntilStop(self.stop)
        return self.trimmed(until.push("".join(map(decoder.push, new_ids)) + decoder.flush()) + until.flush())

    def trimmed(self, text: str) -> str:
        """An answer without the spaces that some formats put around it; a continuation as it is."""
        return text.strip() if self.chat_format else text


def main() -> None:
    sections = {"sample": SampleConfig, "sampling": SamplingConfig}
    cfg = config.load(__doc__, sections, sys.argv[1:])
    speaker = Speaker(cfg.sample, cfg.sampling)
    if cfg.sample.chat:
        converse(speaker)
    elif cfg.sample.prompts:
        answer_file(speaker, cfg.sample)
    else:
        if not speaker.chat_format:
            print(cfg.sample.prompt, end="")
        speaker.stream(cfg.sample.prompt)


def newest_model() -> str:
    """out/sft where it holds a model, else out/pretrain."""
    return "out/sft" if Path("out/sft/config.json").exists() else "out/pretrain"


def tell_room(speaker: Speaker, prompts: list[list[int]]) -> None:
    """Say it where the context, not max_new_tokens, will end the text."""
    context, longest = speaker.model.config.max_position_embeddings, max(map(len, prompts))
    if longest < context < longest + speaker.sampling.max_new_tokens:
        print(f"note: the context of {context} tokens leaves room for {context - longest} new ones", file=sys.stderr)


def converse(speaker: Speaker) -> None:
    """Turn by turn on the terminal, the whole conversation in front of each answer."""
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
            reply = speaker.stream(messages)
        except UserError as e:
            print(f"{e}; the conversation starts anew", file=sys.stderr)
            messages = []
            continue
        # An empty answer would not be a valid turn.
        messages.append({"role": "assistant", "content": reply}) if reply else messages.pop()


def answer_file(speaker: Speaker, cfg: SampleConfig) -> None:
    """All prompts of a file, a batch at a time; answers in the order of the prompts."""
    items = list(read_prompts(cfg.prompts))
    if not items:
        raise UserError(f"{cfg.prompts}: no prompts in it")
    ids = []
    for where, prompt, _, _ in items:
        try:
            ids.append(speaker.ids(prompt))
        except (UserError, tokenizer.TokenizerError) as e:
            raise UserError(f"{where}: {e}") from None
    context = speaker.model.config.max_position_embeddings
    if long := [k for k in range(len(ids)) if len(ids[k]) > context]:
        raise UserError(f"{items[long[0]][0]}: {len(ids[long[0]])} tokens, the model has {context} positions",
                        f"as in {len(long)} of {len(ids)} prompts")  # fmt: skip
    tell_room(speaker, ids)
    lines, right = [], defaultdict(list)
    # Prompts of one length share a batch without padding; the answers are put back into the file's order.
    order = sorted(range(len(items)), key=lambda k: len(ids[k]))
    answers = [""] * len(items)
    for first in range(0, len(order), cfg.batch):
        part = order[first : first + cfg.batch]
        for k, new in zip(part, complete(speaker.model, [ids[k] for k in part], speaker.sampling, speaker.stop_ids)):
            answers[k] = speaker.told(ids[k], new)
    for (_, prompt, reference, kind), text in zip(items, answers):
        line = {"prompt": prompt, "answer": text}
        if reference is not None:
            right[kind].append(text == reference)
            line |= {"reference": reference, "exact_match": text == reference}
        lines.append(json.dumps(line, ensure_ascii=False))
    if cfg.output:
        Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(Path(cfg.output), "\n".join(lines) + "\n")
    else:
        print("\n".join(lines))
    everything = [r for results in right.values() for r in results]
    for kind, results in [*(sorted(right.items()) if len(right) > 1 else []), ("all", everything)]:
        if results:
            print(f"exact match {kind:10} {sum(results) / len(results):6.1%}  ({sum(results)} of {len(results)})")


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
    for where, item in data.read_jsonl(path):
        prompt, reference = item.get("prompt", item.get("messages")), None
        last = prompt[-1] if isinstance(prompt, list) and prompt else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            prompt, reference = prompt[:-1], last.get("content")
        if not isinstance(prompt, (str, list)):
            raise UserError(f"{where}: needs a prompt (text) or messages (a list)", f"keys here: {', '.join(item)}")
        yield where, prompt, reference, str(item.get("kind", ""))


if __name__ == "__main__":
    errors.run(main)
