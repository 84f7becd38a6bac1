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
from dataclasses import replace
from pkgutil import resolve_name

from assembly import inference
from assembly.models import open_model
from core import config, errors, hf_folder
from core.errors import UserError
from core.hf_folder import Opened
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer


def open_folder(path: str) -> tuple[Opened, Tokenizer]:
    """The folder with a run's weights and its tokenizer, which belong together."""
    folder = hf_folder.model_folder(path)
    tokenizer, opened = load_tokenizer(folder), open_model(folder)
    hf_folder.check_tokenizer(folder, opened.model, tokenizer)
    return opened, tokenizer


def open_with_adapter(path: str, adapter: str) -> tuple[Opened, Tokenizer]:
    """The same with an adapter; "" as path: the base that the adapter names."""
    opened, tokenizer = open_folder(path or inference.base_of(adapter))
    model, weights = inference.attach(opened, adapter)
    return replace(opened, model=model, weights=weights), tokenizer


# Word -> its section of options, the function that takes it, and how this opens folders. Only what is asked for is
# imported.
WAYS = {
    "gguf": ("extras.formats.gguf_file:GgufConfig", "extras.formats.gguf_file:export", open_folder),
    "llama2c": ("extras.formats.llama2c:Llama2cConfig", "extras.formats.llama2c:export", open_folder),
    "from-llama2c": ("extras.formats.llama2c:FromLlama2cConfig", "extras.formats.llama2c:make_folder"),
    "merge": ("extras.finetune.merge:MergeConfig", "extras.finetune.merge:export", open_with_adapter),
    "quantize": ("extras.formats.quantize:QuantizeConfig", "extras.formats.quantize:export", open_folder),
}


def main() -> None:
    word, argv = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word in ("-h", "--help"):
        config.load(__doc__, {name.replace("-", "_"): way[0] for name, way in WAYS.items()}, [word])
    if word not in WAYS:
        raise UserError(f"{word or 'nothing'}: no such export", f"python export.py {' or '.join(WAYS)}")
    section, way, *opener = WAYS[word]
    name = word.replace("-", "_")
    options = vars(config.load(__doc__, {name: resolve_name(section)}, argv))[name]
    resolve_name(way)(options, *opener)


if __name__ == "__main__":
    errors.run(main)
