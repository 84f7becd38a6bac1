"""How much memory a training step will need, without taking it.

In:  sizes of a model, options. Out: bytes of tensors at the peak, and the smallest change that fits a limit.
The step itself runs, forward, backward and update, on tensors that have sizes but no values (torch's FakeTensorMode).
Knows one device with the whole model on it; not the interpreter and torch themselves, about 0.3 GB.
And: how this process gets its memory (`keep_freed_memory`).
"""

import copy
import ctypes
import math
import sys
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.data import Batch
from core.errors import UserError
from core.loss import next_token_loss
from core.optim import OptimConfig, make_optimizers
from model import Llama

# What an allocator takes for bytes of tensors. glibc's heap on a CPU: 1.17 to 1.32 for 92M and 218M parameters, most
# with full checkpointing; 1.01 where each tensor gets pages of its own (MALLOC_MMAP_THRESHOLD_=131072): slower.
# torch's on a GPU: 1.03 for both (an H200), without what CUDA itself takes, about 0.5 GB.
OVERHEAD = {"cpu": 1.25, "cuda": 1.05}


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for those of the next step.

    By default it gives large ones back to the system at once, and the next has to be cleared page by page: a quarter
    of a step on two cores (docs/performance.md). Nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)  # never


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


def used_gb(device: torch.device) -> float:
    """The most memory that this process has had so far: of tensors on a GPU, else of everything; 0: not known here."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_bytes(
    model: Llama,
    rows: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    checkpointing: str = "none",
    docs: bool = True,
    optim: OptimConfig = OptimConfig(),  # noqa: B008
    device: str = "cpu",
    several: bool = True,
) -> int:
    """Bytes of tensors at the peak of training on one device.

    Args:
        model: on the meta device or any; it is left as it is.
        rows: of a micro-batch, seq_len positions each.
        dtype: of the matrix products.
        checkpointing: none, selective or full.
        docs: attention stays within documents.
        device: cpu, or cuda where torch is built with it: kernels differ.
        several: micro-batches in a step: gradients of the ones before are there while the next one runs.

    Returns:
        weights, gradients, moments and activations together, at the worst moment.
    """
    # Tables of constants, as a packed weight's, are real and stay so.
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        model = _without_values(model, device)
        model.gradient_checkpointing = checkpointing
        optimizers = make_optimizers(model, optim)
        ids = torch.zeros(rows, seq_len, dtype=torch.int64, device=device)
        batch = Batch(ids, ids, ids.int() if docs else None, [])
        for _ in range(2):  # moments are there from the second step on
            for _ in range(1 + several):
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    loss = next_token_loss(model, batch)
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


def check(
    model: Llama,
    cfg,
    optim: OptimConfig,
    rows: int,
    seq_len: int,
    dtype: torch.dtype,
    docs: bool,
    device: str,
    several: bool,
) -> str:
    """Refuse a run that would not fit cfg.max_memory_gb, and say the smallest change that would.

    Args:
        cfg: TrainConfig, with a limit; the rest as in `peak_bytes`.

    Returns:
        a line on what is expected.

    Raises:
        UserError: too large.
    """

    def need(rows: int, checkpointing: str) -> float:
        more = several or rows < first
        peak = peak_bytes(model, rows, seq_len, dtype, checkpointing, docs, optim, device, more)
        return OVERHEAD.get(device, OVERHEAD["cpu"]) * peak / 1e9

    first, limit, kinds = rows, cfg.max_memory_gb, ("none", "selective", "full")
    expected = need(rows, cfg.gradient_checkpointing)
    if expected <= limit:
        return f"expected peak {expected:.2f} GB, max_memory_gb is {limit:g}"
    # In the order of what they cost: fewer rows at a time nothing but speed of small products, then more work.
    for kind in kinds[kinds.index(cfg.gradient_checkpointing) :]:
        smaller = rows
        while smaller >= 1:
            if need(smaller, kind) <= limit:
                change = f"--micro_batch {smaller}" * (smaller < rows)
                change += f" --gradient_checkpointing {kind}" * (kind != cfg.gradient_checkpointing)
                raise UserError(f"a step needs {expected:.2f} GB, max_memory_gb is {limit:g}", change.strip())
            smaller //= 2
    least = need(1, "full")
    raise UserError(
        f"a step needs {expected:.2f} GB, max_memory_gb is {limit:g}, and one row with full checkpointing "
        f"needs {least:.2f}",
        "a smaller model, a shorter seq_len, or fsdp on several cards",
    )
