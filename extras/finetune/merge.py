"""A base and its adapter -> a plain model folder that computes what both do together.

In:  the folders of base and adapter. Out: a model folder, in fp32.
Knows nothing of training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core import files, hf_folder
from core.config import Section
from extras.finetune import lora
from tokenizer import load as load_tokenizer


@dataclass(frozen=True)
class MergeConfig(Section):
    model: str = ""  # the base; "": the one that the adapter names
    adapter: str = "out/lora"  # a folder that sft.py with LoRA, or PEFT, has made
    output: str = ""  # the model folder to make, in fp32
    overwrite: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.output:
            raise ValueError("output must be given")


def export(cfg: MergeConfig, open_model: Callable[..., hf_folder.Opened]) -> None:
    """What `python export.py merge` does.

    Args:
        open_model: (folder of a base, folder of an adapter) -> both together.
    """
    base, path = hf_folder.model_folder(cfg.model or lora.base_of(cfg.adapter)), Path(cfg.output)
    files.check_free([path], cfg.overwrite)
    tokenizer = load_tokenizer(base)
    adapter = lora.find_adapter(cfg.adapter)
    opened = open_model(base, adapter)
    hf_folder.check_tokenizer(base, opened.model, tokenizer)
    model = lora.merge(hf_folder.build(opened.model, opened.weights))
    # The folder says what is in it already, so that an adapter is not added twice.
    of_base, of_adapter = hf_folder.load_about(base), hf_folder.load_about(adapter)
    merged = f"{of_base.get('merged_sha256', '')} {files.sha256(adapter / lora.Adapter.file)}".strip()
    hf_folder.save_model(path, model, tokenizer, of_base | of_adapter | {"merged_sha256": merged})
    print(f"{cfg.output}: {base} with {adapter} merged; python sample.py --model {cfg.output}")
