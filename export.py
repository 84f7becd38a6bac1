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
from pathlib import Path
from pkgutil import resolve_name

from assembly.inference import attach
from assembly.models import open_model
from core import config, errors
from core.errors import UserError
from core.hf_folder import Opened

# Word -> its section of options, and the function that does it. Only what is asked for is imported.
WAYS = {
    "gguf": ("extras.formats.gguf_file:GgufConfig", "extras.formats.gguf_file:export"),
    "llama2c": ("extras.formats.llama2c:Llama2cConfig", "extras.formats.llama2c:export"),
    "from-llama2c": ("extras.formats.llama2c:FromLlama2cConfig", "extras.formats.llama2c:make_folder"),
    "merge": ("extras.finetune.merge:MergeConfig", "extras.finetune.merge:export"),
    "quantize": ("extras.formats.quantize:QuantizeConfig", "extras.formats.quantize:export"),
}


def main() -> None:
    word, argv = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word in ("-h", "--help"):
        config.load(__doc__, {name.replace("-", "_"): section for name, (section, _) in WAYS.items()}, [word])
    if word not in WAYS:
        raise UserError(f"{word or 'nothing'}: no such export", f"python export.py {' or '.join(WAYS)}")
    section, way = map(resolve_name, WAYS[word])
    name = word.replace("-", "_")
    # A wing opens no models: it is told how.
    way(getattr(config.load(__doc__, {name: section}, argv), name), open_folder)


def open_folder(folder: Path, adapter: Path | None = None) -> Opened:
    """A model folder of any family, with an adapter beside its weights where one is named."""
    opened = open_model(folder)
    if not adapter:
        return opened
    model, weights = attach(opened, adapter)
    return replace(opened, model=model, weights=weights)


if __name__ == "__main__":
    errors.run(main)
