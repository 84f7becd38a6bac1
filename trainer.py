"""The only training loop.

In:  a Task, options, ranks. Out: trained weights in the run's folder, metrics.jsonl.
Knows nothing of text, of what the rows mean, or of how the model is built.

    (one optimizer step)  for each micro-batch: forward, backward;  one sum over ranks;  guard;  clip;  update
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from core import device, files
from core.checkpoint import Run, WholeModel
from core.config import Range, Section
from core.data import Batch, Rows, seed_micro_batch, step_rows
from core.device import Speed, flops_per_token
from core.distributed import Ranks
from core.errors import Interrupted, UserError
from core.guards import Spikes, StopSignals, refuse_non_finite
from core.log import Log
from core.memory import save_memory
from core.optim import LossScale, learning_rate, make_optimizers
from core.parallel import Strategy
from core.validate import validate
from model import Llama


@dataclass(frozen=True)
class TrainConfig(Section):
    out_dir: str = "out/pretrain"
    max_steps: Annotated[int, Range(least=0)] = 0  # optimizer steps; 0: as many as `epochs` take
    epochs: Annotated[float, Range(above=0)] = 1.0  # passes over the data, where max_steps is 0
    # Positions per optimizer step, over all micro-batches and ranks.
    batch_tokens: Annotated[int, Range(least=1)] = 8192
    # At most so many rows in one forward and backward pass on a rank; memory grows with it.
    micro_batch: Annotated[int, Range(least=1)] = 8
    seed: int = 1
    device: str = "auto"  # auto: CUDA where there is one, else CPU
    # Of the matrix products; weights are always kept in fp32.
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False  # torch.compile: a minute or more at the start, faster steps afterwards
    # selective: keep products only; full: a third more work, the least memory.
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    # A step that is expected to need more is refused before it begins; 0: no limit.
    max_memory_gb: Annotated[float, Range(least=0)] = 0.0
    parallel: Literal["ddp", "zero1", "fsdp", "pipeline"] = "ddp"  # over ranks, see core/parallel.py
    reshard: bool = True  # fsdp: give gathered weights back after the forward pass (ZeRO-3); false keeps them (ZeRO-2)
    cpu_offload: bool = False  # fsdp: weights, gradients and moments wait in the host's memory
    deterministic: bool = False  # ddp: the same bits on 1, 2, 4 ... ranks, and each time on a GPU (docs/reliability.md)
    resume: str = "auto"  # auto: from the newest whole checkpoint in out_dir; no: anew; or a checkpoint's path
    save_every: Annotated[int, Range(least=1)] = 500  # steps between checkpoints
    keep: Annotated[int, Range(least=2)] = 2  # checkpoints kept: one is whole while another is deleted
    # Steps between validations; the best model becomes the run folder's.
    eval_every: Annotated[int, Range(least=1)] = 250
    eval_tokens: Annotated[int, Range(least=1)] = 1 << 20  # at most so many validation positions each time
    log_every: Annotated[int, Range(least=1)] = 10  # steps between log lines
    # So many steps, from the fourth on, are traced: out_dir/profile; 0: none.
    profile: Annotated[int, Range(least=0)] = 0
    # So long a rank waits for one that hangs; more than the slowest save or validation takes.
    timeout_s: Annotated[int, Range(least=1)] = 600
    stop_at_spike: bool = False  # end the run when a loss is far above the last 128; false: only a warning


@dataclass(frozen=True)
class Task:
    """What is trained, on what, towards what. A command makes one; assembly/training.py makes all around it.

    Attributes:
        model: on the meta device.
        weights: (name, values) of each of its weights.
        rows: what to train on.
        val_rows: what to validate on, by its source; none: no validation.
        loss: (model, batch) -> sum of the losses of the batch's targets, a scalar.
        tokenizer: saved with the model.
        identity: what a resumed run must share with the one it continues, besides the seed and the training rows.
        about: plain data for run.json.
        intro: lines to log first.
        sample: called after each validation; the text it returns is logged.
        saver: how models become files.
    """

    model: Llama
    weights: Iterable[tuple[str, Tensor]]
    rows: Rows
    val_rows: dict[str, Rows]
    loss: Callable[[nn.Module, Batch], Tensor]
    tokenizer: object
    identity: dict
    about: dict
    intro: tuple[str, ...] = ()
    sample: Callable[[Llama], str] | None = None
    saver: WholeModel = field(default_factory=WholeModel)


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the targets, a scalar in nats: pretraining and fine-tuning alike.

    A sum, not a mean: the loop divides once, by the targets of the whole step over all micro-batches and ranks. A mean
    of each micro-batch, averaged again, would weigh a target in a short answer more than one in a long answer.
    Source of the pitfall: https://unsloth.ai/blog/gradient (transformers had it until 4.46).
    """
    return model(batch.ids, batch.targets, batch.docs).sum()


def train(
    task: Task,
    cfg,
    ranks: Ranks,
    kind: type[Strategy] = Strategy,
    track: Callable[[dict], None] | None = None,
    traced: Callable[[Log], AbstractContextManager] = lambda log: nullcontext(lambda: None),
) -> None:
    """Train until the last step, a stop signal or divergence.

    Args:
        cfg: options with the sections train (TrainConfig) and optim (OptimConfig).
        kind: how the model is put on the ranks.
        track: called on the first rank with each record of metrics.jsonl; must neither raise nor wait.
        traced: log -> context of all steps, which gives what to call after each step.
    Raises:
        Diverged: the loss or gradient is not finite; weights are as before that step.
        Interrupted: SIGTERM or SIGINT came; everything is saved.
        StorageError: checkpoints could not be written three times in a row.
        UserError: the folder belongs to another run, the batch cannot be divided, or the ranks were started unlike.
        RankLost: another rank hangs or has ended.
    """
    # The folder is locked from here on; a second run in it, or one of other data, is refused.
    options, rows = cfg.train, task.rows
    own = {"seed": options.seed, "data": rows.digest, "seq_len": rows.seq_len, "optimizer": cfg.optim.optimizer}
    run = Run(options.out_dir, task.identity | own, task.about, task.tokenizer, options.keep, ranks.first, task.saver)
    aside = run.start_anew() if options.resume == "no" else None
    log = Log(run.folder, ranks.first, track)
    for line in ([f"the earlier run is now {aside}"] if aside else []) + [*task.intro]:
        log(line)
    try:
        _loop(task, cfg, ranks, run, log, kind, traced(log))
    except RuntimeError as e:
        if lost := ranks.lost(e):
            raise lost from e
        raise
    finally:
        log.close()
        run.close()


def _loop(task: Task, cfg, ranks: Ranks, run: Run, log: Log, kind: type[Strategy], traced) -> None:
    options, optim, rows, model = cfg.train, cfg.optim, task.rows, task.model
    # Ranks that were started unlike would compute different things, and wait for each other without end.
    dtype = device.choose_dtype(options.dtype, ranks.device)
    _refuse_unlike_ranks(cfg, ranks, run, (Llama, type(model), kind))

    # The model gets its memory and its weights; with several ranks each holds a copy or a part of it.
    if ranks.device.type == "cpu":
        device.keep_freed_memory()
    speed = Speed(_flops(task), ranks, dtype)
    strategy = kind(save_memory(model, options.gradient_checkpointing), task.weights, options, ranks, dtype)
    per_step, micro, micro_batches = strategy.deal(options.batch_tokens, options.micro_batch, rows.seq_len)
    max_steps = options.max_steps or max(1, round(options.epochs * len(rows) / per_step))
    optimizers = make_optimizers(model, optim)
    strategy.take(optimizers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    scaler = LossScale() if dtype == torch.float16 else None

    # A run that was stopped goes on where it was. Nothing else has to be restored: the order of the rows, dropout and
    # the learning rate are functions of the step.
    ranks.barrier()  # the first rank has cleaned the folder up
    state = run.resume(options.resume, strategy, scaler, log)
    log.rewind(state.step)
    ranks.same(json.dumps([asdict(state), max_steps]), "checkpoint")
    if state.step >= max_steps:
        done = f"{run.folder} is finished at step {state.step} of {max_steps}"
        return log(f"{done}: nothing to do (--resume no starts anew)")
    log(
        f"steps {max_steps}, each {per_step} rows x {rows.seq_len} positions = {micro_batches} micro-batches x "
        f"{strategy.data.world} ranks x {micro} rows; {max_steps * per_step / len(rows):.2f} epochs of {len(rows)} "
        f"rows; {ranks.device}, {str(dtype).removeprefix('torch.')}"
        + f", {options.parallel} on {ranks.world} ranks"
        * (ranks.world > 1)
    )
    if options.profile and max_steps - state.step < options.profile + 3:
        left = f"{max_steps - state.step} are left"
        raise UserError(f"profile = {options.profile} needs {options.profile + 3} steps, {left}")
    # A bar on the terminal; log.txt and metrics.jsonl have the same numbers for later.
    log.progress(max_steps, state.step)
    # Products run in dtype, everything else in fp32: so weights lose nothing by small updates.
    autocast = torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32)
    spikes = Spikes(options.stop_at_spike, log)

    def evaluate_and_publish(last: bool) -> None:
        facts, better = validate(task, options, strategy, autocast, log, state)
        if better and ranks.agree(run.publish(strategy, facts, log, must=last)):
            state.best = facts.get("val_loss")
        state.validated = True

    if not state.validated:  # the run was stopped where a validation was due
        evaluate_and_publish(last=False)
    model.train()
    with StopSignals() as stop, traced as step_done:
        while state.step < max_steps:
            began = time.monotonic()
            # The learning rate is a function of the step: warm-up, then down.
            lr = learning_rate(state.step, max_steps, optim)
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr

            # Each rank takes its own rows of the step: micro-batch m of rank r is the (m * world + r)-th piece. Losses
            # are divided by the step's positions for now (a constant, so that fp16 stays in range).
            indices = step_rows(state.rows_seen, per_step, len(rows), options.seed)
            scale = (scaler.scale if scaler else 1.0) / options.batch_tokens
            totals = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # losses, targets, ranks asked to stop
            for m in range(micro_batches):
                number = m * strategy.data.world + strategy.data.rank
                seed_micro_batch(options.seed, state.step, number)
                batch = rows.batch(indices[number * micro : (number + 1) * micro]).to(ranks.device)
                with strategy.sync(last=m == micro_batches - 1):
                    with autocast:
                        loss = task.loss(strategy.module, batch)
                    (loss * (scale * strategy.averaged_over)).backward()
                totals[:2] += torch.stack([loss.detach().double(), batch.count.double()]) * strategy.weight

            # One small sum over ranks. Now the targets are counted, and the gradient can be divided by them.
            totals[2] = stop.asked
            loss_sum, targets, stops = ranks.sum(totals).tolist()
            mean = loss_sum / max(1.0, targets)
            correction = options.batch_tokens / max(1.0, targets) / (scaler.scale if scaler else 1.0)
            norm = strategy.norm() * correction

            # The guard: NaN and infinity never reach the weights, on any rank.
            finite = math.isfinite(mean) and math.isfinite(norm)
            if finite:
                spikes.see(state.step + 1, mean)
                # A gradient longer than grad_clip is shortened to it; then the optimizers change the weights.
                clipped = min(1.0, optim.grad_clip / (norm + 1e-6)) if optim.grad_clip else 1.0
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], correction * clipped)
                for optimizer in optimizers:
                    optimizer.step()
                strategy.after_step()
            for p in parameters:  # an optimizer may have only some of them
                p.grad = None
            if scaler:
                scaler.update(finite)
            # In fp16 a scale that is too large gives such numbers at first; in any other case the run ends here.
            if not finite:
                what = f"step {state.step + 1}: loss {mean}, gradient norm {norm}, lr {lr:.3e}"
                where = {i: rows.where(i) for i in indices}
                refuse_non_finite(what, state.overflows, scaler, where, run.note_divergence)
            state.overflows = 0 if finite else state.overflows + 1
            state.step += 1
            state.rows_seen += per_step
            step_done()

            # One record a step, for people and for programs.
            record = {"step": state.step, "loss": mean, "lr": lr, "grad_norm": norm, "targets": int(targets)}
            record |= {"tokens": options.batch_tokens, "seconds": round(time.monotonic() - began, 6)}
            record |= {"scale": scaler.scale} if scaler else {}
            log.step(record, options.log_every, max_steps, speed.describe)

            # Evaluate, save, or stop; at a stop the validation waits for the next start.
            last = state.step == max_steps
            stopping = stops > 0 and not last
            if state.step % options.eval_every == 0 or last:
                state.validated = not stopping
                if not stopping:
                    evaluate_and_publish(last)
            if state.step % options.save_every == 0 or last or stopping:
                run.save(strategy, scaler, state, warn=log, must=last or stopping)
                ranks.barrier()
            if stopping:
                raise Interrupted(f"saved {run.path(state.step)}, the same command goes on from there")


def _refuse_unlike_ranks(cfg, ranks: Ranks, run: Run, classes: tuple[type, ...]) -> None:
    """UserError where a rank was started with other code, options or files than the first."""
    options = asdict(cfg.train) | asdict(cfg.optim)
    options = {k: v for k, v in options.items() if k not in ("device", "out_dir")}
    code = [*sorted(Path(__file__).parent.glob("core/*.py")), *(sys.modules[c.__module__].__file__ for c in classes)]
    program = " ".join([torch.__version__, *map(files.sha256, [__file__, *code])])
    ranks.same(program, "program")
    ranks.same(json.dumps(options), "configuration")
    ranks.same(json.dumps(run.identity), "data, model or tokenizer")


def _flops(task: Task) -> int:
    """Floating-point operations of a token; 0 where only a part is trained, or by a loss of another kind."""
    usual = task.loss is next_token_loss and all(p.requires_grad for p in task.model.parameters())
    return flops_per_token(task.model, task.rows.seq_len) if usual else 0
