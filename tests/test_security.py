"""Hostile files through the commands a user would point at them: nothing in them runs, nothing large is allocated.

Each file of the gallery holds a payload that makes a canary file; the test first shows that a careless reader sets it
free, then that ours do not.
"""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import pickle
import random
import runpy
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from safetensors.torch import load_file, save, save_file

import data_process
import pretrain
import sample
import sft
from assembly.models import load_model
from core import errors, files, hf_folder
from core.bins import BinWriter
from core.errors import UserError
from model import Llama

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"sample": sample, "pretrain": pretrain, "sft": sft, "data_process": data_process}


class Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"echo > '{self.canary}'",)


def python_payload(canary: Path) -> str:
    return f"import os\nos.system(\"echo > '{canary}'\")\n"


def template_payload(canary: Path) -> str:
    return "{{ cycler.__init__.__globals__.os.system(\"echo > '" + str(canary) + "'\") }}"


def render(template: str):
    return pytest.importorskip("jinja2").Environment().from_string(template).render()


def unsafe(path: Path):
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=False)


@pytest.fixture(scope="module")
def home(small, tmp_path_factory) -> Path:
    """A sound model folder, a bin and a chat file."""
    home = tmp_path_factory.mktemp("home")
    model = small_run.small_model(vocab_size=small.vocab_size)
    hf_folder.save_model(home / "m", model, small, {"chat_format": "bos"})
    with BinWriter(home / "train.bin", small.vocab_size, small.eos_id, small.sha256) as out:
        for _ in range(20):
            ids = small.encode("话说天下大势，分久必合，合久必分。", bos=True, eos=True)
            out.add(ids, 60)
    (home / "train.json").unlink()  # it would hold the bin to one of the two tokenizer files
    chats = [{"messages": [{"role": "user", "content": "天"}, {"role": "assistant", "content": "地"}]}]
    (home / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    return home


@pytest.fixture
def place(home, tmp_path, monkeypatch) -> Path:
    """A copy of that home, as the working directory."""
    subprocess.run(["cp", "-r", f"{home}/.", str(tmp_path / "work")], check=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def command(monkeypatch, capfd):
    """Run a command in this process: (exit code, stderr lines). An exception that errors.run lets through fails."""

    def run(name: str, *argv: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        with pytest.raises(SystemExit) as ended:
            errors.run(COMMANDS[name].main)
        return ended.value.code, capfd.readouterr().err.splitlines()

    return run


def refused(result: tuple[int, list[str]]) -> str:
    """The one line of a refusal."""
    code, lines = result
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result
    return lines[0]


def ways_to_a_model(folder: str = "m"):
    """Each command that loads a foreign model, with what it needs to reach its end when the folder is sound."""
    return [
        ("sample", "--model", folder, "--prompt", "天", "--max_new_tokens", "2", "--device", "cpu"),
        (
            "sft",
            "--init_from",
            folder,
            "--train",
            "chats.jsonl",
            "--val",
            "",
            "--chat_format",
            "bos",
            "--show_mask",
            "1",
            "--device",
            "cpu",
        ),
        (
            "pretrain",
            "--init_from",
            folder,
            "--train",
            "train.bin",
            "--val",
            "",
            "--max_steps",
            "1",
            "--batch_tokens",
            "64",
            "--micro_batch",
            "2",
            "--device",
            "cpu",
            "--seq_len",
            "16",
            "--prompt",
            "",
        ),
    ]


# ---------------------------------------------------------------- gallery: model folders
#
# plant(folder, canary) puts a hostile file into a sound folder and returns the careless reader that sets it free.


def weights_of(folder: Path, **more) -> dict:
    """The folder's own weights, taken out of it."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return {k: v.clone() for k, v in state.items()} | more


def raw_pickle(folder, canary):
    (folder / "model.pt").write_bytes(pickle.dumps(weights_of(folder, evil=Payload(canary))))
    return lambda: pickle.loads((folder / "model.pt").read_bytes())


def zip_pickle(folder, canary):
    torch.save(weights_of(folder, evil=Payload(canary)), folder / "pytorch_model.bin")
    return lambda: unsafe(folder / "pytorch_model.bin")


def payload_before_the_weights(folder, canary):
    torch.save([Payload(canary), weights_of(folder)], folder / "model.pth")
    return lambda: unsafe(folder / "model.pth")


def legacy_pickle(folder, canary):
    torch.save(
        weights_of(folder, evil=Payload(canary)), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    return lambda: unsafe(folder / "pytorch_model.bin")


def legacy_magic_number(folder, canary):
    weights_of(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))  # read before the format is even known
    return lambda: unsafe(folder / "pytorch_model.bin")


def legacy_tar(folder, canary):
    weights_of(folder)
    with tarfile.open(folder / "pytorch_model.bin", "w") as tar:  # the format of CVE-2025-32434
        for name, content in (("storages", [0, []]), ("tensors", [0]), ("pickle", [Payload(canary)])):
            data = b"".join(pickle.dumps(part, 2) for part in content)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return lambda: torch.load(folder / "pytorch_model.bin", weights_only=False)


def one_shard_of_two(folder, canary):
    state = weights_of(folder)
    torch.save(state, folder / "a.bin")
    torch.save({"evil": Payload(canary)}, folder / "b.bin")
    index = {"weight_map": dict.fromkeys(state, "a.bin") | {"evil": "b.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return lambda: unsafe(folder / "b.bin")


def a_pickle_named_safetensors(folder, canary):
    torch.save(weights_of(folder, evil=Payload(canary)), folder / "model.safetensors")
    return lambda: unsafe(folder / "model.safetensors")


def distributed_checkpoint(folder, canary):
    weights_of(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    (folder / "__0_0.distcp").write_bytes(b"")
    from torch.distributed.checkpoint import FileSystemReader

    return lambda: FileSystemReader(folder).read_metadata()


def numpy_object_as_tokenizer(folder, canary):
    np.save(folder / "x.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    os.replace(folder / "x.npy", folder / "tokenizer.model")
    return lambda: np.load(folder / "tokenizer.model", allow_pickle=True)


def pickle_as_tokenizer_json(folder, canary):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_bytes(pickle.dumps(Payload(canary)))
    return lambda: pickle.loads((folder / "tokenizer.json").read_bytes())


REFUSED = [
    raw_pickle,
    zip_pickle,
    payload_before_the_weights,
    legacy_pickle,
    legacy_magic_number,
    legacy_tar,
    one_shard_of_two,
    a_pickle_named_safetensors,
    distributed_checkpoint,
    numpy_object_as_tokenizer,
    pickle_as_tokenizer_json,
]


def tokenizer_pickle(folder, canary):
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Payload(canary)))
    return lambda: pickle.loads((folder / "tokenizer.pkl").read_bytes())


def chat_template(folder, canary):
    (folder / "tokenizer.model").unlink()  # so that tokenizer.json and its config are the ones that are read
    (folder / "run.json").unlink()  # it notes the hash of the file that is gone
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": template_payload(canary), "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template_payload(canary))
    return lambda: render(config["chat_template"])


def code_of_the_tokenizer(folder, canary):
    (folder / "tokenizer.model").unlink()
    (folder / "run.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenization.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization.py").write_text(python_payload(canary))
    return lambda: runpy.run_path(str(folder / "tokenization.py"))


def code_of_the_model(folder, canary):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "modeling.Evil"},
        "architectures": ["Evil"],
        "trust_remote_code": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modeling.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(python_payload(canary))
    return lambda: runpy.run_path(str(folder / "modeling.py"))


def trainer_state(folder, canary):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        torch.save(Payload(canary), folder / name)  # beside sound safetensors, nobody needs them
    return lambda: unsafe(folder / "training_args.bin")


def adapter(folder, canary):
    torch.save({"lora": Payload(canary)}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../../", "peft_type": "LORA"}))
    return lambda: unsafe(folder / "adapter_model.bin")


def metadata_of_safetensors(folder, canary):
    held = pickle.dumps(Payload(canary), 0).decode("ascii")
    save_file(weights_of(folder), folder / "model.safetensors", metadata={"format": "pt", "__reduce__": held})
    return lambda: pickle.loads(held.encode())


def yaml_beside(folder, canary):
    text = f"!!python/object/apply:os.system [\"echo > '{canary}'\"]"
    for name in ("config.yaml", "generation_config.yaml"):
        (folder / name).write_text(text)
    return lambda: pytest.importorskip("yaml").unsafe_load(text)


def options_of_the_run(folder, canary):
    about = json.loads((folder / "run.json").read_text())
    about |= {
        "options": {"train": {"out_dir": "../../"}, "data": {"allow_pickle": True}},
        "command": template_payload(canary),
        "__class__": "os.system",
    }
    (folder / "run.json").write_text(json.dumps(about))
    return lambda: render(about["command"])


HARMLESS = [
    tokenizer_pickle,
    chat_template,
    code_of_the_tokenizer,
    code_of_the_model,
    trainer_state,
    adapter,
    metadata_of_safetensors,
    yaml_beside,
    options_of_the_run,
]


def set_free(careless, canary: Path) -> None:
    """The payload works: it makes the canary where it is read carelessly."""
    with contextlib.suppress(Exception):  # it ran first, and left something that is no model
        careless()
    assert canary.exists()
    canary.unlink()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("allow", [[], ["--allow_pickle"]], ids=["", "allowed"])
@pytest.mark.parametrize("plant", REFUSED, ids=lambda f: f.__name__)
def test_a_payload_is_refused_in_one_line_and_never_runs(place, command, plant, allow):
    canary = place / "canary"
    careless = plant(place / "m", canary)
    set_free(careless, canary)
    for way in ways_to_a_model():
        line = refused(command(*way, *allow))
        assert "m/" in line, "the file is named"
        assert not canary.exists()


@pytest.mark.parametrize("plant", HARMLESS, ids=lambda f: f.__name__)
def test_what_a_folder_brings_along_is_never_run(place, command, plant):
    canary = place / "canary"
    careless = plant(place / "m", canary)
    set_free(careless, canary)
    above = sorted(os.listdir(place.parent))
    for way in ways_to_a_model():
        code, lines = command(*way, *([] if way[0] != "pretrain" else ["--out_dir", "out/x"]))
        assert code == 0, lines
        assert not canary.exists()
    assert sorted(os.listdir(place.parent)) == above


def test_modules_in_the_working_directory_are_not_imported(place):
    for name in ("torch", "json", "tokenizer", "model", "core", "sitecustomize", "safetensors"):
        (place / f"{name}.py").write_text(python_payload(place / "canary"))
    words = ways_to_a_model()[0]
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), *words[1:]], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0 and not (place / "canary").exists(), done.stderr
    set_free(lambda: runpy.run_path(str(place / "torch.py")), place / "canary")


# ---------------------------------------------------------------- gallery: data, prompts, options


def npy_as_bin(place, canary):
    np.save(place / "x.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    os.replace(place / "x.npy", place / "evil.bin")
    return (
        lambda: np.load(place / "evil.bin", allow_pickle=True),
        2,
        ("pretrain", "--train", "evil.bin", "--val", "", "--tokenizer", "m", "--device", "cpu"),
    )


def pickle_as_sidecar(place, canary):
    (place / "train.json").write_bytes(pickle.dumps(Payload(canary)))
    return (
        lambda: pickle.loads((place / "train.json").read_bytes()),
        2,
        ("pretrain", "--train", "train.bin", "--val", "", "--tokenizer", "m", "--device", "cpu"),
    )


def template_in_a_chat(place, canary):
    chat = {
        "messages": [
            {"role": "user", "content": template_payload(canary)},
            {"role": "assistant", "content": "{0.__class__}"},
        ]
    }
    (place / "chats.jsonl").write_text(json.dumps(chat))
    return (
        lambda: render(template_payload(canary)),
        0,
        (
            "sft",
            "--init_from",
            "m",
            "--train",
            "chats.jsonl",
            "--val",
            "",
            "--chat_format",
            "bos",
            "--show_mask",
            "1",
            "--seq_len",
            "400",
            "--device",
            "cpu",
        ),
    )


def template_as_a_prompt(place, canary):
    (place / "prompts.jsonl").write_text(json.dumps({"prompt": "{{ cycler.__init__ }}"}))
    return (
        lambda: render(template_payload(canary)),
        0,
        ("sample", "--model", "m", "--prompts", "prompts.jsonl", "--max_new_tokens", "2", "--device", "cpu"),
    )


def code_in_toml(place, canary):
    text = python_payload(canary)
    (place / "evil.toml").write_text(f"[data]\ninit_from = {json.dumps('!!python/' + text)}\n")
    return lambda: runpy.run_path(written(place / "x.py", text)), 2, ("pretrain", "evil.toml", "--device", "cpu")


def text_for_data_process(suffix: str, content):
    def plant(place, canary):
        (place / f"evil{suffix}").write_bytes(content(canary))
        return (
            lambda: pickle.loads(pickle.dumps(Payload(canary))),
            (0, 2),
            ("data_process", "--input", f"evil{suffix}", "--vocab_size", "300", "--out_dir", "d"),
        )

    plant.__name__ = f"data_process_{suffix.strip('.')}"
    return plant


def extension_type_in_parquet(place, canary):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    held = pickle.dumps(Payload(canary))  # CVE-2023-47248: old versions unpickled this
    field = pa.field(
        "text",
        pa.string(),
        metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": held},
    )
    pyarrow.parquet.write_table(
        pa.table([[f"天下大势{n}" for n in range(50)]], schema=pa.schema([field])), place / "evil.parquet"
    )
    return (
        lambda: pickle.loads(held),
        (0, 2),
        ("data_process", "--input", "evil.parquet", "--vocab_size", "300", "--out_dir", "d"),
    )


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def zipped(canary: Path) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("../../canary", b"x")
        archive.writestr("evil.pkl", pickle.dumps(Payload(canary)))
    return held.getvalue()


DATA = [
    npy_as_bin,
    pickle_as_sidecar,
    template_in_a_chat,
    template_as_a_prompt,
    code_in_toml,
    extension_type_in_parquet,
    *(
        text_for_data_process(suffix, content)
        for suffix, content in {
            ".pkl": lambda c: pickle.dumps(Payload(c)),
            ".pt": lambda c: pickle.dumps({"a": Payload(c)}),
            ".npy": lambda c: (
                b"\x93NUMPY\x01\x00v\x00"
                + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117)
                + b"\n"
                + pickle.dumps(Payload(c))
            ),
            ".jsonl": lambda c: json.dumps({"text": template_payload(c)}).encode() + b"\n",
            ".yaml": lambda c: f"!!python/object/apply:os.system [\"echo > '{c}'\"]".encode(),
            ".zip": zipped,
        }.items()
    ),
]


@pytest.mark.parametrize("plant", DATA, ids=lambda f: f.__name__)
def test_no_data_or_option_file_runs_anything(place, command, plant):
    canary = place / "canary"
    careless, expected, words = plant(place, canary)
    set_free(careless, canary)
    code, lines = command(*words)
    assert code in (expected if isinstance(expected, tuple) else (expected,)), lines
    assert not canary.exists() and not (place.parent / "canary").exists() and not (place.parents[1] / "canary").exists()
    assert code == 0 or (len(lines) >= 1 and lines[-1].startswith("error: ")), lines
    assert not any("Traceback" in line for line in lines)


def test_the_gallery_is_large_enough():
    assert len(REFUSED) >= 11 and len(REFUSED) + len(HARMLESS) + len(DATA) >= 30


# ---------------------------------------------------------------- sizes that lie


def measured(action) -> tuple[str, float, float]:
    """(what an action that must be refused says, seconds, MB its memory grew at most), in a process of its own."""

    def child(end):
        def kib(field: str) -> int:
            return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

        gc.freeze()  # pytest's many objects are not the command's to look through
        before, began = kib("VmRSS"), time.monotonic()
        try:
            action()
            said = "nothing"
        except UserError as e:
            said = f"UserError: {e}"
        except BaseException as e:
            said = repr(e)
        end.send((said, time.monotonic() - began, (kib("VmHWM") - before) / 1024))

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see how much memory a process used")
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(60), "no answer"
    result = ours.recv()
    process.join()
    return result


def entry(begin, end, shape="[1]", dtype="F32") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


JSON = files.JSON_BYTES
HEADERS = {
    "empty": "{}",
    "a list": "[]",
    "product of the shape overflows": '{"a":' + entry(0, 4, "[4294967296,4294967296]") + "}",
    "2^63 elements": '{"a":' + entry(0, 4, "[9223372036854775808]") + "}",
    "more than 64 bits": '{"a":' + entry(0, 4, "[36893488147419103232]") + "}",
    "negative shape": '{"a":' + entry(0, 4, "[-1]") + "}",
    "fraction": '{"a":' + entry(0, 4, "[1.5]") + "}",
    "shape is text": '{"a":' + entry(0, 4, '"1"') + "}",
    "overlap": '{"a":' + entry(0, 4) + ',"b":' + entry(2, 6) + "}",
    "the same bytes twice": '{"a":' + entry(0, 4) + ',"b":' + entry(0, 4) + "}",
    "hole": '{"a":' + entry(0, 4) + ',"b":' + entry(8, 12) + "}",
    "out of the file": '{"a":' + entry(0, 1 << 40, f"[{1 << 38}]") + "}",
    "backwards": '{"a":' + entry(4, 0) + "}",
    "huge offsets": '{"a":' + entry((1 << 64) - 5, (1 << 64) - 1) + "}",
    "size and shape differ": '{"a":' + entry(0, 4, "[2]") + "}",
    "one name twice": '{"a":' + entry(0, 4) + ',"a":' + entry(0, 4) + "}",
    "unknown dtype": '{"a":' + entry(0, 4, dtype="F31") + "}",
    "dtype of a class": '{"a":' + entry(0, 4, dtype="__class__") + "}",
    "NaN": '{"a":NaN}',
    "nested": '{"a":' + "[" * 100_000,
    "nested in the metadata": '{"__metadata__":' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
    "lists": '{"a":[' + "[]," * (JSON // 3 - 4) + "[]]}",
    "objects": '{"a":[' + "{}," * (JSON // 3 - 4) + "{}]}",
    "one long number": '{"a":' + "9" * (JSON - 10) + "}",
    "many keys": "{" + ",".join(f'"{k:x}":0' for k in range(JSON // 11)) + "}",
    "many empty tensors": "{" + ",".join(f'"{k:x}":' + entry(0, 0, "[0]") for k in range(JSON // 64)) + "}",
    "many dimensions": '{"a":' + entry(0, 0, "[" + "0," * (JSON // 2 - 100) + "0]") + "}",
    "named like Python's own": "{"
    + ",".join(f'"{n}":' + entry(0, 0, "[0]") for n in ("__class__", "model.__dict__"))
    + "}",
    "layers by the million": "{"
    + ",".join(f'"model.layers.{k}.a":' + entry(0, 0, "[0]") for k in range(JSON // 80))
    + "}",
}


@pytest.mark.parametrize("length", [100 << 20, (100 << 20) - 8, 1 << 63, (1 << 64) - 1, JSON + 1])
def test_a_header_that_claims_to_be_huge_is_refused_unread(place, length):
    with open("m/model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", length) + b'{"a":[')
        f.truncate(200 << 20)
    said, seconds, megabytes = measured(lambda: load_model("m"))
    assert "UserError" in said and "header would take" in said
    assert seconds < 1 and megabytes < 10, (seconds, megabytes)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_refused_in_a_second_and_200_megabytes(place, header):
    data = b"" if "[0]" in header or ",0," in header else bytes(16)
    Path("m/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    said, seconds, megabytes = measured(lambda: load_model("m"))
    print(said[:150], f"{seconds:.2f} s, {megabytes:.0f} MB")
    assert said.startswith("UserError: m/"), said[:300]
    # A header that lies is refused at once; one with tensors by the ten thousand is well-formed, and its library slow.
    assert seconds < (1 if len(header) < 1 << 20 else 3) and megabytes < 200, (seconds, megabytes)


def config_text(**changes) -> bytes:
    config = json.loads(Path("m/config.json").read_text()) | changes
    return json.dumps(config).encode()


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)
CONFIGS = {
    **{
        f"{name} {value!r}": (lambda name=name, value=value: config_text(**{name: value}))
        for name in SIZES
        for value in (10**9, 10**400, -1, "32", 1.5, True, [32], {"a": 1})
    },
    **{
        f"{name} {value!r:.20}": (lambda name=name, value=value: config_text(**{name: value}))
        for name in ("rms_norm_eps", "rope_theta")
        for value in (0, -1.0, "1", True, 10**400, [1.0])
    },
    "NaN": lambda: config_text(rms_norm_eps=float("nan")),
    "infinity": lambda: config_text(rope_theta=float("inf")),
    "1e999": lambda: config_text(rope_theta="@").replace(b'"@"', b"1e999"),
    "1000 layers": lambda: config_text(num_hidden_layers=1000),
    "wide": lambda: config_text(hidden_size=1 << 20, head_dim=1 << 18, intermediate_size=1 << 24),
    "large vocabulary": lambda: config_text(vocab_size=1 << 24),
    "a key twice": lambda: config_text()[:-1] + b', "hidden_size": 64}',
    "a million keys": lambda: b"{" + b",".join(b'"%d":0' % k for k in range(10**6)) + b"}",
    "as many keys as fit": lambda: b"{" + b",".join(b'"%x":0' % k for k in range(JSON // 11)) + b"}",
    "100 MB": lambda: b" " * (100 << 20),
    "deep": lambda: b'{"a":' * 10**5,
    "deep lists": lambda: b"[" * 10**5 + b"]" * 10**5,
    "not UTF-8": lambda: b"\xff\xfe{}",
    "nothing": lambda: b"",
    "a list": lambda: b"[]",
    "no keys": lambda: b"{}",
    "rope is a list": lambda: config_text(rope_parameters=[1]),
    "rope is text": lambda: config_text(rope_parameters="default"),
    "rope_theta within": lambda: config_text(rope_theta=None, rope_parameters={"rope_theta": "@"}),
    "scaling": lambda: config_text(rope_scaling={"a": ["x"] * 1000}),
    "family is a list": lambda: config_text(model_type=["llama"] * 1000),
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_config_is_refused_before_anything_is_allocated(place, content):
    Path("m/config.json").write_bytes(content())
    said, seconds, megabytes = measured(lambda: load_model("m"))
    assert said.startswith("UserError: m/") and len(said) < 2500, said[:3000]
    assert seconds < 1 and megabytes < 60, (said, seconds, megabytes)


@pytest.mark.parametrize("name", ["run.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"[",
        b"[" * 10**5,
        b"1",
        b'{"weight_map": 1, "chat_format": {}}',
        b" " * (3 << 20),
        b"\xff",
        b'{"weight_map": {"a": ["x.bin"]}, "chat_format": 7}',
        b'{"weight_map": {}, "chat_format": true}',
    ],
)
def test_a_hostile_json_file_is_one_clear_error(place, command, name, content):
    if name != "run.json":
        os.remove("m/model.safetensors")
    Path("m", name).write_bytes(content)
    assert name in refused(command(*ways_to_a_model()[0]))


BAD_NAMES = [
    "../../etc/passwd",
    "../m/a.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "sub/a.safetensors",
    "a\0.safetensors",
    "x" * 300,
    "link.safetensors",
    "a.bin",
    "a.txt",
    "folder.safetensors",
    "nowhere.safetensors",
    7,
    None,
    ["a.safetensors"],
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda n: repr(n)[:20])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_reaches_only_plain_files_of_its_folder(place, command, kind, name):
    state = weights_of(place / "m")
    suffix = Path(kind).suffix
    if isinstance(name, str) and suffix == ".bin":
        name = name.replace("a.bin", "a.safetensors") if name == "a.bin" else name.replace(".safetensors", ".bin")
    for there in (
        f"m/a{suffix}",
        f"outside{suffix}",
        f"m/a.{'bin' if suffix == '.safetensors' else 'safetensors'}",
        "m/a.txt",
    ):
        save_file(state, there) if "safe" in there else torch.save(state, there)
    os.symlink(place / f"outside{suffix}", f"m/link{suffix}")
    os.makedirs(f"m/folder{suffix}")
    index = {"weight_map": dict.fromkeys(state, f"a{suffix}")}
    Path(f"m/{kind}.index.json").write_text(json.dumps(index))
    way = [*ways_to_a_model()[0], "--allow_pickle"]
    assert command(*way)[0] == 0, "the index itself is sound"
    index["weight_map"]["model.norm.weight"] = name
    Path(f"m/{kind}.index.json").write_text(json.dumps(index))
    line = refused(command(*way))
    missing = isinstance(name, str) and name.split(".")[0] in ("folder", "nowhere")
    assert ("No such file" if missing else "is not a plain file name") in line


def test_a_name_that_stands_twice_in_a_sound_header_is_refused(place):
    whole = Path("m/model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    (name, value), *_ = [(k, v) for k, v in json.loads(whole[8:end]).items() if k != "__metadata__"]
    twice = whole[8:end].rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(value)}}}".encode()
    Path("m/model.safetensors").write_bytes(struct.pack("<Q", len(twice)) + twice + whole[end:])
    load_file("m/model.safetensors")  # the library takes one of the two
    with pytest.raises(UserError, match="a key occurs twice"):
        load_model("m")


def test_one_tensor_in_two_shards_is_refused(place):
    state = weights_of(place / "m")
    save_file(state, "m/a.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"] + 1}, "m/b.safetensors")
    index = {"weight_map": dict.fromkeys(state, "a.safetensors") | {"model.norm.weight": "b.safetensors"}}
    Path("m/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.norm\.weight is in another"):
        load_model("m")


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_to_a_weights_file_is_more_than_a_refusal(place, seed):
    rng = random.Random(seed)
    sound = {
        "m/model.safetensors": Path("m/model.safetensors").read_bytes(),
        "m/config.json": Path("m/config.json").read_bytes(),
    }
    state = load_file("m/model.safetensors")
    torch.save(state, "pickled")
    sound["m/pytorch_model.bin"] = Path("pickled").read_bytes()
    for _ in range(400):
        name = rng.choice(list(sound))
        held = bytearray(sound[name])
        edge = rng.choice([300, 3000, len(held)])  # headers more often than numbers
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(min(edge, len(held)))
            if rng.random() < 0.6:
                held[at] = rng.choice([held[at] ^ 1 << rng.randrange(8), 0, 255, ord("9"), ord("-"), ord("[")])
            elif rng.random() < 0.5:
                del held[at : at + rng.choice([1, 8, 1000])]
            else:
                held[at:at] = held[at : at + rng.choice([1, 8, 1000])]
        for path in Path("m").glob("*model.*"):
            if path.name != "tokenizer.model":
                path.unlink()
        Path(name).write_bytes(held)
        if name == "m/config.json":
            Path("m/model.safetensors").write_bytes(sound["m/model.safetensors"])
        try:
            loaded = load_model("m", allow_pickle=True)
            assert all(p.isfinite().all() for p in loaded.parameters())
        except UserError:
            pass
        Path("m/config.json").write_bytes(sound["m/config.json"])


# ---------------------------------------------------------------- weights of other projects


def same_weights(loaded: Llama, state: dict) -> bool:
    return all(torch.equal(p, state[n].float()) for n, p in loaded.named_parameters())


def sharded(state: dict, folder: Path) -> None:
    names = sorted(state)
    for k in range(2):
        torch.save({n: state[n] for n in names[k::2]}, folder / f"pytorch_model-{k}.bin")
    index = {"weight_map": {n: f"pytorch_model-{k % 2}.bin" for k, n in enumerate(names)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


WRITERS = {
    "bin": lambda state, folder: torch.save(state, folder / "pytorch_model.bin"),
    "pt": lambda state, folder: torch.save(state, folder / "weights.pt"),
    "pth": lambda state, folder: torch.save(state, folder / "weights.pth"),
    "before torch 1.6": lambda state, folder: torch.save(
        state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "half": lambda state, folder: torch.save({k: v.half() for k, v in state.items()}, folder / "weights.pt"),
    "parameters": lambda state, folder: torch.save(
        {k: torch.nn.Parameter(v) for k, v in state.items()}, folder / "weights.pt"
    ),
    "shards": sharded,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_pickled_weights_are_read_where_the_user_allows_it_and_only_there(place, command, write):
    state = weights_of(place / "m")
    write(state, place / "m")
    loaded = load_model("m", allow_pickle=True)
    assert same_weights(loaded, {k: v.half() for k, v in state.items()} if write is WRITERS["half"] else state)
    for way in ways_to_a_model():
        assert "--allow_pickle" in refused(command(*way))
        assert command(*way, "--allow_pickle", *(["--out_dir", "out/x"] if way[0] == "pretrain" else []))[0] == 0


@pytest.mark.parametrize("version", ["2.5.1", "2.6.0", "2.9.1+cu128", "2.10.0a0"])
def test_a_torch_whose_unpickler_has_a_known_hole_reads_no_pickle(place, monkeypatch, version):
    WRITERS["bin"](weights_of(place / "m"), place / "m")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    with pytest.raises(UserError, match=r"needs torch 2\.10"):
        load_model("m", allow_pickle=True)


def test_an_environment_variable_does_not_open_the_unpickler(place, monkeypatch):
    zip_pickle(place / "m", place / "canary")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="more than weights"):
        load_model("m", allow_pickle=True)
    assert not (place / "canary").exists()


STRANGE = {
    "a list": lambda state: list(state.values()),
    "one tensor": lambda state: state["model.norm.weight"],
    "a training state": lambda state: {"model": state, "step": 3},
    "numbers as names": lambda state: dict(enumerate(state.values())),
    "sparse": lambda state: state | {"model.norm.weight": state["model.norm.weight"].to_sparse()},
    "meta": lambda state: state | {"model.norm.weight": state["model.norm.weight"].to("meta")},
    "quantised": lambda state: (
        state | {"model.norm.weight": torch.quantize_per_tensor(state["model.norm.weight"], 0.1, 0, torch.qint8)}
    ),
    "integers": lambda state: state | {"model.norm.weight": state["model.norm.weight"].int()},
    "complex": lambda state: state | {"model.norm.weight": state["model.norm.weight"].to(torch.complex64)},
    "eight bits": lambda state: state | {"model.norm.weight": state["model.norm.weight"].to(torch.float8_e4m3fn)},
    "NaN": lambda state: state | {"model.norm.weight": torch.full((32,), float("nan"))},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE)
def test_a_pickle_of_something_else_than_plain_weights_is_refused(place, change):
    torch.save(change(weights_of(place / "m")), "m/weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt: "):
        load_model("m", allow_pickle=True)


def test_two_candidates_for_the_weights_are_asked_about(place):
    torch.save(weights_of(place / "m"), "m/a.pt")
    torch.save({}, "m/b.pth")
    with pytest.raises(UserError, match=r"a\.pt or b\.pth\?"):
        load_model("m", allow_pickle=True)


def test_tensors_of_a_pickle_that_share_their_memory_are_taken_apart(place):
    state = weights_of(place / "m")
    one = torch.zeros(1)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"):
        state[name] = one.expand(state[name].shape)
    torch.save(state, "m/weights.pt")
    loaded = load_model("m", allow_pickle=True)
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight[0, 0] = 1.0
    assert (
        loaded.model.layers[0].mlp.up_proj.weight.sum() == 1 and not loaded.model.layers[0].mlp.gate_proj.weight.any()
    )


def test_a_pickle_that_claims_more_than_it_holds_is_refused_before_it_is_copied(place):
    state = weights_of(place / "m")
    wide = {n: torch.zeros(1).expand([s << 9 for s in t.shape]) for n, t in state.items()}
    torch.save(wide, "m/weights.pt")
    config = json.loads(Path("m/config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"):
        config[name] <<= 9
    Path("m/config.json").write_text(json.dumps(config))
    said, seconds, megabytes = measured(lambda: load_model("m", allow_pickle=True))
    assert "describes" in said and seconds < 2 and megabytes < 60, (said, seconds, megabytes)


def test_a_compressed_pickle_is_refused_before_it_grows(place):
    torch.save(weights_of(place / "m") | {"zeros": "0" * (200 << 20)}, "large")
    with zipfile.ZipFile("large") as large, zipfile.ZipFile("m/weights.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for member in large.infolist():
            small.writestr(member.filename, large.read(member))
    assert os.path.getsize("m/weights.pt") < 1 << 20
    said, _, megabytes = measured(lambda: load_model("m", allow_pickle=True))
    assert "more than weights, or is damaged" in said and megabytes < 60, (said, megabytes)


@pytest.mark.parametrize("write", [lambda state, path: save_file(state, path / "model.safetensors"), WRITERS["bin"]])
def test_loaded_weights_are_our_own_whatever_becomes_of_the_file(place, write):
    state = weights_of(place / "m")
    write(state, place / "m")
    (path,) = [p for p in Path("m").iterdir() if p.name in ("model.safetensors", "pytorch_model.bin")]
    loaded = load_model("m", allow_pickle=True)
    with open(path, "r+b") as f:  # as `cp` over it would
        f.write(b"\x01" * path.stat().st_size)
    assert same_weights(loaded, state)
    before = path.read_bytes()
    with torch.no_grad():
        loaded.model.norm.weight.zero_()
    assert path.read_bytes() == before


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_no_numbers_are_refused_at_load_and_never_saved(place, value, dtype):
    rng = random.Random(0)
    state = {k: v.to(dtype) for k, v in weights_of(place / "m").items()}
    for name in state:
        at = rng.randrange(state[name].numel())
        spoilt = {k: v.clone() for k, v in state.items()}
        spoilt[name].view(-1)[at] = float(value)
        Path("m/model.safetensors").write_bytes(save(spoilt))
        with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
            load_model("m")
        Path("m/model.safetensors").write_bytes(save(state))
        model = load_model("m")
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[at] = float(value)
        with pytest.raises(errors.Diverged, match=name):
            hf_folder.save_model(place / "new", model, None, {})
        assert not list(place.glob("new/*"))
