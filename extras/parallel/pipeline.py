"""A pipeline: each rank has some of the layers, and micro-batches flow through them.

In:  a model on the meta device. Out: a Strategy (see core/parallel.py).
Knows nothing of data, learning rates or files.

Source: Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, https://arxiv.org/abs/2006.09503
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from core.data import plan_step
from core.distributed import Ranks
from core.errors import UserError
from core.optim import LossScale
from core.parallel import Strategy
from extras.parallel.gather import gather
from model import Llama


class Pipeline(Strategy):
    """The loop sees a step as one micro-batch; the schedule cuts it up, one forward and one backward in turn (1F1B)."""

    partial = True

    def prepare(self, weights, cfg, dtype: torch.dtype) -> nn.Module:
        config, world = self.model.config, self.ranks.world
        if world == 1:
            raise UserError('parallel = "pipeline" needs a rank for each stage', "torchrun --nproc_per_node=2 ...")
        if config.tie_word_embeddings:
            said = "a pipeline's first rank has the embedding, its last the head: they cannot be tied"
            raise UserError(said, "--tie_word_embeddings false")
        if config.num_hidden_layers < world:
            raise UserError(f"{config.num_hidden_layers} layers for {world} ranks of a pipeline")
        self.data = Ranks(0, 1, self.ranks.device)
        stage = Stage(self.model, self.ranks)
        self.weight = float(stage.last)  # losses are known on the last rank only
        super().prepare(weights, cfg, dtype)
        # What the loop multiplies the loss with in a run's first step; later steps tell it.
        scale = (LossScale().scale if dtype == torch.float16 else 1.0) / cfg.batch_tokens
        return PipelinedLlama(stage, self.ranks, scale)

    def deal(self, batch_tokens: int, micro_batch: int, seq_len: int) -> tuple[int, int, int]:
        per_step, _, number = plan_step(batch_tokens, micro_batch, seq_len, 1)
        if number < self.ranks.world:
            said = f"{number} micro-batches a step for {self.ranks.world} stages: some would only wait"
            raise UserError(said, "a smaller --micro_batch")
        self.module.number = number
        return per_step, per_step, 1

    def norm(self) -> float:
        square = torch.tensor(super().norm() ** 2, dtype=torch.float64, device=self.ranks.device)
        norm = math.sqrt(self.ranks.sum(square).item())
        if not math.isfinite(norm):
            self.module.scale /= 2  # as the loop will do in fp16
        return norm

    def sample(self, say) -> str:
        return "(a pipeline gives no samples while it trains)"

    def weights(self, trained_only: bool = False) -> dict[str, Tensor]:
        return gather(super().weights(trained_only), self.ranks)

    def moments(self) -> dict[str, Tensor]:
        return gather(super().moments(), self.ranks)


class Stage(nn.Module):
    """A rank's share of a Llama. The model's other layers are taken out of it, so that names stay what they are."""

    def __init__(self, model: Llama, ranks: Ranks):
        super().__init__()
        layers, at = model.config.num_hidden_layers, ranks.rank
        mine = range(layers * at // ranks.world, layers * (at + 1) // ranks.world)
        for i in range(layers):
            if i not in mine:
                model.model.layers[i] = nn.Identity()
        self.first, self.last, self.mine = ranks.first, at == ranks.world - 1, mine
        if not self.first:
            model.model.embed_tokens = nn.Identity()
        if not self.last:
            model.model.norm = model.lm_head = nn.Identity()
        self.llama = model

    def forward(self, x: Tensor, targets: Tensor | None = None, docs: Tensor | None = None) -> Tensor:
        """ids (B, T) on the first rank, else x (B, T, C) -> x (B, T, C), on the last rank losses (B, T)."""
        llama = self.llama
        context = llama.context(x[..., 0] if x.ndim == 3 else x, docs)
        x = llama.model.embed_tokens(x)
        for i in self.mine:
            x = llama.run(llama.model.layers[i], x, *context, None)
        return llama.loss(llama.model.norm(x), llama.lm_head, targets) if self.last else x


class PipelinedLlama(nn.Module):
    """What a loss function calls: ids, targets, docs -> losses.

    On the last rank the losses are those of all rows, elsewhere zeros. With gradients wanted, the schedule has run
    backward too when this returns; the backward pass that the loop then asks for only scales what is there.

    Args:
        scale: of the losses in the schedule's backward pass, so that in fp16 gradients become neither zero nor
            infinite; the one that the loop asked for in the step before.
    """

    def __init__(self, stage: Stage, ranks: Ranks, scale: float):
        super().__init__()
        self.stage, self.ranks, self.number, self.schedule = stage, ranks, 1, None
        self.scale: float | Tensor = scale

    def forward(self, ids: Tensor, targets: Tensor, docs: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.measure(ids, targets, docs)
        trained = [p for p in self.stage.parameters() if p.requires_grad]
        return ScheduledBackward.apply(self, (ids, targets, docs), trained, *trained)

    def measure(self, ids: Tensor, targets: Tensor, docs: Tensor | None) -> Tensor:
        """Without gradients: the whole batch, stage after stage."""
        x, rank = ids, self.ranks.rank
        if rank:
            x = torch.empty(*ids.shape, self.stage.llama.config.hidden_size, device=self.ranks.device)
            dist.recv(x, rank - 1)
        x = self.stage(x, targets=targets, docs=docs)
        if self.stage.last:
            return x
        dist.send(x.float(), rank + 1)
        return torch.zeros(ids.shape, device=self.ranks.device)

    def run_schedule(self, ids: Tensor, targets: Tensor, docs: Tensor | None) -> Tensor:
        """Forward and backward of all micro-batches: gradients are scale times those of the sum of losses.

        Returns:
            that sum on the last rank, elsewhere 0.
        """
        if self.schedule is None:
            stage = PipelineStage(self.stage, self.ranks.rank, self.ranks.world, self.ranks.device)
            loss = lambda out, _: out.sum() * self.scale  # noqa: E731 -- the schedule's own signature
            self.schedule = Schedule1F1B(stage, self.number, loss_fn=loss, scale_grads=False)
        losses, about = [], {} if docs is None else {"docs": docs}
        if self.stage.last:
            self.schedule.step(target=targets, losses=losses, return_outputs=False, targets=targets, **about)
        else:
            self.schedule.step(*[ids] * self.stage.first, **about)
        return torch.stack(losses).sum() / self.scale if losses else torch.zeros((), device=self.ranks.device)


class ScheduledBackward(torch.autograd.Function):
    """The schedule as one operation: its forward pass runs both passes, its backward pass hands the gradients out."""

    @staticmethod
    def forward(ctx, pipelined: PipelinedLlama, batch: tuple, trained: list[nn.Parameter], *_) -> Tensor:
        with torch.enable_grad():
            total = pipelined.run_schedule(*batch)
        ctx.grads, ctx.pipelined = [p.grad for p in trained], pipelined
        for p in trained:
            p.grad = None
        return total.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        """g (): the factor of the sum of losses."""
        factor, ctx.pipelined.scale = g / ctx.pipelined.scale, g.clone()
        return None, None, None, *[None if grad is None else grad * factor for grad in ctx.grads]
