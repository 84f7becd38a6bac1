"""The only training loop.

In:  a model, a loss function, rows, options, ranks, a Run. Out: trained weights in the run's folder, metrics.jsonl.
Knows nothing of text, of what the rows mean, or of how the model is built.

    (one optimizer step)  for each micro-batch: forward, backward;  one sum over ranks;  guard;  clip;  update
"""

import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from core import files, parallel
from core.checkpoint import Run
from core.data import Batch, BinRows, ChatRows, batch, step_rows
from core.distributed import Ranks
from core.errors import Diverged, Interrupted, UserError
from core.hf_folder import verify
from core.optim import LossScale, OptimConfig, learning_rate, make_optimizers
from core.parallel import WAYS
from extras.estimate import memory
from extras.estimate import profile as speed
from model import Llama


@dataclass(frozen=True)
class TrainConfig:
    out_dir: str = "out/pretrain"
    max_steps: int = 0  # optimizer steps; 0: as many as `epochs` take
    epochs: float = 1.0  # passes over the data, where max_steps is 0
    batch_tokens: int = 8192  # positions per optimizer step, over all micro-batches and ranks
    micro_batch: int = 8  # at most so many rows in one forward and backward pass on a rank; memory grows with it
    seed: int = 1
    device: str = "auto"  # auto: CUDA where there is one, else CPU
    dtype: str = "auto"  # auto, fp32, bf16, fp16: of the matrix products; weights are always kept in fp32
    compile: bool = False  # torch.compile: a minute or more at the start, faster steps afterwards
    gradient_checkpointing: str = "none"  # selective: keep products only; full: a third more work, the least memory
    max_memory_gb: float = 0.0  # a step that is expected to need more is refused before it begins; 0: no limit
    parallel: str = "ddp"  # over ranks: ddp, zero1, fsdp or pipeline, see core/parallel.py
    reshard: bool = True  # fsdp: give gathered weights back after the forward pass (ZeRO-3); false keeps them (ZeRO-2)
    cpu_offload: bool = False  # fsdp: weights, gradients and moments wait in the host's memory
    deterministic: bool = False  # ddp: the same bits on 1, 2, 4 ... ranks, and each time on a GPU (docs/reliability.md)
    resume: str = "auto"  # auto: from the newest whole checkpoint in out_dir; no: anew; or a checkpoint's path
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    eval_every: int = 250  # steps between validations; the best model becomes the run folder's
    eval_tokens: int = 1 << 20  # at most so many validation positions each time
    log_every: int = 10  # steps between log lines
    profile: int = 0  # so many steps, from the fourth on, are traced: out_dir/profile; 0: none
    timeout_s: int = 600  # so long a rank waits for one that hangs; more than the slowest save or validation takes
    stop_at_spike: bool = False  # end, as for NaN, where a loss stands out from the steps before; else it is only told

    def __post_init__(self):
        for name in (
            "batch_tokens",
            "micro_batch",
            "save_every",
            "eval_every",
            "eval_tokens",
            "log_every",
            "timeout_s",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, must be at least 1")
        if self.max_steps < 0 or self.epochs <= 0 or self.profile < 0:
            raise ValueError(
                f"max_steps = {self.max_steps}, epochs = {self.epochs}, profile = {self.profile}: must "
                "not be negative, epochs not 0"
            )
        if not 0 <= self.max_memory_gb < math.inf or (self.max_memory_gb and self.parallel != "ddp"):
            raise ValueError(f'max_memory_gb = {self.max_memory_gb}, must be at least 0, and parallel "ddp"')
        if self.keep < 2:
            raise ValueError(f"keep = {self.keep}, must be at least 2: one is whole while another is deleted")
        for name, known in (
            ("dtype", ("auto", "fp32", "bf16", "fp16")),
            ("parallel", WAYS),
            ("gradient_checkpointing", ("none", "selective", "full")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}, must be one of {', '.join(known)}")


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what was asked for, or the fastest that is safe on this machine."""
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted != "auto":
        return known[wanted]
    if device.type == "cuda":
        # Before Ampere (8.0) bf16 is emulated; fp16 has matrix units from Volta (7.0) on.
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    # bf16 on a CPU pays only with instructions for it: AMX tiles, AVX512-BF16. Without it is emulated: 0.15x of fp32.
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    has = device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in units)
    return torch.bfloat16 if has else torch.float32


class Log:
    """Lines for people (terminal and log.txt) and for programs (metrics.jsonl); only the first rank speaks."""

    def __init__(self, folder: Path, speak: bool, track: Callable[[dict], None] | None = None):
        self.speak, self.track, self.files = speak, track, []
        if speak:
            folder.mkdir(parents=True, exist_ok=True)
            names = ("log.txt", "metrics.jsonl")
            self.files = [open(folder / n, "a", encoding="utf-8", buffering=1) for n in names]  # noqa: SIM115
        self.bar = None

    def progress(self, total: int, done: int) -> None:
        """Show a bar with the time left, on a terminal only: in a file its redrawing would be noise."""
        if self.speak and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def __call__(self, line: str) -> None:
        if not self.speak:
            return
        self._write(0, line + "\n")
        with suppress(OSError, ValueError):  # nobody reads our output any more: no reason to stop a week of training
            tqdm.write(line) if self.bar else print(line, flush=True)

    def metrics(self, **values) -> None:
        if self.speak:
            self._write(1, json.dumps(values, allow_nan=False) + "\n")
            if self.track:
                self.track(values)

    def _write(self, which: int, text: str) -> None:
        with suppress(OSError):  # a full disk must not stop training here; saving a checkpoint will tell
            self.files[which].write(text)

    def rewind(self, step: int) -> None:
        """Take the records after `step` out of metrics.jsonl: the run goes on from there and will write them again."""
        if not self.speak:
            return
        path = Path(self.files[1].name)
        if not path.stat().st_size:
            return
        self.files[1].close()
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        keep = [line + "\n" for line in lines if self._step(line) <= step]
        files.write_text(path, "".join(keep))
        self.files[1] = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    @staticmethod
    def _step(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            return math.inf  # a kill, a full disk or a power cut tore it

    def close(self) -> None:
        for f in self.files:
            with suppress(OSError):  # closing writes what the disk refused before
                f.close()
        if self.bar:
            self.bar.close()


def plan(cfg: TrainConfig, rows: BinRows | ChatRows, ranks: Ranks) -> tuple[int, int, int, int]:
    """Rows per step, rows per micro-batch, micro-batches per rank and step, and steps.

    A micro-batch has at most cfg.micro_batch rows, and as many as divide a rank's share of the step without a rest.

    Raises:
        UserError: batch_tokens cannot be dealt out to the ranks in whole rows.
    """
    share = ranks.world * rows.seq_len
    if cfg.batch_tokens % share:
        nearest = max(share, cfg.batch_tokens // share * share)
        raise UserError(
            f"batch_tokens {cfg.batch_tokens} is not a multiple of ranks {ranks.world} x seq_len "
            f"{rows.seq_len} = {share}",
            f"--batch_tokens {nearest}",
        )
    mine = cfg.batch_tokens // share  # rows of one rank's share
    micro = next(n for n in range(min(cfg.micro_batch, mine), 0, -1) if mine % n == 0)
    per_step = mine * ranks.world
    steps = cfg.max_steps or max(1, round(cfg.epochs * len(rows) / per_step))
    return per_step, micro, mine // micro, steps


def train(
    model: Llama,
    loss_fn: Callable,
    rows: BinRows | ChatRows,
    val_rows: dict[str, BinRows | ChatRows],
    cfg: TrainConfig,
    optim: OptimConfig,
    ranks: Ranks,
    tokenizer,
    identity: dict,
    about: dict,
    samples: Callable[[Llama], str] | None = None,
    fill: Callable | None = None,
    saver=None,
    track: Callable[[dict], None] | None = None,
) -> None:
    """Train until the last step, a stop signal or divergence.

    Args:
        model: fp32 weights, on ranks.device; or on the meta device, then `fill` gives the weights (`parallel.spread`).
        loss_fn: (model, Batch) -> sum of the losses of the batch's targets.
        rows: what to train on.
        val_rows: what to validate on, by its source; none: no validation.
        tokenizer: saved with the model.
        identity: what a resumed run must share with the one it continues, besides the seed and the training rows.
        about: plain data for run.json; `intro` in it is a list of lines to log first.
        samples: called after each validation; the text it returns is logged.
        saver: how models become files, see `checkpoint.Run`.
        track: called on the first rank with each record of metrics.jsonl; must neither raise nor wait.
    Raises:
        Diverged: the loss or gradient is not finite; weights are as before that step.
        Interrupted: SIGTERM or SIGINT came; everything is saved.
        StorageError: checkpoints could not be written three times in a row.
        UserError: the folder belongs to another run, the batch cannot be divided, or the ranks were started unlike.
        RankLost: another rank hangs or has ended.
    """
    identity = identity | {"seed": cfg.seed, "data": rows.digest, "seq_len": rows.seq_len, "optimizer": optim.optimizer}
    intro = about.pop("intro", [])
    run = Run(cfg.out_dir, identity, about, tokenizer, cfg.keep, ranks.first, saver)
    if cfg.resume == "no" and (aside := run.start_anew()):
        intro = [f"the earlier run is now {aside}", *intro]
    log = Log(run.folder, ranks.first, track)
    for line in intro:
        log(line)
    try:
        _loop(model, loss_fn, rows, val_rows, cfg, optim, ranks, run, log, samples, fill)
    except RuntimeError as e:
        if lost := ranks.lost(e):
            raise lost from e
        raise
    finally:
        log.close()
        run.close()


def _loop(model, loss_fn, rows, val_rows, cfg, optim, ranks: Ranks, run: Run, log: Log, samples, fill) -> None:
    dtype = choose_dtype(cfg.dtype, ranks.device)
    options = {k: v for k, v in (asdict(cfg) | asdict(optim)).items() if k not in ("device", "out_dir")}
    must_match = {"program": _program(), "configuration": options, "data, model or tokenizer": run.identity}
    for what, value in must_match.items():
        ranks.same(json.dumps(value), what)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if ranks.device.type == "cpu":
        memory.keep_freed_memory()
    if cfg.max_memory_gb:
        _, micro, micro_batches, _ = plan(cfg, rows, ranks)
        docs = batch(rows, [0]).docs is not None
        log(memory.check(model, cfg, optim, micro, rows.seq_len, dtype, docs, ranks.device.type, micro_batches > 1))
    # What share of the peak it is can be said of next-token training of all weights: frozen ones take less work, and
    # rows that make their own batches come with losses that do other work.
    usual = all(p.requires_grad for p in model.parameters()) and not hasattr(rows, "make")
    flops = model.flops_per_token(rows.seq_len) if usual else 0
    spread = parallel.spread(model, cfg, ranks, dtype, fill)
    per_step, micro, micro_batches, max_steps = plan(cfg, rows, spread.data)
    optimizers = make_optimizers(model, optim)
    spread.share(optimizers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    scaler = LossScale() if dtype == torch.float16 else None
    state = {"step": 0, "rows_seen": 0, "best": None, "overflows": 0, "validated": True}
    state |= _resume(cfg, run, spread, optimizers, scaler, ranks, log)
    ranks.same(json.dumps([state, max_steps]), "checkpoint")
    if state["step"] >= max_steps:
        log(f"{run.folder} is finished at step {state['step']} of {max_steps}: nothing to do (--resume no starts anew)")
        return
    log(
        f"steps {max_steps}, each {per_step} rows x {rows.seq_len} positions = {micro_batches} micro-batches x "
        f"{spread.data.world} ranks x {micro} rows; {max_steps * per_step / len(rows):.2f} epochs of {len(rows)} "
        f"rows; {ranks.device}, {str(dtype).removeprefix('torch.')}"
        + f", {cfg.parallel} on {ranks.world} ranks"
        * (ranks.world > 1)
    )
    if cfg.profile and max_steps - state["step"] < cfg.profile + 3:
        raise UserError(f"profile = {cfg.profile} needs {cfg.profile + 3} steps, {max_steps - state['step']} are left")
    log.progress(max_steps, state["step"])
    autocast = torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32)
    stop = StopSignals()
    validate = partial(_validate, spread, loss_fn, val_rows, cfg, autocast, run, log, state, samples)
    if not state["validated"]:  # the run was stopped where a validation was due
        validate()
    model.train()
    recent = deque(maxlen=128)  # mean losses of the steps before, from this start on
    window, window_s = [], 0.0  # mean losses and seconds of the steps since the last log line
    peak, val_loss = 0.0, None  # FLOP/s of the machine, once measured; of the last validation
    with stop, speed.profiled(cfg.profile if ranks.first else 0, run.folder / "profile", log) as stepped:
        while state["step"] < max_steps:
            began = time.monotonic()
            lr = learning_rate(state["step"], max_steps, optim)
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr

            # Each rank takes its own rows of the step: micro-batch m of rank r is the (m * world + r)-th piece.
            indices = step_rows(state["rows_seen"], per_step, len(rows), cfg.seed)
            batches = (
                seeded_batch(
                    rows, indices, micro, m * spread.data.world + spread.data.rank, cfg.seed, state["step"]
                ).to(ranks.device)
                for m in range(micro_batches)
            )
            # Divided by the step's positions for now (a constant, so that fp16 stays in range), by its targets once
            # they are counted.
            scale = (scaler.scale if scaler else 1.0) / cfg.batch_tokens
            mine = spread.accumulate(batches, micro_batches, loss_fn, scale, autocast)

            # One small sum per step: the loss, the targets, and whether any rank was asked to stop.
            totals = ranks.sum(torch.cat([mine, torch.zeros_like(mine[:1]) + stop.asked])).tolist()
            mean = totals[0] / max(1.0, totals[1])
            correction = cfg.batch_tokens / max(1.0, totals[1]) / (scaler.scale if scaler else 1.0)
            norm = _finish_gradients(spread, parameters, correction, optim)
            finite = math.isfinite(mean) and math.isfinite(norm)
            if finite:
                _tell_spike(state, mean, recent, cfg, log)
                for optimizer in optimizers:
                    optimizer.step()
                spread.stepped()
            if scaler:
                scaler.update(finite)
            for p in parameters:  # an optimizer may have only some of them
                p.grad = None
            if not finite:
                _overflow_or_diverge(state, mean, norm, lr, scaler, rows, indices, run)
            state["overflows"] = 0 if finite else state["overflows"] + 1
            state["step"] += 1
            state["rows_seen"] += per_step
            window.append(mean)
            window_s += time.monotonic() - began
            stepped()
            if log.bar:
                log.bar.update()

            step, last = state["step"], state["step"] == max_steps
            stopping = totals[2] > 0 and not last
            if step % cfg.log_every == 0 or last:
                loss, seconds = sum(window) / len(window), window_s / len(window)
                per_second, left = cfg.batch_tokens / max(seconds, 1e-9), (max_steps - step) * seconds
                if flops and not peak and ranks.first and left > 10:  # in a run of seconds nobody asks
                    peak = speed.matmul_peak(ranks.device, dtype) * ranks.world
                log(
                    f"step {step}/{max_steps} loss {loss:.4f}"
                    + (f" val {val_loss:.4f}" if val_loss is not None else "")
                    + f" lr {lr:.2e} norm {norm:.2f} {per_second:,.0f} tokens/s"
                    + (f" MFU {flops * per_second / peak:.1%}" if peak else "")
                    + f" {memory.used_gb(ranks.device):.1f} GB left {_clock(left)}"
                    + (f" scale {scaler.scale:g}" if scaler else "")
                )
                window, window_s = [], 0.0
            about_scale = {"scale": scaler.scale} if scaler else {}
            log.metrics(
                step=step,
                loss=_plain(mean),
                lr=lr,
                grad_norm=_plain(norm),
                targets=int(totals[1]),
                tokens=cfg.batch_tokens,
                seconds=round(time.monotonic() - began, 6),
                **about_scale,
            )
            if step % cfg.eval_every == 0 or last:
                state["validated"] = not stopping
                if not stopping:
                    val_loss = validate(must=last)
            if step % cfg.save_every == 0 or last or stopping:
                run.save(spread, optimizers, scaler, state, warn=log, must=last or stopping)
                ranks.barrier()
            if stopping:
                raise Interrupted(f"saved {run.path(step)}, the same command goes on from there")


def seeded_batch(rows, indices: list[int], micro: int, number: int, seed: int, step: int) -> Batch:
    """Micro-batch `number` of a step. Dropout in its forward pass depends on nothing that came before."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {number}".encode()).digest()[:8]) >> 1)
    return batch(rows, indices[number * micro : (number + 1) * micro])


def _resume(cfg: TrainConfig, run: Run, spread, optimizers, scaler, ranks: Ranks, log: Log) -> dict:
    """State of the checkpoint to go on from, put into model and optimizers; {} to start at step 0."""
    ranks.barrier()  # the first rank has cleaned the folder up
    path = None
    if cfg.resume == "auto":
        path = run.newest(warn=log)
    elif cfg.resume != "no":
        path = Path(cfg.resume)
        problem = verify(path) if path.is_dir() else "No such folder"
        if problem:
            raise UserError(f"{path}: {problem}", "--resume auto takes the newest whole one")
    if path is None:
        log.rewind(0)
        return {}
    state = run.restore(path, spread, optimizers, scaler, warn=log)
    log(f"resumed from {path}")
    if cfg.resume != "auto" and (later := run.set_aside_after(state["step"])):
        log(f"set aside: {', '.join(p.name for p in later)}")
    log.rewind(state["step"])
    return {k: state[k] for k in ("step", "rows_seen", "best", "overflows", "validated")}


def _finish_gradients(spread, parameters: list, correction: float, optim: OptimConfig) -> float:
    """Take the scale out, divide by the number of targets and clip, all in place; returns the norm before clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = spread.norm(parameters) * correction
    if math.isfinite(norm):
        factor = correction * (min(1.0, optim.grad_clip / (norm + 1e-6)) if optim.grad_clip else 1.0)
        torch._foreach_mul_(grads, factor)
    return norm


def _overflow_or_diverge(
    state: dict, mean: float, norm: float, lr: float, scaler, rows, indices: list[int], run: Run
) -> None:
    """Non-finite numbers are normal in fp16 while the scale settles; in any other case training has diverged."""
    if scaler and state["overflows"] < 20 and scaler.scale >= 1:
        return
    what = f"step {state['step'] + 1}: loss {mean}, gradient norm {norm}, lr {lr:.3e}" + (
        f", scale {scaler.scale:g}" if scaler else ""
    )
    where = [rows.where(i) for i in indices]
    if run.write:
        with suppress(OSError):
            files.write_json(run.folder / "diverged.json", {"what": what, "rows": dict(zip(indices, where))})
    raise Diverged(
        f"{what}; rows {indices[:4]}: {'; '.join(where[:4])}; all {len(indices)} in diverged.json",
        "the weights were not touched; a lower --lr or --dtype fp32 may help",
    )


def _tell_spike(state: dict, mean: float, recent: deque, cfg: TrainConfig, log: Log) -> None:
    """Tell, or stop at, a loss far above those of the steps before: a bad row, or the beginning of divergence.

    Source: the rule of OLMo's trainer, 6 standard deviations over 128 steps.
    """
    if len(recent) == recent.maxlen:
        usual = sum(recent) / len(recent)
        limit = usual + 6 * math.sqrt(sum((loss - usual) ** 2 for loss in recent) / len(recent))
        if mean > limit:
            line = f"step {state['step'] + 1}: loss {mean:.4f} is above {limit:.4f}, 6 sigma over the 128 before"
            if cfg.stop_at_spike:
                raise Diverged(line, "the weights were not touched; a lower --lr, or look at its rows")
            log(f"warning: {line}")
    recent.append(mean)


def _program() -> str:
    """Hash of what trains: ranks on several machines must run the same code."""
    paths = [*sorted(Path(__file__).parent.glob("*.py")), Path(sys.modules[Llama.__module__].__file__)]
    return " ".join([torch.__version__, *map(files.sha256, paths)])


@torch.no_grad()
def evaluate(
    spread, loss_fn: Callable, rows: BinRows | ChatRows, cfg: TrainConfig, autocast
) -> tuple[float, float, float | None]:
    """Loss in nats and targets over the first eval_tokens positions, and bits per byte where bytes are known."""
    spread.model.eval()
    ranks, among = spread.ranks, spread.data
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    number = min(len(rows), max(1, cfg.eval_tokens // rows.seq_len))
    for start in range(0, number, among.world * cfg.micro_batch):
        first = start + among.rank * cfg.micro_batch
        mine = range(first, min(first + cfg.micro_batch, number))
        # Cut models need all ranks in every forward pass: one that has no rows left takes any and does not count them.
        data = batch(rows, mine or range(1)).to(ranks.device)
        with autocast:
            total += spread.losses(data, loss_fn) * bool(mine)
    spread.model.train()
    nats, targets = ranks.sum(total).tolist()
    if not rows.bytes_per_token:
        return nats, targets, None
    # The text's bytes are spread evenly over all positions; an id without a target (a document's first) counts too.
    positions = min(number * rows.seq_len, rows.bin.tokens)
    return nats, targets, nats / math.log(2) / (positions * rows.bytes_per_token)


def _validate(
    spread, loss_fn, val_rows, cfg, autocast, run: Run, log: Log, state: dict, samples, must: bool = False
) -> float | None:
    """Measure, print early samples, and publish the model into the run folder unless an earlier one was better.

    Returns:
        the loss; None without validation.
    """
    facts, better = {"step": state["step"]}, True
    if val_rows:
        parts = {name: evaluate(spread, loss_fn, rows, cfg, autocast) for name, rows in val_rows.items()}
        loss = sum(nats for nats, _, _ in parts.values()) / max(1.0, sum(targets for _, targets, _ in parts.values()))
        bits = next(iter(parts.values()))[2] if len(parts) == 1 else None
        facts |= {"val_loss": _plain(loss)} | ({"val_bits_per_byte": _plain(bits)} if bits is not None else {})
        better = math.isfinite(loss) and (state["best"] is None or loss < state["best"])
        log(
            f"step {state['step']} validation loss {loss:.4f}"
            + (f" bits/byte {bits:.4f}" if bits is not None else "")
            + (" (best so far)" if better else "")
        )
        if len(parts) > 1:
            means = {name: nats / max(1.0, targets) for name, (nats, targets, _) in parts.items()}
            log("  of which " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
            facts["val_loss_by_source"] = {name: _plain(mean) for name, mean in means.items()}
        log.metrics(**facts)
    if samples:
        spread.model.eval()
        log(spread.samples(samples))
        spread.model.train()
    if better and spread.ranks.agree(run.publish(spread, facts, log, must)):
        state["best"] = facts.get("val_loss")
    state["validated"] = True
    return facts.get("val_loss")


class StopSignals:
    """SIGTERM and SIGINT ask for a stop after the running step; a second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "StopSignals":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number, frame) -> None:
        self.asked = True
        for either in self._before:
            signal.signal(either, signal.SIG_DFL)
        os.write(2, b"stopping after this step; once more stops at once, without saving\n")

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
