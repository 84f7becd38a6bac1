"""Texts that the tokenizer tests share, made up or real."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tokenizer.sentencepiece_model import SPACE

DATA = Path(__file__).resolve().parents[2] / "shared/data"

# A made-up text with Chinese, English, digits and runs of one character, so that merges of several shapes are learned.
BOOK = [
    "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空，青山依旧在，几度夕阳红。",
    "白发渔樵江渚上，惯看秋月春风。一壶浊酒喜相逢，古今多少事，都付笑谈中。",
    "The quick brown fox jumps over the lazy dog; the dog sleeps, the fox laughs: haha, hahaha!",
    "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦；及秦灭之后，楚、汉分争，又并入于汉。",
    "    if x == 1:\n        return x  # 一二三\n......。。。。。。======\n",
] * 20

HARD = [
    "",
    " ",
    "  ",
    "\n",
    "\0",
    "a\0b",
    SPACE,
    f"a{SPACE}b",
    f"{SPACE} {SPACE}",
    "  两头有空格  ",
    "\t\r\n\x0b\u2028",
    "\ufffd",
    "\ufeff",
    "e\u0301",
    "Ａ１　",
    "\U0010ffff",
    "😀👨‍👩‍👧",
    "𠀀龘䶮",
    "<s>",
    "</s>",
    "<|im_start|>user",
    "<0xE4>",
    "<unk>",
]

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from(f"  {SPACE}a:.。=h\n汉😀<s>|0"))
RELAXED = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def real_model(name):
    path = DATA / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def real_texts(count):
    path = DATA / "derived/cmrc2019_stories.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    texts = []
    for name in ("derived/cmrc2019_stories.jsonl", "medical/medicalgpt_medical_sft_1K.jsonl"):
        texts += [str(v) for line in (DATA / name).open(encoding="utf-8") for v in json.loads(line).values()]
    return random.Random(0).sample(texts, min(count, len(texts)))


def change(model, **changes):
    return dataclasses.replace(model, **changes)
