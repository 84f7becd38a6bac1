"""A model folder in, files for another program out; or the other way.

    python export.py gguf --model out/sft --type q8_0                   # llama.cpp and Ollama; pip install gguf
    python export.py llama2c --model out/pretrain --output out/c/model.bin        # run.c of llama2.c
    python export.py from-llama2c --model stories260K.bin --tokenizer tok512.bin --output out/stories
    python export.py merge --adapter out/lora --output out/merged       # LoRA added to its base: a model folder
    python export.py quantize --model out/sft --type int8 --output out/small    # weights in 8 or 4 bits

transformers, vLLM, SGLang and lm-eval read a model folder as it is. What is there already is not replaced without
--overwrite.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tokenizer
from core import config, errors, files, hf_folder
from core.errors import UserError
from extras.families import others as families
from extras.finetune import lora
from extras.formats import folders as doors
from extras.formats import gguf_file, llama2c, quantize


@dataclass(frozen=True)
class GgufConfig:
    model: str = "out/sft"  # a model folder
    type: str = "f16"  # f32, f16, bf16, q8_0, q4_0: of the matrices
    output: str = ""  # a file .gguf, or a folder; "": a folder beside the model, out/sft-f16
    overwrite: bool = False

    def __post_init__(self):
        if self.type not in gguf_file.TYPES:
            raise ValueError(f"type = {self.type!r}, must be one of {', '.join(gguf_file.TYPES)}")


@dataclass(frozen=True)
class Llama2cConfig:
    model: str = "out/sft"  # a model folder
    output: str = ""  # model.bin; tokenizer.bin goes beside it
    overwrite: bool = False

    def __post_init__(self):
        if not self.output:
            raise ValueError("output must be given")


@dataclass(frozen=True)
class FromLlama2cConfig:
    model: str = ""  # llama2.c's model.bin
    tokenizer: str = ""  # its tokenizer.bin
    output: str = ""  # the folder to make
    overwrite: bool = False

    def __post_init__(self):
        if not (self.model and self.tokenizer and self.output):
            raise ValueError("model, tokenizer and output must be given")


@dataclass(frozen=True)
class MergeConfig:
    model: str = ""  # the base; "": the one that the adapter names
    adapter: str = "out/lora"  # a folder that sft.py with LoRA, or PEFT, has made
    output: str = ""  # the model folder to make, in fp32
    overwrite: bool = False

    def __post_init__(self):
        if not self.output:
            raise ValueError("output must be given")


@dataclass(frozen=True)
class QuantizeConfig:
    model: str = "out/sft"  # a model folder
    type: str = "int8"  # int8, int4
    output: str = ""  # the folder to make, for sample.py, serve.py, transformers and vLLM
    overwrite: bool = False

    def __post_init__(self):
        if not self.output or self.type not in quantize.LAYERS:
            raise ValueError(f"type = {self.type!r}, must be {' or '.join(quantize.LAYERS)}; output must be given")


def main() -> None:
    families.register()
    word, argv = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    sections = {name.replace("-", "_"): section for name, (section, _) in WAYS.items()}
    if word in ("-h", "--help"):
        config.load(__doc__, sections, [word])
    if word not in WAYS:
        raise UserError(f"{word or 'nothing'}: no such export", f"python export.py {' or '.join(WAYS)}")
    section, way = WAYS[word]
    way(getattr(config.load(__doc__, {word.replace("-", "_"): section}, argv), word.replace("-", "_")))


def gguf(cfg: GgufConfig) -> None:
    """For llama.cpp, with a Modelfile for Ollama."""
    gguf_file.library()
    folder, model, text = doors.open_folder(cfg.model)
    name = Path(cfg.model).resolve().name
    path = Path(cfg.output or Path(cfg.model).resolve().with_name(f"{name}-{cfg.type}"))
    if path.suffix != ".gguf":
        path /= f"{name}-{cfg.type}.gguf"
    beside = path.with_name("Modelfile")
    check_free([path, beside], cfg.overwrite)
    chat_format = hf_folder.load_about(folder).get("chat_format")
    counts = gguf_file.write(path, model, text, cfg.type, name, chat_format)
    files.write_text(beside, gguf_file.modelfile(path.name, text, model.config.max_position_embeddings, chat_format))
    tensors = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    spoken = f"chat format {chat_format}" if chat_format else "no chat format: it continues texts"
    print(f"{path}: {path.stat().st_size:,} bytes, tensors: {tensors}; {spoken}")
    print(f"{beside}: ollama create {name} -f {beside}")


def to_llama2c(cfg: Llama2cConfig) -> None:
    """For run.c."""
    _, model, text = doors.open_folder(cfg.model)
    path = Path(cfg.output)
    beside = path.with_name("tokenizer.bin")
    check_free([path, beside], cfg.overwrite)
    llama2c.check(model, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    llama2c.write_weights(path, model)
    for note in llama2c.write_tokenizer(beside, text, model.config.vocab_size):
        print(f"note: {note}", file=sys.stderr)
    print(f"{path}: {path.stat().st_size:,} bytes\n{beside}: {beside.stat().st_size:,} bytes")


def from_llama2c(cfg: FromLlama2cConfig) -> None:
    """A model folder of two .bin files."""
    folder = Path(cfg.output)
    check_free([folder], cfg.overwrite)
    model = llama2c.read_weights(cfg.model)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "tokenizer.model"
        path.write_bytes(llama2c.read_tokenizer(cfg.tokenizer, model.config.vocab_size))
        hf_folder.save_model(folder, model, tokenizer.load(path), {"source": Path(cfg.model).name})
    print(f"{folder}: {model.num_parameters()[0]:,} parameters; python sample.py --model {folder} --prompt ''")


def merge(cfg: MergeConfig) -> None:
    """A plain model that computes what base and adapter do."""
    base = hf_folder.model_folder(cfg.model or lora.base_of(cfg.adapter))
    check_free([Path(cfg.output)], cfg.overwrite)
    text = tokenizer.load(base)
    model, fill, adapter = lora.attach(*hf_folder.open_model(base), cfg.adapter, base)
    hf_folder.check_tokenizer(base, model, text)
    model = lora.merge(hf_folder.build(model, fill))
    of_base, of_adapter = hf_folder.load_about(base), hf_folder.load_about(adapter)
    merged = f"{of_base.get('merged_sha256', '')} {files.sha256(adapter / lora.Adapter.file)}".strip()
    about = of_base | of_adapter | {"merged_sha256": merged}
    hf_folder.save_model(Path(cfg.output), model, text, about)
    print(f"{cfg.output}: {base} with {adapter} merged; python sample.py --model {cfg.output}")


def quantized(cfg: QuantizeConfig) -> None:
    """A model folder with rounded weights, in compressed-tensors' format."""
    folder, path = hf_folder.model_folder(cfg.model), Path(cfg.output)
    check_free([path], cfg.overwrite)
    text = tokenizer.load(folder)
    model = quantize.build(*hf_folder.open_model(folder), cfg.type)
    hf_folder.check_tokenizer(folder, model, text)
    for note in quantize.save(path, model, cfg.type, text, hf_folder.load_about(folder)):
        print(f"note: {note}: sample.py and serve.py read this folder, transformers and vLLM will not", file=sys.stderr)
    size = (path / "model.safetensors").stat().st_size
    print(f"{path}: {cfg.type}, {size:,} bytes; python sample.py --model {path}")


def check_free(paths: list[Path], overwrite: bool) -> None:
    """UserError where one of these is there already."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists", "--overwrite replaces it, --output writes elsewhere")


WAYS = {
    "gguf": (GgufConfig, gguf),
    "llama2c": (Llama2cConfig, to_llama2c),
    "from-llama2c": (FromLlama2cConfig, from_llama2c),
    "merge": (MergeConfig, merge),
    "quantize": (QuantizeConfig, quantized),
}

if __name__ == "__main__":
    errors.run(main)
