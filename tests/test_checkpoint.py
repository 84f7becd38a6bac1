"""Run folders: resume bit for bit, damage, locks, foreign folders. Kills are in test_survival.py."""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import small_run
import torch
from kill_runs import assert_equal, state_of
from safetensors.torch import load_file, save_file

from assembly.models import load_model
from core import checkpoint, files, hf_config, hf_folder
from core.data import step_rows
from core.distributed import Ranks
from core.errors import Diverged, Interrupted, StorageError, UserError
from extras.families.llama_kin import KinConfig
from trainer import next_token_loss


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(tmp_path, dtype, optimizer):
    options = {"dtype": dtype, "optimizer": optimizer, "max_steps": 9, "save_every": 4, "keep": 3}
    small_run.run(tmp_path / "a/run", **options)
    small_run.run(tmp_path / "b/run", **options)
    # Take the end away: the run goes on from step 4 in a new process's state.
    for step in (8, 9):
        os.rename(tmp_path / f"b/run/checkpoint-{step}", tmp_path / f"b/old-{step}")
    small_run.run(tmp_path / "b/run", **options)
    assert "resumed from" in (tmp_path / "b/run/log.txt").read_text()
    assert_equal(state_of(tmp_path / "a/run", 9), state_of(tmp_path / "b/run", 9))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, name, damage):
    small_run.run(tmp_path / "run", max_steps=4, save_every=2, val=False)
    path = tmp_path / "run/checkpoint-4" / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    said = []
    run = checkpoint.Run(tmp_path / "run", {}, {}, None)
    assert run.newest(said.append) == tmp_path / "run/checkpoint-2"
    assert len(said) == 1 and "checkpoint-4" in said[0]


def test_leftovers_of_a_kill_are_removed_and_the_last_k_are_kept(tmp_path):
    (tmp_path / "run/.tmp-99-checkpoint-7").mkdir(parents=True)
    (tmp_path / "run/.trash-99-checkpoint-1").mkdir()
    small_run.run(tmp_path / "run", max_steps=8, save_every=2, keep=3, val=False)
    assert hf_folder.checkpoint_steps(tmp_path / "run") == [4, 6, 8]
    assert not list((tmp_path / "run").glob(".t*"))


def test_order_is_by_step_whatever_the_file_times_say(tmp_path):
    small_run.run(tmp_path / "run", max_steps=12, save_every=4, keep=3, val=False)
    os.utime(tmp_path / "run/checkpoint-4", (2e9, 2e9))
    assert checkpoint.Run(tmp_path / "run", {}, {}, None).newest(print).name == "checkpoint-12"


@pytest.mark.parametrize("change", ["seed", "data", "model"])
def test_resuming_another_run_is_refused_with_what_differs(tmp_path, change):
    small_run.run(tmp_path / "run", max_steps=2, val=False)
    options, model = {}, None
    if change == "seed":
        options = {"seed": 2}
    elif change == "data":
        options = {"rows": "chats"}
    else:
        model = small_run.small_model(rope_theta=5e5)
    with pytest.raises(UserError, match=f"cannot be resumed: {change} was .*--resume no"):
        small_run.run(tmp_path / "run", model=model, max_steps=4, val=False, **options)


def test_resume_no_keeps_the_earlier_run_aside(tmp_path):
    small_run.run(tmp_path / "run", max_steps=2, val=False)
    small_run.run(tmp_path / "run", max_steps=1, seed=5, resume="no", val=False)
    assert hf_folder.verify(tmp_path / "run.1/checkpoint-2") is None
    assert hf_folder.checkpoint_steps(tmp_path / "run") == [1]


def test_a_checkpoint_of_another_format_is_refused_with_what_wrote_it(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "FORMAT", 2)  # as a later version would write it
        small_run.run(tmp_path / "run", max_steps=2, save_every=2)
    with pytest.raises(UserError, match=rf"format 2, written with .*{re.escape(torch.__version__)}.*reads 1"):
        small_run.run(tmp_path / "run", max_steps=4)


def test_a_changed_learning_rate_is_told(tmp_path):
    small_run.run(tmp_path / "run", max_steps=2, val=False)
    small_run.run(tmp_path / "run", max_steps=3, lr=5e-3, val=False)
    assert "another optim.lr: was 0.003, now 0.005" in (tmp_path / "run/log.txt").read_text()


def test_an_option_that_an_earlier_version_had_in_another_section_is_not_told(tmp_path):
    now, said = {"train": {"seed": 1}}, []
    then = {"train": {"seed": 1, "of_old": False}, "gone": {"seed": 3}}
    with contextlib.closing(checkpoint.Run(tmp_path / "run", {}, {"options": now}, None)) as run:
        run._tell_options(then, said.append)
        run._tell_options(then | {"train": {"seed": 2}}, said.append)
    assert said == ["resuming with another train.seed: was 2, now 1"]


def test_another_batch_size_goes_on_at_the_next_row(tmp_path):
    seen = []

    def watching(model, batch):
        seen.extend(batch.rows)
        return next_token_loss(model, batch)

    small_run.run(tmp_path / "run", max_steps=3, val=False, loss=watching)
    small_run.run(tmp_path / "run", max_steps=5, batch_tokens=4 * small_run.SEQ_LEN, val=False, loss=watching)
    n = len(small_run.bin_rows(tmp_path))
    assert seen == step_rows(0, 3 * 8 + 2 * 4, n, seed=1)


def test_two_runs_cannot_share_a_folder(tmp_path):
    run = checkpoint.Run(tmp_path / "run", {}, {}, None)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        checkpoint.Run(tmp_path / "run", {}, {}, None)
    run.close()
    checkpoint.Run(tmp_path / "run", {}, {}, None).close()


@pytest.mark.parametrize("error", [28, 5, 30])  # ENOSPC, EIO, EROFS
def test_a_failed_save_is_survived_twice_and_leaves_no_trace(tmp_path, monkeypatch, error):
    real, calls = files.replace, []

    def failing(path, write):
        if "optimizer" in str(path):
            calls.append(path)
            if len(calls) in (2, 3):
                raise OSError(error, os.strerror(error))
        real(path, write)

    monkeypatch.setattr(checkpoint.files, "replace", failing)
    small_run.run(tmp_path / "run", max_steps=5, save_every=1, keep=9, val=False)
    assert hf_folder.checkpoint_steps(tmp_path / "run") == [1, 4, 5]
    assert not list((tmp_path / "run").glob(".tmp*"))
    assert (tmp_path / "run/log.txt").read_text().count("could not be saved") == 2


def test_three_failed_saves_in_a_row_end_with_exit_code_4(tmp_path, monkeypatch):
    small_run.bin_rows(tmp_path)

    def failing(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.files, "replace", failing)
    with pytest.raises(StorageError, match="a checkpoint could not be saved") as caught:
        small_run.run(tmp_path / "run", max_steps=9, save_every=1, val=False, eval_every=99)
    assert caught.value.exit_code == 4


def test_the_last_save_must_succeed(tmp_path, monkeypatch):
    real = files.replace

    def failing(path, write):
        if "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(checkpoint.files, "replace", failing)
    with pytest.raises(StorageError, match="a checkpoint could not be saved: No space left"):
        small_run.run(tmp_path / "run", max_steps=2, save_every=2, val=False)


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path):
    small_run.run(tmp_path / "run", max_steps=6, save_every=2, keep=3, val=False)
    unbroken = state_of(tmp_path / "run", 6)
    small_run.run(
        tmp_path / "run", max_steps=6, save_every=2, keep=3, val=False, resume=str(tmp_path / "run/checkpoint-2")
    )
    assert len(list((tmp_path / "run").glob("set-aside-checkpoint-*"))) == 2
    assert hf_folder.checkpoint_steps(tmp_path / "run") == [2, 4, 6]
    assert_equal(unbroken, state_of(tmp_path / "run", 6))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [s for s in steps if s <= 6] == [1, 2, 3, 4, 5, 6], "no step is recorded twice"


def test_another_optimizer_cannot_take_over_a_checkpoint(tmp_path):
    small_run.run(tmp_path / "run", max_steps=2, val=False)
    with pytest.raises(UserError, match="optimizer was 'adamw', now 'muon'"):
        small_run.run(tmp_path / "run", max_steps=4, val=False, optimizer="muon")


def test_a_validation_that_a_stop_put_off_is_made_up_for(tmp_path, monkeypatch):
    plain, calls = Ranks.sum, []

    def asked_at_step_five(self, t):
        calls.extend([1] * (t.numel() == 3))
        return t + torch.tensor([0, 0, 1.0], dtype=t.dtype) if t.numel() == 3 and len(calls) == 5 else plain(self, t)

    monkeypatch.setattr(Ranks, "sum", asked_at_step_five)
    with pytest.raises(Interrupted):
        small_run.run(tmp_path / "a/run", max_steps=10)
    small_run.run(tmp_path / "a/run", max_steps=10)
    small_run.run(tmp_path / "b/run", max_steps=10)
    losses = [
        [json.loads(line) for line in (tmp_path / f"{r}/run/metrics.jsonl").read_text().splitlines()] for r in "ab"
    ]
    assert [m["val_loss"] for m in losses[0] if "val_loss" in m] == [
        m["val_loss"] for m in losses[1] if "val_loss" in m
    ]
    assert_equal(state_of(tmp_path / "a/run", 10), state_of(tmp_path / "b/run", 10))


def test_files_reach_the_disk_in_the_order_write_fsync_rename_fsync_folder(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)

        def recorded(*args, name=name, real=real):
            target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
            done.append((name, Path(target).name))
            return real(*args)

        monkeypatch.setattr(os, name, recorded)
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is forced to disk")
    small_run.run(tmp_path / "run", max_steps=1, val=False, eval_every=99)
    commit = done.index(("rename", "checkpoint-1"))
    assert done[commit + 1] == ("fsync", "run")
    for name in ("tokenizer.model", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        put = [k for k, d in enumerate(done[:commit]) if d == ("replace", name)][-1]
        assert any(d[0] == "fsync" and d[1].endswith(name) for d in done[:put]), name


class Windows:
    """`os` as it is there: folders cannot be opened, nothing is renamed onto what exists, and what is open stays."""

    name = "nt"

    def __getattr__(self, name):
        if name in (
            "kill",
            "register_at_fork",
        ):  # the first would end the process it asks after, the other is not there
            raise AttributeError(name)
        return getattr(os, name)

    def open(self, path, *flags):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, *flags)

    def rename(self, path, new):
        if os.path.exists(new):
            raise FileExistsError(17, "File exists", str(new))
        self.move(path, new)

    def replace(self, path, new):
        if os.path.isdir(new):
            raise PermissionError(13, "Permission denied", str(new))
        self.move(path, new)

    def move(self, path, new):
        used = [
            os.readlink(f"/proc/self/fd/{n}")
            for n in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{n}")
        ]
        used += [line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()]
        for end in (os.path.realpath(path), os.path.realpath(new)):
            held = [u for u in used if f"{u}/".startswith(f"{end}/")]
            if held:
                raise PermissionError(13, "The process cannot access the file, it is in use", held[0])
        os.replace(path, new)


def test_a_run_saves_resumes_and_publishes_where_windows_rules_hold(tmp_path, monkeypatch):
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc to see which files are in use")
    for module in (files, checkpoint):
        monkeypatch.setattr(module, "os", Windows())
    monkeypatch.setitem(sys.modules, "fcntl", None)
    options = {"save_every": 1, "eval_every": 3, "keep": 2}
    small_run.run(tmp_path / "run", max_steps=4, **options)
    small_run.run(tmp_path / "run", max_steps=9, **options)
    assert "resumed from" in (tmp_path / "run/log.txt").read_text()
    assert "could not be saved" not in (tmp_path / "run/log.txt").read_text()
    assert hf_folder.checkpoint_steps(tmp_path / "run") == [8, 9]
    small_run.run(tmp_path / "other", model=load_model(tmp_path / "run"), max_steps=1, eval_every=1)
    hf_folder.save_model(tmp_path / "run", load_model(tmp_path / "run"), None, {})  # over what was read


def test_a_rate_that_makes_weights_infinite_ends_as_divergence_and_saves_none(tmp_path):
    with pytest.raises(Diverged, match="holds NaN or infinity"):
        small_run.run(tmp_path / "run", lr=1e38, save_every=1, max_steps=6)
    assert not list(tmp_path.glob("run/**/*.safetensors"))


# ---------------------------------------------------------------- folders from elsewhere


def folder_with(tmp_path, **changes) -> Path:
    model = small_run.small_model()
    hf_folder.save_model(tmp_path / "m", model, None, {})
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "delete"}))
    return tmp_path / "m"


def test_a_saved_model_loads_bit_equal(tmp_path):
    model = small_run.small_model()
    loaded = load_model(folder_with(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_tied_weights_load_under_either_name(tmp_path):
    folder = folder_with(tmp_path)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors")
    assert torch.equal(load_model(folder).lm_head.weight, state["lm_head.weight"])


def test_shards_load_and_names_outside_the_folder_are_refused(tmp_path):
    folder = folder_with(tmp_path)
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    os.remove(folder / "model.safetensors")
    save_file({n: state[n] for n in names[::2]}, folder / "a.safetensors")
    save_file({n: state[n] for n in names[1::2]}, folder / "b.safetensors")
    index = {"weight_map": {n: ("a", "b")[k % 2] + ".safetensors" for k, n in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_model(folder).lm_head.weight, state["model.embed_tokens.weight"])
    for bad in ("../b.safetensors", "/etc/passwd", "sub/b.safetensors", ".."):
        index["weight_map"][names[0]] = bad
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="plain file name"):
            load_model(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, "must be"),
        ({"num_hidden_layers": 1000, "hidden_size": 1 << 14, "head_dim": 1 << 12}, "describes"),
        ({"hidden_size": -4}, "must be"),
        ({"hidden_size": "32"}, "not of type int"),
        ({"hidden_size": True}, "not of type int"),
        ({"hidden_size": "delete"}, "missing"),
        ({"rms_norm_eps": 0}, "must be"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"model_type": "gpt2"}, "not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "not of type float"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "long_factor": [1, 2]}}, "not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}, "not of type str"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "from 1 to"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1e300}}, "from 1 to"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "above 1"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding"),
        ({"num_key_value_heads": 3}, "divisible"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_anything_is_allocated(tmp_path, changes, says):
    began = time.monotonic()
    with pytest.raises(UserError, match=says):
        load_model(folder_with(tmp_path, **changes))
    assert time.monotonic() - began < 5


def test_what_a_resumed_run_must_share_names_later_fields_only_where_they_are_used():
    """Runs that began before these fields were there go on."""
    before = {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "attention_bias",
        "tie_word_embeddings",
    }
    assert hf_config.identify(small_run.small_model().config).keys() == before
    kin = {"model_type": "qwen3", "rope_type": "yarn", "rope_factor": 2.0}
    qwen = KinConfig(**dataclasses.asdict(small_run.small_model().config), **kin)
    assert hf_config.identify(qwen).keys() - before == {"model_type", "rope_type", "rope_factor"}


def test_all_mismatches_of_weights_are_listed(tmp_path):
    folder = folder_with(tmp_path)
    state = load_file(folder / "model.safetensors")
    state["extra"] = torch.zeros(1)
    del state["model.norm.weight"]
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(folder)
    for part in (
        "model.norm.weight is missing",
        "extra is unexpected",
        "up_proj.weight has shape (3, 3), expected (48, 32)",
    ):
        assert part in str(caught.value)


def test_nan_in_weights_is_refused_by_name(tmp_path):
    folder = folder_with(tmp_path)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        load_model(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\xff" * 8,
        b"\x00" * 8 + b"{}",
        (100 << 20).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"[]",
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_a_file_that_is_not_safetensors_is_one_clear_error(tmp_path, content):
    folder = folder_with(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(folder)


def test_a_run_cut_short_before_its_first_model_is_found_through_its_checkpoint(tmp_path):
    small_run.run(tmp_path / "run", max_steps=2, save_every=1, val=False)
    os.remove(tmp_path / "run/config.json")
    assert hf_folder.model_folder(tmp_path / "run") == tmp_path / "run/checkpoint-2"
    with pytest.raises(UserError, match="no such model folder"):
        hf_folder.model_folder(tmp_path / "nowhere")


def test_transformers_loads_the_folder_with_equal_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_run.small_model().eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder_with(tmp_path), dtype=torch.float32).eval()
    ids = torch.randint(3, small_run.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() <= 1e-5
