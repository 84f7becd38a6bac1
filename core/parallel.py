"""How a model is trained on one rank, or with a copy on each of several (DDP).

In:  a model on the meta device, its weights, options, ranks. Out: a Strategy; the loop, the optimizers and the
checkpoints do not know which.
Knows nothing of data, learning rates or files. Other strategies, in extras/parallel, are loaded when asked for.

    parallel       a rank holds                              moved at each step
    ddp            everything                                gradients, once
    zero1          weights, gradients, its part of moments   gradients, then weights
    fsdp           its part of everything (ZeRO-3)           weights twice, gradients; reshard = false: once (ZeRO-2)
    pipeline       its layers, with all that belongs to them activations between neighbours

Tested on CPUs with gloo; on a GPU with one rank of NCCL (ddp, zero1, fsdp). Several GPUs have not been tried.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from core.data import plan_step
from core.distributed import Ranks
from model import Llama


class Strategy:
    """A model on one rank, and what every other strategy has to say about itself.

    Attributes:
        module: what a loss function calls.
        data: ranks among which the rows of a step are dealt out.
        averaged_over: the ranks over whose number gradients are divided, where their sum is wanted.
        weight: how much this rank's losses and targets count in sums over ranks, 1 or 0.
        partial: whether a rank has only some of the parameters.
    """

    averaged_over, weight, partial = 1, 1.0, False

    def __init__(self, model: Llama, weights: Iterable[tuple[str, Tensor]], cfg, ranks: Ranks, dtype: torch.dtype):
        """
        Args:
            model: on the meta device, without memory; or with weights, which then stay.
            weights: (name, values) of each weight, for a model on the meta device.
            cfg: TrainConfig.
            dtype: of the matrix products.
        """
        self.model, self.ranks, self.data, self.optimizers = model, ranks, ranks, []
        self.module = self.prepare(weights, cfg, dtype)

    def prepare(self, weights: Iterable[tuple[str, Tensor]], cfg, dtype: torch.dtype) -> nn.Module:
        """Memory, weights, compiled blocks; returns what a loss function calls."""
        self.fill(weights, self.ranks.device)
        if cfg.compile:
            compile_blocks(self.model)
        return self.model

    @torch.no_grad()
    def fill(self, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        """Memory for a model from the meta device, and its weights; another model stays as it is."""
        if not next(self.model.parameters()).is_meta:
            return
        self.model.to_empty(device=device)
        if self.model.config.tie_word_embeddings:  # to_empty makes two of a shared parameter
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
        # Weights come one after another, so that no second model is in memory.
        empty = dict(self.model.named_parameters())
        for name, values in weights:
            if (p := empty.pop(name, None)) is not None:
                p.copy_(self.cut(values, p))
        assert not empty, f"no values for {', '.join(empty)}"

    # -------- what the loop calls

    def deal(self, batch_tokens: int, micro_batch: int, seq_len: int) -> tuple[int, int, int]:
        """Rows per step, rows per micro-batch, micro-batches of a rank; see plan_step."""
        return plan_step(batch_tokens, micro_batch, seq_len, self.data.world)

    def take(self, optimizers: list) -> None:
        """The optimizers that will step the weights. They hold no state yet."""
        self.optimizers = optimizers

    def sync(self, last: bool):
        """Context of a micro-batch's forward and backward pass; at the end of the last one of a step, the gradient is
        that of the sum of all ranks' losses over `averaged_over`."""
        return nullcontext()

    def norm(self) -> float:
        """Length of the gradient of the whole model."""
        return float(self._norm())

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def after_step(self) -> None:
        """Called when the optimizers have changed the weights."""

    def sample(self, say: Callable[[Llama], str]) -> str:
        """What `say(model)` says, on the first rank."""
        # Compiled, each length of a text would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            return say(self.model) if self.ranks.first else ""

    # -------- whole tensors for files, and parts of them back. All ranks call these; results count on the first one.

    def parameters(self, trained_only: bool = False) -> dict[str, nn.Parameter]:
        """This rank's parameters by name, tied ones once; of cut ones the shape is the whole one's."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad or not trained_only}

    def weights(self, trained_only: bool = False) -> dict[str, Tensor]:
        """The whole model's weights by name."""
        return {name: p.detach() for name, p in self.parameters(trained_only).items()}

    def moments(self) -> dict[str, Tensor]:
        """The optimizers' state as "parameter:key"."""
        return {f"{n}:{key}": t for n, p, optimizer in self._optimized() for key, t in optimizer.state[p].items()}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take this rank's part of what `weights` and `moments` gave."""
        mine, states = self.parameters(), {}
        for name, values in weights.items():
            mine[name].copy_(self.cut(values, mine[name]))
        # "parameter:key" -> the state of each parameter.
        for key, values in moments.items():
            name, _, entry = key.rpartition(":")
            states.setdefault(name, {})[entry] = values
        # The fused kernel wants its step counter where the parameter is; load_state_dict would do the same.
        for name, p, optimizer in self._optimized():
            state = states.get(name, {}).items()
            optimizer.state[p] = {k: self.cut(t, p) if t.shape == p.shape else t.to(p.device) for k, t in state}

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's part of a whole tensor, for a parameter."""
        return whole.to(like.device)

    def _optimized(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Each parameter that an optimizer of this rank steps: its name, itself, the optimizer."""
        names = {p: name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                yield names[p], p, optimizer


class DDP(Strategy):
    """The whole model on every rank; torch averages the gradients during the last backward pass of a step."""

    def prepare(self, weights: Iterable[tuple[str, Tensor]], cfg, dtype: torch.dtype) -> nn.Module:
        super().prepare(weights, cfg, dtype)
        self.averaged_over, device = self.ranks.world, self.ranks.device
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.model, ids)

    def sync(self, last: bool):
        # Gradients of the micro-batches before are added up on each rank, and travel once.
        return nullcontext() if last else self.module.no_sync()


def compile_blocks(model: Llama) -> None:
    """Compile the blocks, all with the code of the first; the head's loss makes its own gradients and stays eager."""
    for block in model.model.layers:
        block.compile(fullgraph=True)
