"""Who am I among the ranks: torchrun's environment, sums over ranks.

In:  the environment that torchrun sets. Out: one Ranks object.
Knows nothing of models' insides, data or files. A run without torchrun has no process group at all.
"""

import datetime
import gc
import hashlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all. rank in [0, world); device is where its tensors live."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def same(self, text: str, what: str) -> None:
        """Refuse to start where the ranks disagree on `text`."""
        if self.world == 1:
            return
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device=self.device)
        digests = [torch.empty_like(digest) for _ in range(self.world)]
        dist.all_gather(digests, digest)
        other = [r for r, d in enumerate(digests) if not torch.equal(d, digests[0])]
        if other:
            raise UserError(f"rank {other[0]} has another {what} than rank 0", "start every rank with the same files")

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            gc.collect()  # a pipeline's schedule, a ring of references, would keep threads of the group until the end
            dist.destroy_process_group()


def start(device: str = "auto", timeout_s: int = 600) -> Ranks:
    """Join the process group if torchrun started us, else stand alone.

    Args:
        device: "auto" (CUDA where there is one, else CPU), or any torch device name.
        timeout_s: seconds after which a rank that waits for a hanging one gives up.
    Raises:
        UserError: no such device, or half of torchrun's variables.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local}"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"device = {device!r} is not a device", "auto, cpu or cuda") from None
    if place.type == "cuda":
        if not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count():
            raise UserError(f"no device {device}, {torch.cuda.device_count()} CUDA devices are there", "--device cpu")
        torch.cuda.set_device(place)
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [n for n in names if n in os.environ]
    if not present or os.environ.get("WORLD_SIZE") == "1":
        return Ranks(0, 1, place)
    if len(present) < len(names):
        missing = ", ".join(n for n in names if n not in present)
        raise UserError(f"{present[0]} is set but {missing} is not", "start with torchrun, or unset it")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_s)
    )
    return Ranks(dist.get_rank(), dist.get_world_size(), place)
