"""Who am I among the ranks: torchrun's environment, sums over ranks.

In:  the environment that torchrun sets. Out: one Ranks object.
Knows nothing of models' insides, data or files. A run without torchrun has no process group at all.
"""

import atexit
import datetime
import gc
import hashlib
import os
import time
import traceback
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import RankLost, UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all. rank in [0, world); device is where its tensors live."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = field(default=None, compare=False)  # where ranks leave notes for each other

    @property
    def first(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, yes: bool) -> bool:
        """Whether all ranks say yes: what only one of them knows, as whether a file was written, must not part them."""
        return self.sum(torch.tensor(float(not yes), device=self.device)).item() == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def same(self, text: str, what: str) -> None:
        """Refuse to start where the ranks disagree on `text`."""
        if self.world == 1:
            return
        # A hash is short, and each rank sees whose is another.
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device=self.device)
        digests = [torch.empty_like(digest) for _ in range(self.world)]
        dist.all_gather(digests, digest)
        other = [r for r, d in enumerate(digests) if not torch.equal(d, digests[0])]
        if other:
            raise UserError(f"rank {other[0]} has another {what} than rank 0", "start every rank with the same files")

    def lost(self, error: RuntimeError) -> RankLost | None:
        """What to say where `error` means that another rank does not answer; None where it means something else.

        A hanging rank names itself by its silence: each that has waited in vain leaves a note, and it leaves none.
        """
        if self.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return None
        # The function that waited says what the run was doing.
        during = traceback.extract_tb(error.__traceback__)[-1].name
        during = {"_engine_run_backward": "the sum of gradients in backward"}.get(during, during)
        if "timed out" not in str(error).lower():
            return RankLost(f"rank {self.rank}, {during}: another rank ended", "its own message tells why")
        # Leave a note, and look for three seconds whose note is missing: the others began to wait a little later.
        until, silent = time.monotonic() + 3, range(self.world)
        try:
            self.store.set(f"waited-{self.rank}", "")
            while silent and time.monotonic() < until:
                time.sleep(0.1)
                silent = [r for r in silent if not self.store.check([f"waited-{r}"])]
            who = f"rank {', '.join(map(str, silent))} did not" if silent else "one rank was too late to"
        except RuntimeError:  # without torchrun the store lives in rank 0
            who = "rank 0 did not"
        hint = "the same command goes on from the last checkpoint"
        return RankLost(f"rank {self.rank}, {during}: {who} answer within timeout_s", hint)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            # A pipeline's schedule, a ring of references, would keep threads of the group until the end.
            gc.collect()
            dist.destroy_process_group()


def start(device: str = "auto", timeout_s: int = 600) -> Ranks:
    """Join the process group if torchrun started us, else stand alone.

    Args:
        device: "auto" (CUDA where there is one, else CPU), or any torch device name.
        timeout_s: seconds after which a rank that waits for a hanging one gives up.
    Raises:
        UserError: no such device, half of torchrun's variables or wrong ones, or the ranks do not find each other.
    """
    # Where this process computes: with torchrun each has a GPU of its own.
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        place = torch.device(device)
        if place.type not in ("cpu", "cuda"):
            torch.empty(1, device=place)
    except (RuntimeError, NotImplementedError, AssertionError):
        raise UserError(f"device = {device!r} is not a device of this machine", "auto, cpu or cuda") from None
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (place.index or 0) >= count:
            raise UserError(f"no device {device}, this machine has {count} CUDA devices", "--device cpu")
        torch.cuda.set_device(place)
    # Without torchrun, or with one process, there is nobody to talk to.
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present, missing = [n for n in names if n in os.environ], [n for n in names if n not in os.environ]
    if not present or os.environ.get("WORLD_SIZE") == "1":
        return Ranks(0, 1, place)
    if missing:
        raise UserError(f"{present[0]} is set but {', '.join(missing)} is not", "start with torchrun, or unset it")
    # The ranks meet at a store of notes, and form a group.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=timeout_s)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store over its restarts: the addresses of ranks that are gone would still stand there.
            # On several machines this number differs; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, timeout=limit, world_size=world, rank=rank, store=store)
    except (RuntimeError, ValueError) as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        me = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
        hint = "a free MASTER_PORT, and every rank started within timeout_s"
        raise UserError(f"{me} does not meet the others at {where}: {e}", hint) from None
    # An error leaves threads of the group, and they would abort the process at its end.
    ranks = Ranks(rank, world, place, store)
    atexit.register(ranks.close)
    return ranks
