"""Ways to spread training over ranks: copies of the model, its moments shared out, all of it cut up, a pipeline.

In:  a model (it may be on the meta device, without memory), options, ranks. Out: one object with the same methods for
each way; the loop, the optimizers and the checkpoints do not know which it is.
Knows nothing of data, learning rates or files.

    parallel       a rank holds                              moved at each step
    ddp            everything                                gradients, once
    zero1          weights, gradients, its part of moments   gradients, then weights
    fsdp           its part of everything (ZeRO-3)           weights twice, gradients; reshard = false: once (ZeRO-2)
    pipeline       its layers, with all that belongs to them activations between neighbours

Tested on CPUs with gloo; on a GPU with one rank of NCCL (ddp, zero1, fsdp). Several GPUs have not been tried.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.data import Batch
from core.distributed import Ranks
from core.errors import UserError
from core.loss import next_token_loss
from model import Llama

WAYS = ("ddp", "zero1", "fsdp", "pipeline")


def spread(model: Llama, cfg, ranks: Ranks, dtype: torch.dtype, fill: Callable | None = None) -> "Copies":
    """Put a model on the ranks.

    Args:
        model: fp32 weights, or on the meta device.
        cfg: TrainConfig: parallel, reshard, cpu_offload, deterministic, compile.
        dtype: of the matrix products.
        fill: for a model on the meta device: calls what it is given with (name, values) of each of its weights.

    Raises:
        UserError: options that do not go together.
    """
    if cfg.deterministic and cfg.parallel != "ddp":
        raise UserError(f'deterministic = true needs parallel = "ddp", not {cfg.parallel!r}')
    if cfg.deterministic and ranks.world & (ranks.world - 1):
        raise UserError(f"deterministic = true on {ranks.world} ranks", "1, 2, 4, 8 ... ranks")
    if cfg.deterministic and ranks.device.type == "cuda":
        # Some kernels, as attention's backward pass, add in the order in which their threads happen to come.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it then
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a help to find faults: it costs time
    kinds = {
        "ddp": FixedOrder if cfg.deterministic else Copies,
        "zero1": SharedMoments,
        "fsdp": Shards,
        "pipeline": Pipeline,
    }
    alone = ranks.world == 1 and cfg.parallel in ("zero1", "fsdp")  # nothing to share
    return (Copies if alone else kinds[cfg.parallel])(model, cfg, ranks, dtype, fill)


class Copies:
    """The whole model on every rank, gradients averaged by DDP; with one rank no more than the model.

    Attributes:
        module: what a loss function calls.
        data: ranks among which the rows of a step are dealt out.
    """

    def __init__(self, model: Llama, cfg, ranks: Ranks, dtype: torch.dtype, fill: Callable | None):
        self.model, self.ranks, self.data = model, ranks, ranks
        self._materialize(fill)
        if cfg.compile:
            compile_blocks(model)
        self.module = self._wrapped()

    def _materialize(self, fill: Callable | None) -> None:
        """Memory and weights for a model from the meta device; nothing for another."""
        if not next(self.model.parameters()).is_meta:
            return
        assert fill is not None
        self.model.to_empty(device=self._home)
        if self.model.config.tie_word_embeddings:  # to_empty makes two of a shared parameter
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
        mine = dict(self.model.named_parameters())
        fill(lambda name, values: self.put(mine[name], values) if name in mine else None)

    @property
    def _home(self) -> torch.device:
        return self.ranks.device

    def _wrapped(self) -> nn.Module:
        if self.ranks.world == 1:
            return self.model
        index = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.model, device_ids=index)

    def share(self, optimizers: list) -> None:
        """Called once, with optimizers that hold no state yet."""

    def accumulate(self, batches: Iterable[Batch], number: int, loss_fn: Callable, scale: float, autocast) -> Tensor:
        """Forward and backward of the rank's micro-batches: `grad` becomes that of scale * sum of all ranks' losses.

        Args:
            batches: `number` of them.
            autocast: context of the forward passes.

        Returns:
            (2,) float64: the sum of the losses and the number of targets, of this rank.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for m, data in enumerate(batches):
            with self._quiet(m < number - 1):
                with autocast:
                    loss = loss_fn(self.module, data)
                (loss * (scale * self._averaged_over())).backward()
            totals += torch.stack([loss.detach().double(), data.count.double()])
            self._took()
        self._all_taken()
        return totals

    def _quiet(self, when: bool):
        """Context in which gradients stay on their rank: for all but the last micro-batch of a step."""
        return self.module.no_sync() if when and self.ranks.world > 1 else nullcontext()

    def _averaged_over(self) -> int:
        """DDP and FSDP average gradients over so many ranks where a sum is wanted."""
        return self.ranks.world

    def _took(self) -> None:
        """After each micro-batch."""

    def _all_taken(self) -> None:
        """After the last one."""

    def norm(self, parameters: list[nn.Parameter]) -> float:
        """Length of the gradient of the whole model."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    def stepped(self) -> None:
        """Called when the optimizers have changed the weights."""

    def losses(self, data: Batch, loss_fn: Callable) -> Tensor:
        """(2,) float64 as above, without gradients. All ranks call it equally often."""
        return torch.stack([loss_fn(self.model, data).double(), data.count.double()])

    def samples(self, samples: Callable) -> str:
        """What `samples(model)` says, on the first rank."""
        with torch.compiler.set_stance("force_eager"):  # each length of a text would be compiled anew
            return samples(self.model) if self.ranks.first else ""

    # Whole tensors for files and parts of them back. All ranks call these; what they return counts on the first one.

    partial = False  # whether a rank has only some of the parameters

    def mine(self, trained_only: bool = False) -> dict[str, nn.Parameter]:
        """The parameters of this rank by name, tied ones once; of cut ones the shape is the whole one's."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad or not trained_only}

    def weights(self, trained_only: bool = False) -> dict[str, Tensor]:
        """The whole model's weights by name."""
        return {name: p.detach() for name, p in self.mine(trained_only).items()}

    def moments(self, optimizers: list) -> dict[str, Tensor]:
        """The optimizers' state as "parameter:key"."""
        return {
            f"{name}:{key}": value
            for name, p, optimizer in named(self.model, optimizers)
            for key, value in optimizer.state[p].items()
        }

    @torch.no_grad()
    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write the rank's part of a whole tensor into `part`."""
        part.copy_(whole)

    def part(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        """The rank's part of a moment, for a parameter."""
        return whole.to(like.device)


class FixedOrder(Copies):
    """Sums gradients in an order that does not depend on the number of ranks: the same bits on 1, 2, 4 ... of them.

    Micro-batch g of a step (there are m per rank, g = m * ranks + rank) is leaf g of a binary tree. Its lowest levels
    lie between ranks: in round k a rank swaps sums with the one whose number differs in bit k, and a + b = b + a. The
    levels above are sums of what a rank has; like the digits of a binary counter, two of a size become one.
    """

    def _wrapped(self) -> nn.Module:
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._sums: list[tuple[int, list[Tensor]]] = []  # (micro-batches in it, gradients)
        return self.model

    def _quiet(self, when: bool):
        return nullcontext()

    def _averaged_over(self) -> int:
        return 1

    def _took(self) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        for bit in range(self.ranks.world.bit_length() - 1):
            other, theirs = self.ranks.rank ^ (1 << bit), [torch.empty_like(g) for g in grads]
            moves = [
                dist.P2POp(op, t, other)
                for ours, their in zip(grads, theirs)
                for op, t in ((dist.isend, ours), (dist.irecv, their))
            ]
            for move in dist.batch_isend_irecv(moves):
                move.wait()
            torch._foreach_add_(grads, theirs)
        size = 1
        while self._sums and self._sums[-1][0] == size:
            torch._foreach_add_(grads, self._sums.pop()[1])
            size *= 2
        self._sums.append((size, grads))

    def _all_taken(self) -> None:
        _, grads = self._sums.pop()
        while self._sums:
            torch._foreach_add_(grads, self._sums.pop()[1])
        for p, grad in zip(self._parameters, grads):
            p.grad = grad


class Owned(Copies):
    """What each rank has for itself, gathered for files."""

    def _gathered(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all ranks (fp32), on the first rank; elsewhere {}."""
        found, device = {}, self.ranks.device
        for rank in range(self.ranks.world):
            about = json.dumps([[name, list(t.shape)] for name, t in mine.items()]).encode()
            size = torch.tensor([len(about)], device=device)
            dist.broadcast(size, rank)
            text = torch.zeros(int(size), dtype=torch.uint8, device=device)
            if rank == self.ranks.rank:
                text = torch.frombuffer(bytearray(about), dtype=torch.uint8).to(device)
            dist.broadcast(text, rank)
            for name, shape in json.loads(bytes(text.tolist())):
                tensor = mine[name].contiguous() if rank == self.ranks.rank else torch.empty(shape, device=device)
                dist.broadcast(tensor, rank)
                if self.ranks.first:
                    found[name] = tensor
        return found

    def moments(self, optimizers: list) -> dict[str, Tensor]:
        return self._gathered(super().moments(optimizers))


class SharedMoments(Owned):
    """ZeRO-1: each parameter has one owner, who keeps its moments, updates it and sends it to the others.

    Source: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054, section 5.1
    """

    def share(self, optimizers: list) -> None:
        self._owner: dict[nn.Parameter, int] = {}
        load = [0] * self.ranks.world
        every = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        for p in sorted(every, key=lambda p: -p.numel()):  # the largest first, to whom has least
            self._owner[p] = load.index(min(load))
            load[self._owner[p]] += p.numel()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if self._owner[p] == self.ranks.rank]

    @torch.no_grad()
    def stepped(self) -> None:
        for sent in [dist.broadcast(p.data, owner, async_op=True) for p, owner in self._owner.items()]:
            sent.wait()


class Shards(Copies):
    """FSDP2: every parameter, gradient and moment is cut over the ranks; a block is whole while it computes.

    Matrix products run in bf16 or fp16 as asked for: a block's weights are cast before they are gathered, gradients
    are summed in fp32, and what runs between the blocks stays fp32.
    """

    def __init__(self, model: Llama, cfg, ranks: Ranks, dtype: torch.dtype, fill: Callable | None):
        from torch.distributed import fsdp
        from torch.distributed.device_mesh import init_device_mesh

        self.model, self.ranks, self.data, self.module = model, ranks, ranks, model
        self._offload = cfg.cpu_offload
        pinned = fsdp.CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
        where = {
            "mesh": init_device_mesh(ranks.device.type, (ranks.world,)),
            "offload_policy": pinned if cfg.cpu_offload else fsdp.OffloadPolicy(),
        }
        products = None if dtype == torch.float32 else dtype
        policy = fsdp.MixedPrecisionPolicy(products, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if cfg.compile:
            compile_blocks(model)
        for block in model.model.layers:
            fsdp.fully_shard(block, reshard_after_forward=cfg.reshard, mp_policy=policy, **where)
        fsdp.fully_shard(model, **where)  # embedding, last norm and head: in fp32 between the blocks
        fsdp.register_fsdp_forward_method(model, "hidden")  # generation calls it, and then the head
        self._materialize(fill)

    @property
    def _home(self) -> torch.device:
        return torch.device("cpu") if self._offload else self.ranks.device

    def _quiet(self, when: bool):
        return nullcontext()  # gradients are summed after each micro-batch: whole ones would not fit

    def norm(self, parameters: list[nn.Parameter]) -> float:
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return float(total.full_tensor())

    def samples(self, samples: Callable) -> str:
        with torch.compiler.set_stance("force_eager"):
            return samples(self.model)  # every forward pass needs all ranks

    def weights(self, trained_only: bool = False) -> dict[str, Tensor]:
        self._rest()
        return self._whole(super().weights(trained_only))

    def moments(self, optimizers: list) -> dict[str, Tensor]:
        self._rest()
        return self._whole(super().moments(optimizers))

    def _rest(self) -> None:
        """A forward pass alone leaves the outermost part gathered: give it back, so that parameters are shards."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    def _whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, t in parts.items():
            whole = t.full_tensor() if hasattr(t, "full_tensor") else t  # one after another: a rank holds one at a time
            if self.ranks.first:
                found[name] = whole.cpu()
        return found

    @torch.no_grad()
    def put(self, part: Tensor, whole: Tensor) -> None:
        part.copy_(self._cut(whole, part))

    def part(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        return self._cut(whole, like) if whole.shape == like.shape else whole.to(like.device)

    def _cut(self, whole: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole one at hand: nothing to be sent.
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class Pipeline(Owned):
    """Each rank has some of the layers; micro-batches flow through them, one forward and one backward in turn (1F1B).

    Source: Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, https://arxiv.org/abs/2006.09503
    """

    partial = True

    def __init__(self, model: Llama, cfg, ranks: Ranks, dtype: torch.dtype, fill: Callable | None):
        if ranks.world == 1:
            raise UserError('parallel = "pipeline" needs a rank for each stage', "torchrun --nproc_per_node=2 ...")
        if model.config.tie_word_embeddings:
            raise UserError(
                "a pipeline's first rank has the embedding, its last the head: they cannot be tied",
                "--tie_word_embeddings false",
            )
        if model.config.num_hidden_layers < ranks.world:
            raise UserError(f"{model.config.num_hidden_layers} layers for {ranks.world} ranks of a pipeline")
        self.model, self.ranks, self.data = model, ranks, Ranks(0, 1, ranks.device)
        self.module, self._schedule, self._scale = _Stage(model, ranks), None, 1.0
        if cfg.compile:
            compile_blocks(model)
        self._materialize(fill)

    def accumulate(self, batches: Iterable[Batch], number: int, loss_fn: Callable, scale: float, autocast) -> Tensor:
        self._check(loss_fn)
        if self._schedule is None:
            self._schedule = self._plan(number)
        self._scale, losses, data = scale, [], list(batches)
        ids, targets = torch.cat([b.ids for b in data]), torch.cat([b.targets for b in data])
        about = {} if data[0].docs is None else {"docs": torch.cat([b.docs for b in data])}
        with autocast:
            if self.module.last:
                self._schedule.step(target=targets, losses=losses, return_outputs=False, targets=targets, **about)
            else:
                self._schedule.step(*[ids] * self.ranks.first, **about)
        return self._mine(sum(losses).detach() / scale, sum(b.count for b in data)) if losses else self._mine(0.0, 0)

    def _plan(self, number: int):
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        if number < self.ranks.world:
            raise UserError(
                f"{number} micro-batches a step for {self.ranks.world} stages: some would only wait",
                "a smaller --micro_batch",
            )
        stage = PipelineStage(self.module, self.ranks.rank, self.ranks.world, self.ranks.device)
        return Schedule1F1B(stage, number, loss_fn=lambda out, _: out.sum() * self._scale, scale_grads=False)

    def _check(self, loss_fn: Callable) -> None:
        if loss_fn is not next_token_loss:
            raise UserError('parallel = "pipeline" trains on next tokens only', "--parallel fsdp")

    def _mine(self, loss_sum, count) -> Tensor:
        """The last rank's numbers; zeros elsewhere, so that they count once."""
        totals = torch.tensor([float(loss_sum), float(count)], dtype=torch.float64, device=self.ranks.device)
        return totals * self.module.last

    def norm(self, parameters: list[nn.Parameter]) -> float:
        square = torch.tensor(super().norm(parameters) ** 2, dtype=torch.float64, device=self.ranks.device)
        return math.sqrt(self.ranks.sum(square).item())

    def samples(self, samples: Callable) -> str:
        return "(a pipeline gives no samples while it trains)"

    def losses(self, data: Batch, loss_fn: Callable) -> Tensor:
        self._check(loss_fn)
        x, rank = data.ids, self.ranks.rank
        if rank:
            x = torch.empty(*data.ids.shape, self.model.config.hidden_size, device=self.ranks.device)
            dist.recv(x, rank - 1)
        x = self.module(x, targets=data.targets, docs=data.docs)
        if not self.module.last:
            dist.send(x.float(), rank + 1)
        return self._mine(x.sum(), data.count)

    def weights(self, trained_only: bool = False) -> dict[str, Tensor]:
        return self._gathered(super().weights(trained_only))


class _Stage(nn.Module):
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
        rope, mask = self.llama.context(x[..., 0] if x.ndim == 3 else x, docs, None)
        x = self.llama.model.embed_tokens(x)
        for i in self.mine:
            x = self.llama.run_block(self.llama.model.layers[i], x, rope, mask, None)
        return self.llama._losses(self.llama.model.norm(x), targets) if self.last else x


def compile_blocks(model: Llama) -> None:
    """Compile the blocks, all with the code of the first; the head's loss makes its own gradients and stays eager."""
    for block in model.model.layers:
        block.compile(fullgraph=True)


def named(model: Llama, optimizers: list) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    """(name, parameter, its optimizer) for every parameter that an optimizer of this rank has."""
    names = {id(p): n for n, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield names[id(p)], p, optimizer
