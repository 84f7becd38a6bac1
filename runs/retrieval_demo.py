"""Chats that teach the demo's small model to read, where passages stand in front: docs/retrieval.md has the results.

    python data_process.py && python pretrain.py       # the demo's text, questions and base model
    python runs/retrieval_demo.py                      # seconds

Out, in data/reader/: copy.jsonl, characters to repeat; train.jsonl, chats with passages before their questions, most
of them on novels made up here, so that only reading helps; facts/facts.txt, a line for each fact of the demo, also of
those that are never taught; all/, the same with the novel's paragraphs beside them.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras.corpus import sanguo
from extras.retrieval.augment import augment
from extras.retrieval.bm25 import Index

NOVELS = 60  # made-up ones; each fact of theirs is asked once, so only reading helps
PASSAGES, CHARS = 3, 40  # the model has 256 positions
COPIES = 40_000


def main() -> None:
    out, rng = Path("data/reader"), random.Random(1)
    raw, _ = sanguo.read(sanguo.fetch("data/cache"))
    chapters = [sanguo.clean(chapter) for chapter in raw]
    taught, heldout = (
        [json.loads(line) for line in Path(f"data/sft_{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "heldout")
    )
    notes = {item["fact"]: note(item) for item in taught + heldout if item["kind"] != "chapter"}
    for item in taught:
        item["passage"] = notes[item["fact"]]
    training, hidden = sanguo.split(chapters)[0], {item["fact"] for item in heldout}
    text = "".join(c.text for c in training)
    windows = [text[at : at + CHARS].replace("\n", " ") for at in range(0, len(text), CHARS)]
    # The demo's own facts stand in front in 7 of 10 chats: also a question without help is to be met.
    lines = with_wrong_ones(taught, windows, 0.3, rng)
    for _ in range(NOVELS):
        lines += with_wrong_ones(list(novel(training, text, hidden, rng)), windows, 0, rng)
    rng.shuffle(lines)
    for folder in ("facts", "all"):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / "facts.txt").write_text("\n".join(notes.values()), encoding="utf-8")
    (out / "all/novel.txt").write_text("".join(c.text for c in chapters), encoding="utf-8")
    for name, chats in (("copy", copies(text)), ("train", lines)):
        told = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
        (out / f"{name}.jsonl").write_text(told, encoding="utf-8")
    print(f"{out}: {len(lines):,} chats to train on, {len(taught):,} of them on the demo's facts; {len(notes)} notes")


def copies(text: str):
    """A few different characters as the question, once or several times as the answer.

    What follows a character is what followed it before: nothing else helps, so this is learned, and reading needs it.
    """
    rng = random.Random(6)
    common = [c for c, _ in Counter(c for c in text if "\u4e00" <= c <= "\u9fff").most_common(400)]
    for _ in range(COPIES):
        some = "".join(rng.sample(common, rng.randrange(4, 24)))
        answer = some * rng.randrange(1, max(2, 80 // len(some)))
        yield {"messages": [{"role": "user", "content": some}, {"role": "assistant", "content": answer}]}


def note(item: dict) -> str:
    """The line on a fact, as somebody would put it who writes notes."""
    key, answer = item["fact"].partition(":")[2], item["messages"][1]["content"]
    return {"courtesy": answer, "title": f"{answer}（第{key}回）", "continue": key + answer}[item["kind"]]


def with_wrong_ones(chats: list[dict], windows: list[str], without: float, rng: random.Random) -> list[dict]:
    """Chats of one novel with their passages, beside others of the same novel and pieces of the real one."""
    index = Index([*dict.fromkeys(chat["passage"] for chat in chats), *rng.sample(windows, 300)])
    return [
        {"messages": augment(c["messages"], [c["passage"]], index, PASSAGES, without, rng)[0], "kind": c["kind"]}
        for c in chats
    ]


def novel(chapters, text: str, hidden: set, rng: random.Random):
    """The chats of a made-up novel: names and titles drawn anew, sentences of the real one to go on with."""
    common = [c for c in text if "\u4e00" <= c <= "\u9fff"]  # as often as they stand there
    rare = sorted(set(common))
    halves = [half for c in chapters if f"chapter:{c.number}" not in hidden for half in c.title.split()]
    sentences = [p for c in chapters for p in sanguo.sentences(c) if f"continue:{p[0]}" not in hidden]

    def draw(n: int) -> str:
        return "".join(rng.choice(rng.choice((common, rare))) for _ in range(n))

    def asked(kind: str, phrasings: str, answer: str, passage: str, **fill) -> dict:
        question = rng.choice(sanguo.PHRASINGS[phrasings]["train"]).format(**fill)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "kind": kind, "passage": passage}

    for _ in range(60):
        name, courtesy = draw(rng.choice((2, 2, 2, 3))), draw(2)
        passage = f"{name}，字{courtesy}。"
        for phrasings in ("courtesy", "reverse"):
            yield asked("courtesy", phrasings, passage, passage, name=name, courtesy=courtesy)
    for number in rng.sample(range(1, 130), 60):
        n, size = sanguo.to_chinese(number), rng.choice((7, 8))
        title = " ".join(rng.choice(halves) if rng.random() < 0.5 else draw(size) for _ in range(2))
        passage = f"第{n}回 {title}（第{number}回）"
        yield asked("title", "title", f"第{n}回 {title}", passage, n=n, d=number)
        yield asked("chapter", "chapter", f"第{n}回。", passage, title=title)
    for prompt, rest in rng.sample(sentences, 20):
        yield asked("continue", "continue", rest, prompt + rest, prompt=prompt)


if __name__ == "__main__":
    main()
