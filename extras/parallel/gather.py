"""Tensors that each rank has for itself, brought together for files.

In:  tensors by name on each rank. Out: all of them on the first rank.
"""

import json

import torch
import torch.distributed as dist
from torch import Tensor

from core.distributed import Ranks


def gather(mine: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of all ranks (fp32), on the first rank; elsewhere {}."""
    found, device = {}, ranks.device
    for rank in range(ranks.world):
        about = json.dumps([[name, list(t.shape)] for name, t in mine.items()]).encode()
        size = torch.tensor([len(about)], device=device)
        dist.broadcast(size, rank)
        text = torch.zeros(int(size), dtype=torch.uint8, device=device)
        if rank == ranks.rank:
            text = torch.frombuffer(bytearray(about), dtype=torch.uint8).to(device)
        dist.broadcast(text, rank)
        for name, shape in json.loads(bytes(text.tolist())):
            tensor = mine[name].contiguous() if rank == ranks.rank else torch.empty(shape, device=device)
            dist.broadcast(tensor, rank)
            if ranks.first:
                found[name] = tensor
    return found
