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
from pathlib import Path

from .sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Model, TokenizerError


def save(backend, folder: Path, chat_template: str | None) -> None:
    """Write the files; see `Tokenizer.save`.

    Args:
        backend: of sentencepiece_backend.py or tokenizer_json.py.
        folder: made if it is missing.
        chat_template: a jinja template, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {f"{role}_token": token for role, token in backend.tokens.items()}
    config = backend.write(folder) | tokens | {"clean_up_tokenization_spaces": False}
    # transformers' own "no limit": the model's config.json has the true one.
    config["model_max_length"] = int(1e30)
    if chat_template is not None:
        config["chat_template"] = chat_template
        # transformers would prefer this older one.
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", tokens)


def write_json(path: Path, content: dict) -> None:
    """Write an object as those files are written: indented, in UTF-8."""
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
    ids = {p.text: i for i, p in enumerate(model.pieces) if p.type == NORMAL}
    problems = {
        "only BPE models are translated, this is another kind": model.model_type != BPE,
        "its normaliser changes texts, only the identity normaliser is translated": model.charsmap
        or model.remove_extra_whitespaces,
        "it has user-defined or unused pieces": {p.type for p in model.pieces} - {NORMAL, UNKNOWN, CONTROL, BYTE},
        # sentencepiece can merge characters that are no pieces themselves, tokenizers cannot.
        "some pieces have characters that are no pieces of their own": set("".join(ids)) - ids.keys(),
    }
    for problem, there in problems.items():
        if there:
            raise TokenizerError(problem)
    # sentencepiece's dummy prefix is a normaliser here, and a step of the decoder takes it off again.
    prefix = model.add_dummy_prefix and SPACE in ids
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    # Unknown and control pieces are added tokens, so that decoding can leave them out.
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = [(i, p.text) for i, p in enumerate(model.pieces) if p.type in (UNKNOWN, CONTROL)]
    # bos stands in front of a text, and in front of each of a pair of texts.
    bos = model.pieces[model.bos_id].text
    single, second = (
        [{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": letter, "type_id": n}}]
        for n, letter in enumerate("AB")
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text} | added for i, text in specials],
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single + second,
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {
                p.text.replace(SPACE, " ") if p.type == NORMAL else p.text: i for i, p in enumerate(model.pieces)
            },
            "merges": _merges(model, ids),
        },
    }


def _merges(model: Model, ids: dict[str, int]) -> list[list[str]]:
    """Every split of a piece into two pieces, best score first, as tokenizers lists merges."""
    # Ids decide between equal scores, so that the same model gives the same file.
    by_score = sorted(ids, key=lambda text: (-model.pieces[ids[text]].score, ids[text]))
    splits = ((text[:cut], text[cut:]) for text in by_score for cut in range(1, len(text)))
    return [[a.replace(SPACE, " "), b.replace(SPACE, " ")] for a, b in splits if a in ids and b in ids]
