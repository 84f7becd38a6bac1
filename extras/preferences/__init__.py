"""What people, or rules, like better: how dpo.py, reward.py and grpo.py look at a chat model and at their files.

pairs.py      two answers, one preferred: rows, and the loss of DPO
scalar.py     a model that gives an answer a number
questions.py  answers that the model makes itself, judged: the loss of GRPO
"""

from collections.abc import Callable
from pathlib import Path

import tokenizer
from core import hf_folder
from core.errors import UserError
from model import Llama


def open_chat_model(folder: str, chat_format: str) -> tuple[Path, Llama, Callable, object, str]:
    """A chat model to go on from.

    Args:
        chat_format: a format's name; auto: the model's own.
    Returns:
        its folder, the model and `fill` as from `checkpoint.open_model`, its tokenizer, the chat format.
    Raises:
        UserError: as there; a base model.
    """
    path = hf_folder.model_folder(folder)
    text, own = tokenizer.load(path), hf_folder.load_about(path).get("chat_format")
    if not (chat_format := own if chat_format == "auto" else chat_format):
        raise UserError(f"{path}: a base model has no way to answer", "python sft.py first, or --chat_format")
    model, fill = hf_folder.open_model(path)
    hf_folder.check_tokenizer(path, model, text)
    return path, model, fill, text, chat_format
