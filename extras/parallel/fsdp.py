"""FSDP2: a model that is too large for one device, cut up over the ranks.

In:  a model on the meta device. Out: a Strategy (see core/parallel.py).
Knows nothing of data, learning rates or files.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from core.parallel import Strategy, compile_blocks
from model import Llama


class FSDP(Strategy):
    """FSDP2: every parameter, gradient and moment is cut over the ranks; a block is whole while it computes.

    Matrix products run in bf16 or fp16 as asked for: a block's weights are cast before they are gathered, gradients
    are summed in fp32, and what runs between the blocks stays fp32.
    """

    def prepare(self, weights: Iterable[tuple[str, Tensor]], cfg, dtype: torch.dtype) -> nn.Module:
        self.averaged_over, device = self.ranks.world, self.ranks.device
        if cfg.compile:
            compile_blocks(self.model)
        pinned = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
        where = {
            "mesh": init_device_mesh(device.type, (self.ranks.world,)),
            "offload_policy": pinned if cfg.cpu_offload else fsdp.OffloadPolicy(),
        }
        products = None if dtype == torch.float32 else dtype
        policy = fsdp.MixedPrecisionPolicy(products, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in self.model.model.layers:
            fsdp.fully_shard(block, reshard_after_forward=cfg.reshard, mp_policy=policy, **where)
        fsdp.fully_shard(self.model, **where)  # embedding, last norm and head: in fp32 between the blocks
        fsdp.register_fsdp_forward_method(self.model, "hidden")  # generation calls it, and then the head
        self.fill(weights, torch.device("cpu") if cfg.cpu_offload else device)
        return self.model

    def norm(self) -> float:
        return float(self._norm().full_tensor())

    def sample(self, say: Callable[[Llama], str]) -> str:
        with torch.compiler.set_stance("force_eager"):
            return say(self.model)  # every forward pass needs all ranks

    def weights(self, trained_only: bool = False) -> dict[str, Tensor]:
        self._rest()
        return self._whole(super().weights(trained_only))

    def moments(self) -> dict[str, Tensor]:
        self._rest()
        return self._whole(super().moments())

    def _rest(self) -> None:
        """A forward pass alone leaves the outermost part gathered: give it back, so that parameters are shards."""
        for module in (self.model, *self.model.model.layers):
            module.reshard()

    def _whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, t in parts.items():
            whole = t.full_tensor() if isinstance(t, DTensor) else t  # one after another: a rank holds one at a time
            if self.ranks.first:
                found[name] = whole.cpu()
        return found

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        # Every rank has the whole one at hand: nothing to be sent.
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
