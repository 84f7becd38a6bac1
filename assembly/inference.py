"""A model folder and a text or messages in, the model's words out: what every command that asks a model shares.

In:  a folder, or an adapter. Out: ids of prompts, and text of ids.
Knows nothing of terminals, files of prompts or servers. The one extra that uses others: it puts the model together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import tokenizer
from core import hf_folder
from core.distributed import start
from core.errors import UserError
from extras.families import others as families
from extras.finetune import lora
from extras.formats import quantize
from tokenizer import chat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SpeakerConfig:
    model: str = ""  # a model folder; "": out/sft if it is there, else out/pretrain
    adapter: str = ""  # a folder that sft.py with LoRA, or PEFT, has made; "" as model: its base
    allow_pickle: bool = False  # its weights may be a .bin, .pt or .pth: only tensors are read from it
    chat_format: str = "auto"  # auto: the model's own; none: continue even with a chat model
    device: str = "auto"
    dtype: str = "fp32"  # fp32, bf16, fp16: of the weights
    quantize: str = "none"  # int8, int4: linear layers in fewer bits, all else in bf16; 2 and 3 times as fast on a CPU
    compile: bool = False  # torch.compile: a minute at first, then faster where steps are many

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if self.quantize not in quantize.KINDS:
            raise ValueError(f"quantize = {self.quantize!r}, must be one of {', '.join(quantize.KINDS)}")
        if self.quantize != "none" and self.dtype == "fp16":
            raise ValueError(f"dtype = fp16 does not go with quantize = {self.quantize}: all else is bf16")
        if self.chat_format not in ("auto", "none", *chat.FORMATS):
            raise ValueError(f"chat_format = {self.chat_format!r}, must be auto, none or {', '.join(chat.FORMATS)}")


class Speaker:
    """A model with its tokenizer and the way it is spoken to.

    Attributes:
        model: in eval mode, on its device.
        text: its tokenizer.
        chat_format: name of a format, None for a base model.
        stop_ids: ids that end what it says.
    """

    def __init__(self, cfg: SpeakerConfig):
        families.register()
        asked = cfg.model or (lora.base_of(cfg.adapter) if cfg.adapter else newest_model())
        folder = hf_folder.model_folder(asked)
        self.name, self.text = Path(cfg.adapter or asked).name, tokenizer.load(folder)
        self.compile = cfg.compile
        own, device = hf_folder.load_about(folder).get("chat_format"), start(cfg.device).device
        if (kind := quantize.kind_of(folder)) != "none":
            if cfg.adapter or cfg.quantize not in ("none", kind):
                raise UserError(f"{folder}: its weights are {kind} already", "--model with the folder it was made of")
            self.model = quantize.load(folder, device)
        else:
            model, fill = hf_folder.open_model(folder, cfg.allow_pickle)
            if cfg.adapter:
                model, fill, adapter = lora.attach(model, fill, cfg.adapter, folder)
                own = hf_folder.load_about(adapter).get("chat_format", own)
            if cfg.quantize == "none":
                self.model = hf_folder.build(model, fill, device, DTYPES[cfg.dtype])
            elif cfg.adapter:
                self.model = quantize.quantize(lora.merge(hf_folder.build(model, fill, device)), cfg.quantize)
            else:
                self.model = quantize.build(model, fill, cfg.quantize, device)
        self.chat_format = {"auto": own, "none": None}.get(cfg.chat_format, cfg.chat_format)
        self.model = quantize.for_decoding(self.model).eval()
        hf_folder.check_tokenizer(folder, self.model, self.text)
        self.stop_ids = chat.end_ids(self.text, self.chat_format) if self.chat_format else {self.text.eos_id}

    @property
    def context(self) -> int:
        """Positions of the model."""
        return self.model.config.max_position_embeddings

    def ids(self, prompt: str | list[dict]) -> list[int]:
        """Token ids of a text to continue, or of the messages to answer."""
        if isinstance(prompt, str) and not self.chat_format:
            return self.text.encode(prompt, bos=True)
        if not self.chat_format:
            raise UserError("a base model continues text, it has no answers", "python sft.py makes a chat model")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(chat.render(messages, self.text, self.chat_format, generation=True)[0])

    def decoder(self, prompt_ids: list[int]):
        """Where generated ids become text: after a base model's prompt their first space is text, in an answer not."""
        decoder = self.text.stream()
        for token in [] if self.chat_format else prompt_ids:
            decoder.push(token)
        return decoder

    def until(self, stops: Sequence[str]):
        """Where pieces of text become what may be shown: all of it up to the first of the stop strings."""
        if not stops:
            return Unstopped()
        from extras.decoding.stop import UntilStop

        return UntilStop(stops)

    def told(self, prompt_ids: list[int], new_ids: list[int], stop: Sequence[str] = ()) -> str:
        """Text of generated ids, up to the first of the stop strings."""
        decoder, until = self.decoder(prompt_ids), self.until(stop)
        return self.trimmed(until.push("".join(map(decoder.push, new_ids)) + decoder.flush()) + until.flush())

    def trimmed(self, text: str) -> str:
        """An answer without the spaces that some formats put around it; a continuation as it is."""
        return text.strip() if self.chat_format else text


class Unstopped:
    """What `Speaker.until` gives where there are no stop strings: every piece of text passes."""

    stopped = False

    def push(self, piece: str) -> str:
        return piece

    def flush(self) -> str:
        return ""


def newest_model() -> str:
    """out/sft where it holds a model, else out/pretrain."""
    return "out/sft" if Path("out/sft/config.json").exists() else "out/pretrain"
