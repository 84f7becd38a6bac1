"""A training run put together: options, ranks, a model to begin with, the wings that the options ask for, the loop.

In:  a command's options and its Task. Out: a finished run.
The one place where training commands meet the wings. A wing is imported only where its section is named.
"""

import dataclasses
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import trainer
from assembly.models import open_model
from core import config, distributed, hf_folder
from core.checkpoint import WholeModel
from core.distributed import Ranks
from core.errors import UserError
from core.memory import save_memory
from core.optim import OptimConfig
from core.parallel import DDP, Strategy
from model import Llama, ModelConfig
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer
from trainer import Task, TrainConfig

WINGS = {
    "lora": "extras.finetune.lora:LoraConfig",
    "long": "extras.finetune.longlora:LongConfig",
    "track": "extras.tracking.trackers:TrackConfig",
    "estimate": "extras.estimate.report:EstimateConfig",
}


def load_options(doc: str, sections: dict[str, type | str], default: str, wings: Iterable[str] = tuple(WINGS)):
    """The options of a training command: its own sections, those of the loop, and those of its wings."""
    sections = sections | {"optim": OptimConfig, "train": TrainConfig} | {name: WINGS[name] for name in wings}
    cfg = config.load(doc, sections, sys.argv[1:], default)
    # A wing that this command does not have is as one that nobody asked for.
    return SimpleNamespace(**dict.fromkeys(WINGS) | vars(cfg))


def join_ranks(cfg) -> Ranks:
    """This process among those that torchrun has started."""
    return distributed.start(cfg.train.device, cfg.train.timeout_s)


# ---------------------------------------------------------------- what a run begins with


@dataclass(frozen=True)
class Base:
    """The model that a run begins with.

    Attributes:
        model: on the meta device.
        weights: (name, values) of each of its weights, to be read once.
        folder: where it comes from; None: it is new.
        identity: what a resumed run must share.
        about: plain data of its folder's run.json.
        intro: lines for the log.
        saver: how the trained model becomes files.
        context: positions to train on, where its config says fewer; 0: as many as that says.
    """

    model: Llama
    weights: Iterable[tuple[str, Tensor]]
    tokenizer: Tokenizer
    folder: Path | None
    identity: dict
    about: dict = dataclasses.field(default_factory=dict)
    intro: tuple[str, ...] = ()
    saver: WholeModel = dataclasses.field(default_factory=WholeModel)
    context: int = 0


def open_base(folder: str, allow_pickle: bool = False) -> Base:
    """A model folder to go on from, with its tokenizer."""
    # A run that was cut short has no finished model: its newest whole checkpoint serves.
    path = hf_folder.model_folder(folder)
    tokenizer, opened = load_tokenizer(path), open_model(path, allow_pickle)
    hf_folder.check_tokenizer(path, opened.model, tokenizer)
    identity = {"tokenizer": tokenizer.sha256, "base": opened.digest}
    return Base(opened.model, opened.weights, tokenizer, path, identity, hf_folder.load_about(path))


def open_chat_base(folder: str, chat_format: str) -> tuple[Base, str]:
    """A chat model to go on from, and its chat format; chat_format "auto" is the model's own."""
    base = open_base(folder)
    chat_format = base.about.get("chat_format") if chat_format == "auto" else chat_format
    if not chat_format:
        raise UserError(f"{base.folder}: a base model has no way to answer", "python sft.py first, or --chat_format")
    return base, chat_format


def new_base(sizes: ModelConfig, kin, tokenizer: Tokenizer, seed: int) -> Base:
    """A model of these sizes with fresh weights and the tokenizer's vocabulary.

    Args:
        kin: KinOptions, or None for a plain Llama.
    """
    # A larger vocabulary than the tokenizer's is allowed: its size may be rounded up for the sake of the products.
    size = sizes.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        said = f"vocab_size {size} is smaller than the tokenizer's {tokenizer.vocab_size}"
        raise UserError(said, "--vocab_size 0 takes the tokenizer's")
    model = new_model(sizes, kin, size)
    # The generator reads names and shapes from a model of its own: a pipeline takes layers out of the other.
    weights = new_model(sizes, kin, size).weights_at_birth(seed)
    return Base(model, weights, tokenizer, None, {"tokenizer": tokenizer.sha256, "base": ""})


def new_model(sizes: ModelConfig, kin, vocab_size: int) -> Llama:
    """A model on the meta device: shapes without memory."""
    # On the meta device a model of any size takes no memory; the strategy gives it some where it will be trained.
    known = dataclasses.asdict(sizes) | {"vocab_size": vocab_size}
    with torch.device("meta"):
        if kin is None:
            return save_memory(Llama(ModelConfig(**known)))
        from extras.families.llama_kin import Kin, KinConfig

        try:
            return save_memory(Kin(KinConfig(**known, **dataclasses.asdict(kin))))
        except ValueError as e:
            raise UserError(f"[kin] {e}") from None


def adapt(base: Base, cfg) -> Base:
    """The base as the options [long] and [lora] want it: a longer context, small matrices beside its weights."""
    # First the positions, then LoRA: its matrices stand beside the products of the model as it will be.
    changes = {}
    if cfg.long is not None:
        base, changes = reach_further(base, cfg.long)
    if cfg.lora is not None and cfg.lora.r:
        from extras.finetune import lora

        base = lora.tune(base, cfg, changes)
    return base


def reach_further(base: Base, cfg) -> tuple[Base, dict]:
    """A base with a longer context, and what changed in its config."""
    from extras.families import llama_kin
    from extras.finetune import longlora

    if cfg.context and base.folder is None:
        raise UserError("context: a new model has max_position_embeddings", "--init_from DIR")
    # Scaled positions are what Llama's kin have: the model becomes one of them, with the same weights.
    changes = longlora.plan(base.model.config, llama_kin.rope_type(base.model.config), cfg)
    model = llama_kin.change(base.model, changes) if changes else base.model
    model = longlora.shift(model) if cfg.shifted else model
    identity = {"long": changes | {"shifted": cfg.shifted}} if changes or cfg.shifted else {}
    return replace(base, model=model, identity=base.identity | identity, context=cfg.context), changes


# ---------------------------------------------------------------- the run


def estimate_without_data(cfg, ranks: Ranks) -> bool:
    """With --dry_run --tokens, on a new model of known sizes: print the estimate, which needs no data."""
    asked = cfg.estimate
    if asked is None or not (asked.dry_run and asked.tokens and cfg.model.vocab_size) or cfg.data.init_from:
        return False
    from extras.estimate import report

    model = new_model(cfg.model, cfg.kin, cfg.model.vocab_size)
    print(report.describe_run(model, cfg, None, cfg.data.seq_len or cfg.model.max_position_embeddings, ranks))
    return True


def run(task: Task, cfg, ranks: Ranks) -> None:
    """Train, or with --dry_run say what training would take."""
    if is_dry_run(cfg):
        from extras.estimate import report

        return print(report.describe_run(task.model, cfg, task.rows, task.rows.seq_len, ranks))
    if cfg.train.parallel == "pipeline" and task.loss is not trainer.next_token_loss:
        raise UserError('parallel = "pipeline" trains on next tokens only', "--parallel fsdp")
    # What the options were goes into the log and into run.json: a run explains itself.
    expected = expect_memory(task, cfg, ranks)
    options = config.as_dict(cfg)
    task = replace(task, about=task.about | {"options": options}, intro=(config.show(cfg), *task.intro, *expected))
    # A tracker is closed however the run ends.
    with tracking(cfg, options, ranks) as track:
        trainer.train(task, cfg, ranks, choose_strategy(cfg.train, ranks), track, tracing(cfg.train, ranks))
    ranks.close()


def is_dry_run(cfg) -> bool:
    """Whether the run is only to be estimated."""
    return cfg.estimate is not None and cfg.estimate.dry_run


def choose_strategy(options: TrainConfig, ranks: Ranks) -> type[Strategy]:
    """How the model is put on the ranks. All but the first two are wings."""
    if options.deterministic:
        from extras.parallel.fixed_order import FixedOrder as Chosen
    elif ranks.world == 1 and options.parallel != "pipeline":
        Chosen = Strategy  # nothing to share
    elif options.parallel == "ddp":
        Chosen = DDP
    elif options.parallel == "fsdp":
        from extras.parallel.fsdp import FSDP as Chosen
    elif options.parallel == "zero1":
        from extras.parallel.zero1 import ZeRO1 as Chosen
    else:
        from extras.parallel.pipeline import Pipeline as Chosen
    return Chosen


def expect_memory(task: Task, cfg, ranks: Ranks) -> list[str]:
    """With --max_memory_gb a line on the memory of a step; UserError where it is too much."""
    if not cfg.train.max_memory_gb:
        return []
    if task.loss is not trainer.next_token_loss:
        raise UserError("max_memory_gb knows training on the next token only", "a smaller --micro_batch")
    from extras.estimate import memory

    return [memory.expect(task.model, task.rows, cfg, ranks)]


def tracking(cfg, options: dict, ranks: Ranks):
    """Context of the run: a tracker that gets each record, or None."""
    if cfg.track is None:
        return nullcontext()
    from extras.tracking import trackers

    return trackers.tracking(cfg.track, cfg.train.out_dir, options, ranks.first)


def tracing(options: TrainConfig, ranks: Ranks):
    """log -> context of the steps, which are traced with --profile; it gives what to call after each step."""
    # One rank is enough: all of them do the same work.
    if not options.profile or not ranks.first:
        return lambda log: nullcontext(lambda: None)
    from extras.estimate import profile

    return lambda log: profile.profiled(options.profile, Path(options.out_dir) / "profile", log)
