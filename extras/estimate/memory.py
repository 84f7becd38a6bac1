"""How much memory a training step will need, without taking it.

In:  sizes of a model, options. Out: bytes of tensors at the peak, and the smallest change that fits a limit.
The step itself runs, forward, backward and update, on tensors that have sizes but no values (torch's FakeTensorMode).
Knows one device with the whole model on it; not the interpreter and torch themselves, about 0.3 GB.
"""

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.data import Rows, plan_step
from core.device import choose_dtype
from core.distributed import Ranks
from core.errors import UserError
from core.memory import save_memory
from core.optim import OptimConfig, make_optimizers
from model import Llama

# What an allocator takes for bytes of tensors. glibc's heap on a CPU: 1.17 to 1.32 for 92M and 218M parameters, most
# with full checkpointing; 1.01 where each tensor gets pages of its own (MALLOC_MMAP_THRESHOLD_=131072): slower.
# torch's on a GPU: 1.03 for both (an H200), without what CUDA itself takes, about 0.5 GB.
OVERHEAD = {"cpu": 1.25, "cuda": 1.05}


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still in use."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = True
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Step:
    """What a training step does on one device.

    Attributes:
        rows: of a micro-batch, seq_len positions each.
        dtype: of the matrix products.
        checkpointing: none, selective or full.
        docs: attention stays within documents.
        device: cpu, or cuda where torch is built with it: kernels differ.
        several: micro-batches in a step: gradients of the ones before are there while the next one runs.
    """

    rows: int
    seq_len: int
    dtype: torch.dtype = torch.float32
    checkpointing: str = "none"
    docs: bool = True
    device: str = "cpu"
    several: bool = True


def peak_bytes(model: Llama, step: Step, optim: OptimConfig = OptimConfig()) -> int:  # noqa: B008
    """Bytes of tensors at the peak of training on one device.

    Args:
        model: on the meta device or any; it is left as it is.

    Returns:
        weights, gradients, moments and activations together, at the worst moment.
    """
    # Tables of constants, as a packed weight's, are real and stay so.
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        model = save_memory(_without_values(model, step.device), step.checkpointing)
        optimizers = make_optimizers(model, optim)
        ids = torch.zeros(step.rows, step.seq_len, dtype=torch.int64, device=step.device)
        for _ in range(2):  # moments are there from the second step on
            for _ in range(1 + step.several):
                with torch.autocast(step.device, step.dtype, enabled=step.dtype != torch.float32):
                    loss = model(ids, ids, ids.int() if step.docs else None).sum()
                loss.backward()
                del loss
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    return live.peak


def _without_values(model: Llama, device: str) -> Llama:
    """A copy whose parameters have sizes but no values; `to_empty` does not work on fake tensors."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # all but these
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one is made once
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p not in made:
                made[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad)
            setattr(module, name, made[p])
    return model


def fitting_rows(need: Callable[[int], float], limit: float, most: int) -> int:
    """The largest number of rows, at most `most`, with need(rows) <= limit; 0: not even one. `need` grows with rows."""
    low, high = (0, -math.inf), (most + 1, math.inf)
    guess = 1
    while high[0] - low[0] > 1:
        found = guess, need(guess)
        low, high = (found, high) if found[1] <= limit else (low, found)
        if math.isfinite(high[1] - low[1]):  # almost a straight line: the guess on it is seldom off by more than one
            guess = low[0] + int((limit - low[1]) / (high[1] - low[1]) * (high[0] - low[0]))
        else:
            guess = 8 * guess
        guess = min(max(guess, low[0] + 1), high[0] - 1)
    return low[0]


def check(model: Llama, optim: OptimConfig, step: Step, limit: float) -> str:
    """Refuse a step that would not fit into `limit` GB, and say the smallest change that would.

    Returns:
        a line on what is expected.

    Raises:
        UserError: too large.
    """
    first, kinds = step.rows, ("none", "selective", "full")

    def need(rows: int, checkpointing: str) -> float:
        now = replace(step, rows=rows, checkpointing=checkpointing, several=step.several or rows < first)
        return OVERHEAD.get(step.device, OVERHEAD["cpu"]) * peak_bytes(model, now, optim) / 1e9

    expected = need(first, step.checkpointing)
    if expected <= limit:
        return f"expected peak {expected:.2f} GB, max_memory_gb is {limit:g}"
    # In the order of what they cost: fewer rows at a time nothing but speed of small products, then more work.
    for kind in kinds[kinds.index(step.checkpointing) :]:
        smaller = first
        while smaller >= 1:
            if need(smaller, kind) <= limit:
                change = f"--micro_batch {smaller}" * (smaller < first)
                change += f" --gradient_checkpointing {kind}" * (kind != step.checkpointing)
                raise UserError(f"a step needs {expected:.2f} GB, max_memory_gb is {limit:g}", change.strip())
            smaller //= 2
    least = need(1, "full")
    needed = f"a step needs {expected:.2f} GB, max_memory_gb is {limit:g}"
    raise UserError(
        f"{needed}, and one row with full checkpointing needs {least:.2f}",
        "a smaller model, a shorter seq_len, or fsdp on several cards",
    )


def expect(model: Llama, rows: Rows, cfg, ranks: Ranks) -> str:
    """`check` for a run: a line on the memory of its steps.

    Args:
        cfg: with sections train and optim.
    """
    options = cfg.train
    if options.parallel != "ddp":
        raise UserError(f'max_memory_gb = {options.max_memory_gb}, must be 0 or parallel "ddp"', "--max_memory_gb 0")
    _, micro, number = plan_step(options.batch_tokens, options.micro_batch, rows.seq_len, ranks.world)
    dtype, docs = choose_dtype(options.dtype, ranks.device), rows.batch([0]).docs is not None
    checkpointing = options.gradient_checkpointing
    step = Step(micro, rows.seq_len, dtype, checkpointing, docs, ranks.device.type, number > 1)
    return check(model, cfg.optim, step, options.max_memory_gb)
