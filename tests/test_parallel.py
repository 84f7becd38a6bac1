"""Promises of the ways to spread training over ranks: the losses of one process, and its files."""

import pytest
import small_run
import torch
from safetensors.torch import load_file
from small_run import SEQ_LEN
from test_trainer import launch, metrics

from assembly.training import choose_strategy
from core.distributed import Ranks
from core.errors import UserError
from extras.parallel.fixed_order import FixedOrder
from trainer import TrainConfig, next_token_loss

STEPS = {"max_steps": 12, "save_every": 6, "eval_every": 6, "micro_batch": 2}
UNTIED = {"model": {"tie_word_embeddings": False}}
WAYS = {
    "zero1": {"parallel": "zero1"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, meta": {"parallel": "fsdp", "meta": True},
    "fsdp, kept": {"parallel": "fsdp", "reshard": False, "gradient_checkpointing": "selective"},
    "fsdp, offloaded": {"parallel": "fsdp", "cpu_offload": True, "meta": True},
    "pipeline": {"parallel": "pipeline", **UNTIED},
    "pipeline, meta": {"parallel": "pipeline", "meta": True, "gradient_checkpointing": "full", **UNTIED},
}


def tensors(folder, step=12):
    found = load_file(folder / f"checkpoint-{step}/model.safetensors")
    return found | load_file(folder / f"checkpoint-{step}/optimizer.safetensors")


def close(a, b, rel=1e-6):
    assert len(a) == len(b) > 0
    return all(abs(x - y) <= rel * abs(x) for x, y in zip(a, b))


def same_bits(a, b):
    assert a.keys() == b.keys() and len(a) > 20
    return all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.heavy
@pytest.mark.parametrize("way", WAYS)
def test_every_way_reaches_the_losses_of_one_process_and_writes_its_files(tmp_path, way):
    options = STEPS | WAYS[way]
    launch(1, tmp_path / "one", **STEPS, **{k: v for k, v in options.items() if k == "model"})
    launch(2, tmp_path / "two", **options)
    for key in ("loss", "val_loss", "grad_norm"):
        assert close(
            metrics(tmp_path / "one", key), metrics(tmp_path / "two", key), 1e-5 if key == "grad_norm" else 1e-6
        ), key
    assert metrics(tmp_path / "one", "targets") == metrics(tmp_path / "two", "targets")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(a.shape == two[n].shape and torch.allclose(a, two[n], rtol=1e-3, atol=1e-6) for n, a in one.items())
    assert {p.name for p in (tmp_path / "one").iterdir()} | {"seen-1.json"} == {
        p.name for p in (tmp_path / "two").iterdir()
    } | {"seen-1.json"}


@pytest.mark.heavy
@pytest.mark.parametrize("way", ["zero1", "fsdp", "pipeline"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_of_any_way_is_resumed_by_any_other(tmp_path, way, optimizer):
    """One process, then two ranks, then one process again: the losses of an unbroken run."""
    options = STEPS | UNTIED | {"optimizer": optimizer, "save_every": 4, "min_lr": 3e-3}  # constant: whatever max_steps
    launch(1, tmp_path / "one", **options)
    launch(1, tmp_path / "in turns", **options | {"max_steps": 4})
    launch(2, tmp_path / "in turns", **options | {"max_steps": 8, "parallel": way, "meta": way != "zero1"})
    launch(1, tmp_path / "in turns", **options)
    assert metrics(tmp_path / "in turns", "targets") == metrics(tmp_path / "one", "targets")
    assert close(metrics(tmp_path / "one"), metrics(tmp_path / "in turns"), 3e-5)


@pytest.mark.heavy
def test_a_fixed_order_of_sums_gives_the_same_bits_on_one_two_and_four_ranks_and_between(tmp_path):
    """Six micro-batches a step on one and two ranks are no power of two: the tree is ragged."""
    for rows, ranks in ((16, (1, 2, 4)), (12, (1, 2))):
        options = STEPS | {"deterministic": True, "batch_tokens": rows * SEQ_LEN, "min_lr": 3e-3, "save_every": 4}
        for n in ranks:
            launch(n, tmp_path / f"{rows} on {n}", **options)
            assert same_bits(tensors(tmp_path / f"{rows} on {n}"), tensors(tmp_path / f"{rows} on 1"))
    options["batch_tokens"] = 16 * SEQ_LEN
    for steps, n in ((4, 1), (8, 2), (10, 4), (12, 1)):
        launch(n, tmp_path / "in turns", **options | {"max_steps": steps})
    assert same_bits(tensors(tmp_path / "in turns"), tensors(tmp_path / "16 on 1"))
    # Otherwise the bits differ: the test can fail.
    launch(1, tmp_path / "usual", **options | {"deterministic": False})
    launch(2, tmp_path / "usual on 2", **options | {"deterministic": False})
    assert not same_bits(tensors(tmp_path / "usual"), tensors(tmp_path / "usual on 2"))


def test_sums_are_a_tree_over_the_micro_batches(tmp_path):
    """Against a recursive sum over the gradients of each micro-batch."""
    cfg, ranks = TrainConfig(deterministic=True), Ranks(0, 1, torch.device("cpu"))
    for number in (1, 2, 3, 6, 7):
        model = small_run.small_model()
        strategy = FixedOrder(model, (), cfg, ranks, torch.float32)
        rows = small_run.bin_rows(tmp_path)
        batches = [rows.batch([2 * m, 2 * m + 1]) for m in range(number)]
        leaves = []
        for b in batches:
            next_token_loss(model, b).backward()
            leaves.append([p.grad for p in model.parameters()])
            model.zero_grad()

        def tree(leaves):
            if len(leaves) == 1:
                return leaves[0]
            half = 1 << (len(leaves) - 1).bit_length() - 1  # the largest power of two below
            return [a + b for a, b in zip(tree(leaves[:half]), tree(leaves[half:]))]

        for m, b in enumerate(batches):
            with strategy.sync(last=m == number - 1):
                next_token_loss(strategy.module, b).backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), tree(leaves)))


@pytest.mark.parametrize(
    ("options", "ranks", "says"),
    [
        ({"deterministic": True, "parallel": "fsdp"}, 2, "deterministic"),
        ({"deterministic": True}, 3, "3 ranks"),
        ({"parallel": "pipeline"}, 1, "a rank for each stage"),
        ({"parallel": "pipeline"}, 2, "tied"),
    ],
)
def test_what_does_not_go_together_is_refused(options, ranks, says):
    with pytest.raises(UserError, match=says):
        cfg, among = TrainConfig(**options), Ranks(0, ranks, torch.device("cpu"))
        choose_strategy(cfg, among)(small_run.small_model(), (), cfg, among, torch.float32)
    with pytest.raises(ValueError, match="ddp, zero1, fsdp, pipeline"):
        TrainConfig(parallel="ddpp")


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("way", ["fsdp", "pipeline"])
def test_parts_of_a_model_train_in_half_precision_to_the_loss_of_fp32(tmp_path, way, dtype):
    options = STEPS | {"max_steps": 30, "eval_every": 30} | (UNTIED if way == "pipeline" else {})
    launch(1, tmp_path / "one", **options)
    launch(2, tmp_path / "two", **options, parallel=way, dtype=dtype)
    assert metrics(tmp_path / "two", "val_loss") == pytest.approx(metrics(tmp_path / "one", "val_loss"), rel=0.01)
    assert {t.dtype for t in tensors(tmp_path / "two", 30).values()} == {torch.float32}


@pytest.mark.heavy
def test_ranks_stay_together_when_the_best_model_cannot_be_written(tmp_path):
    """The first rank alone sees the full disk; if the others thought the model was there, they would wait for ever."""
    launch(
        2,
        tmp_path / "run",
        parallel="fsdp",
        no_room_for_models=1,
        max_steps=3,
        eval_every=1,
        save_every=3,
        lr=3.0,
        grad_clip=0.0,
    )
    losses = metrics(tmp_path / "run", "val_loss")
    assert losses[1] > losses[0]  # not better than the one that could not be written, and the first that can
    assert (tmp_path / "run/log.txt").read_text().count("the best model could not be saved") == 1
    assert (tmp_path / "run/model.safetensors").exists()
