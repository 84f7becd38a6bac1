"""A model folder and a text or messages in, the model's words out: what every command that asks a model shares.

In:  a folder, or an adapter. Out: ids of prompts, and text of ids.
Knows nothing of terminals, files of prompts or servers. A wing is imported only where an option or the folder asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from assembly.models import open_model, read_config
from core import files, hf_folder
from core.config import Section
from core.device import DTYPES
from core.distributed import start
from core.errors import UserError
from core.generate import SamplingConfig, fit_prompt, for_decoding
from model import Llama
from tokenizer import Tokenizer, chat
from tokenizer import load as load_tokenizer


@dataclass(frozen=True)
class InferenceConfig(Section):
    model: str = ""  # a model folder; "": out/sft if it is there, else out/pretrain
    adapter: str = ""  # a folder that sft.py with LoRA, or PEFT, has made; "" as model: its base
    allow_pickle: bool = False  # its weights may be a .bin, .pt or .pth: only tensors are read from it
    # auto: the model's own; none: continue even with a chat model.
    chat_format: Literal["auto", "none", *chat.FORMATS] = "auto"
    device: str = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the weights
    # Linear layers in fewer bits, all else in bf16; 2 and 3 times as fast on a CPU.
    quantize: Literal["none", "int8", "int4"] = "none"
    compile: bool = False  # torch.compile: a minute at first, then faster where steps are many

    def __post_init__(self):
        super().__post_init__()
        if self.quantize != "none" and self.dtype == "fp16":
            raise ValueError(f"dtype = fp16 does not go with quantize = {self.quantize}: all else is bf16")


class Generator:
    """A model that continues texts, with its tokenizer.

    Attributes:
        model: in eval mode, on its device.
        stop_ids: ids that end a text.
        chat_format: None; of a Chat the name of its format.
    """

    chat_format: str | None = None

    def __init__(self, model: Llama, tokenizer: Tokenizer, cfg: InferenceConfig, name: str):
        self.model, self.tokenizer, self.name, self.compile = model, tokenizer, name, cfg.compile
        self.stop_ids = {tokenizer.eos_id}

    @property
    def context(self) -> int:
        """Positions of the model."""
        return self.model.config.max_position_embeddings

    def encode(self, prompt: str | list[dict]) -> list[int]:
        """Token ids of a text to continue."""
        if not isinstance(prompt, str):
            raise UserError("a base model continues text, it has no answers", "python sft.py makes a chat model")
        return self.tokenizer.encode(prompt, bos=True)

    def decoder(self, prompt_ids: list[int]):
        """Where new ids become text: the first space behind a prompt is text."""
        # The decoder has to see the prompt: half a character at its end is completed by the first new id.
        decoder = self.tokenizer.stream()
        for token in prompt_ids:
            decoder.push(token)
        return decoder

    def decode(self, prompt_ids: list[int], new_ids: list[int], stop: Sequence[str] = ()) -> str:
        """Text of new ids, up to the first of the stop strings."""
        decoder = self.decoder(prompt_ids)
        text = "".join(map(decoder.push, new_ids)) + decoder.flush()
        # The stop string that is whole first ends the text.
        found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
        return self.trim(text[: min(found)[1]] if found else text)

    def trim(self, text: str) -> str:
        """A continuation as it is."""
        return text

    def continue_all(
        self, prompts: list[list[int]], sampling: SamplingConfig, rows: int, n: int = 1, logprobs: int = 0
    ):
        """The n texts of each prompt, `rows` of them at once; see extras/decoding/batching.py."""
        from extras.decoding.batching import continued

        options = {"rows": rows, "n": n, "logprobs": logprobs, "compiled": self.compile}
        return continued(self.model, prompts, sampling, self.stop_ids, **options)

    def new_batch(self, rows: int, length: int):
        """A batch without texts, `rows` at once of up to `length` positions; see extras/decoding/batching.py."""
        from extras.decoding.batching import Batch

        return Batch(self.model, rows, length, self.compile)

    def until(self, stop: Sequence[str]):
        """What cuts a text at the first of these strings; see extras/decoding/stop.py."""
        from extras.decoding.stop import UntilStop

        return UntilStop(stop)

    def describe_room(self, prompts: list[list[int]], sampling: SamplingConfig) -> str:
        """A note where the context, not max_new_tokens, will end texts, or on what of prompts is left out; else ""."""
        # Nothing is cut in silence.
        longest = max(map(len, prompts))
        if sampling.truncate == "left":
            kept = (len(fit_prompt(ids, self.model, sampling)) for ids in prompts)
            cut = [len(ids) - n for ids, n in zip(prompts, kept) if n < len(ids)]
            said = f"{len(cut)} of {len(prompts)} prompts without their first tokens, {sum(cut):,} altogether"
            return said if cut else ""
        if longest < self.context < longest + sampling.max_new_tokens:
            return f"the context of {self.context} tokens leaves room for {self.context - longest} new ones"
        return ""


class Chat(Generator):
    """A model that answers."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, cfg: InferenceConfig, name: str, chat_format: str):
        super().__init__(model, tokenizer, cfg, name)
        self.chat_format = chat_format
        self.stop_ids = chat.end_ids(tokenizer, chat_format)

    def encode(self, prompt: str | list[dict]) -> list[int]:
        """Token ids of the messages to answer, or of one question."""
        # The same function as in training writes the prompt, so that the model sees what it knows.
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(chat.render(messages, self.tokenizer, self.chat_format, generation=True)[0])

    def decoder(self, prompt_ids: list[int]):
        """Where new ids become text: an answer begins by itself."""
        return self.tokenizer.stream()

    def trim(self, text: str) -> str:
        """An answer without the spaces that some formats put around it."""
        return text.strip()


def open_generator(cfg: InferenceConfig) -> Generator:
    """The model that the options name: a Chat where it has a chat format, else a Generator."""
    adapter, asked = None, cfg.model
    if cfg.adapter:
        from extras.finetune import lora

        adapter = lora.find_adapter(cfg.adapter)
        asked = asked or lora.base_of(adapter)
    asked = asked or newest_model()
    folder = hf_folder.model_folder(asked)
    own = hf_folder.load_about(folder).get("chat_format")
    if adapter:
        own = hf_folder.load_about(adapter).get("chat_format", own)
    # The tokenizer is in the folder, too: ids of another one would be noise to the model.
    tokenizer, model = load_tokenizer(folder), for_decoding(load_weights(folder, adapter, cfg)).eval()
    hf_folder.check_tokenizer(folder, model, tokenizer)
    # A model answers in the format that it was trained on, unless the user knows better.
    chat_format = {"auto": own, "none": None}.get(cfg.chat_format, cfg.chat_format)
    name = Path(cfg.adapter or asked).name
    if not chat_format:
        return Generator(model, tokenizer, cfg, name)
    return Chat(model, tokenizer, cfg, name, chat_format)


def load_weights(folder: Path, adapter: Path | None, cfg: InferenceConfig) -> Llama:
    """The model of a folder, with its adapter, in as many bits as the options say."""
    device = start(cfg.device).device
    quantised = files.read_json(folder / "config.json", hint=f"is {folder} a model folder?").get("quantization_config")
    # The lesson's path: a plain folder, read as it is.
    if not (quantised or adapter or cfg.quantize != "none"):
        opened = open_model(folder, cfg.allow_pickle)
        return hf_folder.build(opened.model, opened.weights, device, DTYPES[cfg.dtype])
    if quantised:
        return load_quantised(folder, bool(adapter), cfg, device)
    opened = open_model(folder, cfg.allow_pickle)
    model, weights = attach(opened, adapter) if adapter else (opened.model, opened.weights)
    if cfg.quantize == "none":
        return hf_folder.build(model, weights, device, DTYPES[cfg.dtype])
    # Weights become fewer bits one after another, so that the whole model in fp32 is never in memory.
    from extras.formats import quantize

    if not adapter:
        return quantize.build(model, weights, cfg.quantize, device)
    # An adapter is added to the weights first: rounded weights could not take it up.
    from extras.finetune import lora

    return quantize.quantize(lora.merge(hf_folder.build(model, weights, device)), cfg.quantize)


def load_quantised(folder: Path, with_adapter: bool, cfg: InferenceConfig, device) -> Llama:
    """The model of a folder whose weights are quantised already."""
    from extras.formats import quantize

    kind = quantize.kind_of(folder)
    if with_adapter or cfg.quantize not in ("none", kind):
        raise UserError(f"{folder}: its weights are {kind} already", "--model with the folder it was made of")
    return quantize.load(folder, read_config(folder), device)


def attach(opened: hf_folder.Opened, folder: Path):
    """A base with the adapter of a folder: the model on the meta device, and its weights."""
    from extras.finetune import lora

    # A base that was made to reach further before the adapter was trained.
    if changes := hf_folder.load_about(folder).get("base_changes", {}):
        from extras.families import llama_kin

        try:
            opened.model = llama_kin.change(opened.model, changes)
        except (TypeError, ValueError) as e:
            raise UserError(f"{folder}/run.json: base_changes: {e}") from None
    return lora.attach(opened, folder)


def find_adapter(path: str) -> tuple[Path, Path | None]:
    """A folder, and the base's where it is an adapter's."""
    if (Path(path) / "config.json").exists():
        return hf_folder.model_folder(path), None
    from extras.finetune import lora

    return lora.find_adapter(path), hf_folder.model_folder(lora.base_of(path))


def newest_model() -> str:
    """out/sft where it holds a model, else out/pretrain."""
    return "out/sft" if Path("out/sft/config.json").exists() else "out/pretrain"
