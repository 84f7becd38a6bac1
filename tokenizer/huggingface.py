"""The tokenizer files of a Hugging Face folder.

In:  a backend. Out: a folder with `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json` and
     `special_tokens_map.json`.
Does not know chats; the chat template comes as a finished text.

How a sentencepiece BPE becomes a tokenizer.json with the same ids: sentencepiece always merges the neighbours whose
union has the best score; the tokenizers library always applies the merge that is listed first. So list, in order of
score, every split of every piece into two pieces. Spaces stay spaces in the vocabulary we write (the usual files
have "▁"): then a real U+2581 in a text finds no piece and falls back to its bytes, as it does in `Tokenizer.encode`.
"""

import json
import warnings
from pathlib import Path

from .sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Model, TokenizerError


def save(backend, folder: Path, chat_template: str | None) -> None:
    """Write the files; see `Tokenizer.save`.

    Args:
        backend: one of backends.py.
        folder: made if it is missing.
        chat_template: a jinja template, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False}
    if hasattr(backend, "model"):
        model = backend.model
        (folder / "tokenizer.model").write_bytes(backend.data)
        roles = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id, "pad": model.pad_id}
        tokens = {f"{role}_token": model.pieces[i].text for role, i in roles.items() if i is not None}
        try:
            _write_json(folder / "tokenizer.json", tokenizer_json(model))
        except TokenizerError as e:
            # A stale one of another vocabulary would be worse than none.
            (folder / "tokenizer.json").unlink(missing_ok=True)
            del config["tokenizer_class"]
            warnings.warn(f"no tokenizer.json written, other tools may split texts otherwise: {e}", stacklevel=3)
    else:
        (folder / "tokenizer.model").unlink(missing_ok=True)  # `load` would prefer it
        (folder / "tokenizer.json").write_bytes(backend.data)
        tokens = {f"{role}_token": token for role, token in backend.tokens.items()}
        kept = ("add_bos_token", "add_eos_token", "chat_template")
        config |= {key: backend.config[key] for key in kept if key in backend.config}
    config |= tokens
    config["clean_up_tokenization_spaces"] = False
    config["model_max_length"] = int(1e30)  # transformers' own "no limit"; the model's config.json has the true one
    if chat_template is not None:
        config["chat_template"] = chat_template
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # transformers would prefer this older one
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", tokens)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def tokenizer_json(model: Model) -> dict:
    """The content of a tokenizer.json that gives the ids of a sentencepiece model.

    Args:
        model: a BPE model with the identity normaliser.

    Returns:
        what json.dump takes.

    Raises:
        TokenizerError: the model has something that a tokenizer.json cannot say exactly.
    """
    if model.model_type != BPE:
        raise TokenizerError("only BPE models are translated, this is another kind")
    if model.charsmap or model.remove_extra_whitespaces:
        raise TokenizerError("its normaliser changes texts, only the identity normaliser is translated")
    known = {p.text: i for i, p in enumerate(model.pieces) if p.type == NORMAL}
    if any(p.type not in (NORMAL, UNKNOWN, CONTROL, BYTE) for p in model.pieces):
        raise TokenizerError("it has user-defined or unused pieces")
    if any(char not in known for text in known for char in text):
        # sentencepiece can merge characters that are no pieces themselves, tokenizers cannot.
        raise TokenizerError("some pieces have characters that are no pieces of their own")
    prefix = model.add_dummy_prefix and SPACE in known
    bos, unk = model.pieces[model.bos_id].text, model.pieces[model.unk_id].text
    special = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": p.text} | added for i, p in enumerate(model.pieces) if p.type in (UNKNOWN, CONTROL)
        ],
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": special,
            "pair": special + second,
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {
                (p.text.replace(SPACE, " ") if p.type == NORMAL else p.text): i for i, p in enumerate(model.pieces)
            },
            "merges": _merges(model, known),
        },
    }


def _merges(model: Model, known: dict[str, int]) -> list[list[str]]:
    """Every split of a piece into two pieces, best score first, as tokenizers lists merges."""
    merges = []
    for text in sorted(known, key=lambda t: (-model.pieces[known[t]].score, known[t])):
        for cut in range(1, len(text)):
            if text[:cut] in known and text[cut:] in known:
                merges.append([text[:cut].replace(SPACE, " "), text[cut:].replace(SPACE, " ")])
    return merges
