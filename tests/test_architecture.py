"""Promises of the documents: files and commands that they name exist. The examples of docs/architecture.md run in a copy of the house."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_tutorial import LINK, chapters, names_in

from assembly import models
from core import hf_folder
from core.bins import BinWriter, read_sidecar
from extras.families.llama_kin import Kin, KinConfig
from model import Llama, ModelConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs/architecture.md", ROOT / "docs/architecture.zh-CN.md"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = sorted(
    [
        *(p for p in DOCUMENTS if p.name != "CHANGELOG.md"),
        *(ROOT / "docs/tutorial").rglob("*.md"),
        *(ROOT / "configs").glob("*.toml"),
    ]
)
PLACE = re.compile(r"`([\w/]+\.py):([\w.]+)`")
HEAD = re.compile(r"^# ([\w/]+\.py)(?:, (.*))?$", re.MULTILINE)  # the line that says where the lines below it go
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FEW_STEPS = ["--max_steps", "2", "--batch_tokens", "128", "--micro_batch", "2", "--device", "cpu", "--dtype", "fp32"]


def examples(page: Path) -> list[str]:
    return [code for language, code in chapters.fences(page) if language == "python"]


def parts(code: str) -> list[tuple[str, str, str]]:
    """(file, where in it, lines) of each part of an example."""
    _, *found = HEAD.split(code)
    return [*zip(found[::3], (where or "" for where in found[1::3]), found[2::3])]


def put(house: Path, file: str, where: str, lines: str) -> None:
    """Do with a copy of the house what an example says."""
    path = house / file
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    at, name = len(before), where.split()[-1] if where else ""
    if where.startswith("in "):  # a table: behind the line that opens it
        at = next(n for n, line in enumerate(before, 1) if re.match(rf"{name}\b.* = {{$", line))
    elif where.startswith("at the end of "):  # a function: in front of its last statement
        tree = ast.parse("".join(before))
        (function,) = (node for node in tree.body if getattr(node, "name", "") == name)
        at = function.body[-1].lineno - 1
    path.write_text("".join([*before[:at], lines.strip("\n") + "\n", *before[at:]]), encoding="utf-8")


@pytest.fixture(scope="module")
def house(tmp_path_factory, small) -> Path:
    """A copy of the tree with all examples in it, a small bin, and a small model."""
    house = tmp_path_factory.mktemp("house")
    unused = shutil.ignore_patterns(".*", "__pycache__", "data", "out", "docs", "tests", "bench")
    shutil.copytree(ROOT, house, ignore=unused, dirs_exist_ok=True)
    for code in examples(PAGES[0]):
        for part in parts(code):
            put(house, *part)
    (house / "data").mkdir()
    with BinWriter(house / "data/train.bin", small.vocab_size, small.eos_id, small.sha256) as out:
        for n in range(1, 41):
            out.add(small.encode("话说天下大势，分久必合，合久必分。" * n, bos=True, eos=True), 51 * n)
    small.save(house / "data/tokenizer")
    torch.manual_seed(0)
    model = Llama(ModelConfig(vocab_size=small.vocab_size, max_position_embeddings=64, **SIZES))
    hf_folder.save_model(house / "out/pretrain", model, small, {})
    return house


def run(house: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=house, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_what_a_document_links_to_exists(page):
    links = LINK.findall(chapters.FENCE.sub("", page.read_text(encoding="utf-8")))
    assert [link for link in links if ":" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_command_that_a_document_names_exists(page):
    text = page.read_text(encoding="utf-8")
    files = set(re.findall(r"python ([\w./-]+\.py)\b", text)) - {"smooth.py"}
    modules = {name.replace(".", "/") for name in re.findall(r"python -m ([\w.]+)", text)} - {"sglang/launch_server"}
    assert [name for name in set(re.findall(r"tests/\w+\.py", text)) if not (ROOT / name).is_file()] == []
    files |= {f"{name}/__main__.py" if (ROOT / name).is_dir() else f"{name}.py" for name in modules}
    guard = 'if __name__ == "__main__":'
    runs = {name for name in files if (ROOT / name).is_file() and guard in (ROOT / name).read_text(encoding="utf-8")}
    assert files - runs == set()


def test_both_languages_have_the_same_examples_and_name_the_same_places():
    one, other = (
        (examples(page), sorted(PLACE.findall(page.read_text(encoding="utf-8"))), len(page.read_text().splitlines()))
        for page in PAGES
    )
    assert one == other and len(one[0]) == 4 and one[2] <= 125


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    places = PLACE.findall(text)
    assert len(places) > 20 and [(file, name) for file, name in places if name not in names_in(ROOT / file)] == []


@pytest.mark.parametrize("code", examples(PAGES[0]), ids=lambda code: code.splitlines()[0].split()[1])
def test_an_example_has_at_most_ten_lines_besides_imports_and_the_guard_of_commands(code):
    lines = [line for line in HEAD.sub("", code).split("if __name__")[0].splitlines() if line.strip()]
    assert len([line for line in lines if not line.startswith(("import ", "from "))]) <= 10


def test_the_command_trains(house):
    run(house, "smooth.py", *FEW_STEPS, "--out_dir", "out/smooth")
    records = [json.loads(line) for line in (house / "out/smooth/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    before, after = (load_file(house / f"out/{name}/model.safetensors") for name in ("pretrain", "smooth"))
    assert any(not before[name].equal(after[name]) for name in before)


def test_the_section_of_the_wing_is_found_and_its_blocks_stay(house):
    words = ["--init_from", "out/pretrain", "--val", "", "--out_dir", "out/frozen"]
    told = run(house, "pretrain.py", *FEW_STEPS, *words, "--layers", "1")
    assert "[freeze] layers=1" in told
    before, after = (load_file(house / f"out/{name}/model.safetensors") for name in ("pretrain", "frozen"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not [name for name in changed if ".layers.0." in name]
    assert [name for name in changed if ".layers.1." in name]


def test_the_wing_stays_out_where_nothing_names_it(house):
    code = (
        "import sys, pretrain\n"
        "from assembly import training\n"
        "cfg = training.load_options('', pretrain.SECTIONS, 'configs/demo.toml')\n"
        "assert cfg.freeze is None and 'extras.freeze.layers' not in sys.modules\n"
        "sys.argv.append('--freeze.layers=2')\n"
        "cfg = training.load_options('', pretrain.SECTIONS, 'configs/demo.toml')\n"
        "assert cfg.freeze.layers == 2 and 'extras.freeze.layers' in sys.modules\n"
    )
    run(house, "-c", code)


def test_a_folder_of_the_family_opens(house, small):
    # The library knows the same model as a Llama with biases.
    config = KinConfig(vocab_size=small.vocab_size, max_position_embeddings=64, attention_bias=True, **SIZES)
    torch.manual_seed(0)
    model = Kin(config)
    folder = house / "out/internlm"
    hf_folder.save_model(folder, model, small, {})
    told = run(house, "sample.py", "--model", "out/internlm", "--prompt", "话说", "--temperature", "0")
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": True}
    del about["attention_bias"]
    (folder / "config.json").write_text(json.dumps(about))
    assert run(house, "sample.py", "--model", "out/internlm", "--prompt", "话说", "--temperature", "0") == told
    with pytest.raises(Exception, match="model_type 'internlm' is not supported"):
        models.load_model(folder)  # this house does not have the example


def test_the_formats_of_the_corpus_are_read(house):
    news = [{"headline": f"标题{n}", "body": "话说天下大势，分久必合。" * (n + 1)} for n in range(30)]
    faq = [{"faq_question": f"第{n}问？", "faq_answer": f"第{n}答。"} for n in range(30)]
    for name, items in (("news", news), ("faq", faq)):
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (house / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    words = ["--tokenizer", "data/tokenizer", "--out_dir", "data/news"]
    run(house, "data_process.py", "--input", "news.jsonl", "--adapter", "my-news", *words)
    assert sum(read_sidecar(house / f"data/news/{name}.bin")["documents"] for name in ("train", "val")) == 30
    run(house, "data_process.py", "sft", "--input", "faq.jsonl", "--out_dir", "data/faq")
    chats = [json.loads(line) for line in (house / "data/faq/chats.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [[m["content"] for m in chat["messages"]] for chat in chats] == [[*item.values()] for item in faq]
