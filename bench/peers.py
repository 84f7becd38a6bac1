"""One training step of a Llama as others write it, for `python -m bench train`.

In:  sizes, ids, dtype. Out: a function that takes one optimizer step and returns the loss.
Each peer is that project's model in the plainest loop its documentation shows: forward under autocast, backward, clip,
AdamW as torch makes it by default. Ours is what core/engine.py does in a step. pip install transformers; litgpt with
--no-deps, and lightning.
Knows nothing of files or of the other contestants.

    python -m bench.peers '{"peer": "classic", ...}'       # a line in: take steps; a line out: what they took
"""

import functools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelConfig

PEERS = ("ours", "transformers", "trainer", "litgpt", "classic")


def serve(
    peer: str, sizes: dict, rows: int, seq_len: int, dtype: str, compiled: bool, checkpointing: str, micro_batches: int
) -> None:
    """For each line that comes, a line: seconds and loss of a step; then the highest memory of the process."""
    torch.manual_seed(0)
    ids = torch.randint(0, sizes["vocab_size"], (rows, seq_len + 1))
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    config = ModelConfig(**sizes)
    compete(peer, config, ids, kind, compiled, checkpointing, micro_batches, Turns())
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    about = {"peak_gb": int(peak) * 1024 / 1e9}
    if peer == "ours" and not compiled and checkpointing == "none":
        about["parts"] = parts(config, ids, kind)
    print(json.dumps(about), flush=True)


def compete(
    peer: str,
    config: ModelConfig,
    ids: Tensor,
    dtype: torch.dtype,
    compiled: bool,
    checkpointing: str,
    micro_batches: int,
    turns,
) -> None:
    """Steps on ids (B, T + 1), always the same ones (speed does not depend on them), for as long as turns.wait()."""
    if peer == "trainer":
        trainer(config, ids, dtype, compiled, checkpointing, micro_batches, turns)
        return
    make = ours if peer == "ours" else functools.partial(step_of, peer)
    step = make(config, ids, dtype, compiled, checkpointing, micro_batches)
    while turns.wait():
        turns.tell(step())


class Turns:
    """Who asks for the steps: a line in for each, its seconds and loss as a line out."""

    def wait(self) -> bool:
        asked = bool(sys.stdin.readline())
        self.began = time.perf_counter()
        return asked

    def tell(self, loss: float) -> None:
        print(json.dumps({"seconds": time.perf_counter() - self.began, "loss": loss}), flush=True)


def parts(config: ModelConfig, ids: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of each part of our step, forward and backward, alone and all layers together; medians of five."""
    from core import optim
    from model import Llama, rope_table

    model = Llama(config)
    model.init_weights(0)
    block, inputs, targets = model.model.layers[0], ids[:, :-1], ids[:, 1:]
    x = torch.randn(*inputs.shape, config.hidden_size, requires_grad=True)
    rope = rope_table(torch.arange(inputs.shape[1])[None], config)
    ways = {
        "embedding": (1, lambda: model.model.embed_tokens(inputs)),
        "attention": (config.num_hidden_layers, lambda: block.self_attn(x, rope, None, None)),
        "MLP": (config.num_hidden_layers, lambda: block.mlp(x)),
        "norms": (2 * config.num_hidden_layers + 1, lambda: block.input_layernorm(x)),
        "head and loss": (1, lambda: model._losses(x, targets)),
    }
    found = {}
    for name, (times, way) in ways.items():
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                y = way().sum()
            y.backward()
            seconds.append(time.perf_counter() - began)
            model.zero_grad()
        found[name] = times * statistics.median(seconds)
    (optimizer,) = optim.make_optimizers(model, optim.OptimConfig())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return found | {"optimizer": statistics.median(seconds)}


def ours(
    config: ModelConfig, ids: Tensor, dtype: torch.dtype, compiled: bool, checkpointing: str, micro_batches: int
) -> Callable[[], float]:
    """A step of core/engine.py, without the data and the log."""
    import trainer
    from core import optim, parallel
    from core.data import Batch
    from core.distributed import Ranks
    from core.loss import next_token_loss
    from extras.estimate import memory
    from model import Llama

    memory.keep_freed_memory()
    model, ranks = Llama(config), Ranks(0, 1, torch.device("cpu"))
    model.init_weights(0)
    model.gradient_checkpointing = checkpointing
    cfg, options = trainer.TrainConfig(compile=compiled), optim.OptimConfig()
    spread = parallel.spread(model, cfg, ranks, dtype)
    optimizers, parameters = optim.make_optimizers(model, options), list(model.parameters())
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    batch = Batch(ids[:, :-1], ids[:, 1:], None, [])
    targets = micro_batches * ids[:, 1:].numel()

    def step() -> float:
        mine = spread.accumulate([batch] * micro_batches, micro_batches, next_token_loss, 1 / targets, autocast)
        loss, count = mine.tolist()
        assert math.isfinite(trainer._finish_gradients(spread, parameters, targets / count, options))
        for optimizer in optimizers:
            optimizer.step()
        for p in parameters:
            p.grad = None
        return loss / count

    return step


def trainer(
    config: ModelConfig, ids: Tensor, dtype: torch.dtype, compiled: bool, checkpointing: str, micro_batches: int, turns
) -> None:
    """transformers' Trainer, which waits before each step and tells after it. In the main thread: glibc's allocator
    keeps no large memory for others."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model, _ = transformers(config, checkpointing != "none")
    losses = []

    class AsAsked(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            control.should_training_stop = not turns.wait()  # after one step more, which nobody counts

        def on_step_end(self, args, state, control, **_):
            if not control.should_training_stop:
                turns.tell(losses[-1])

    class Noting(Trainer):
        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            losses.append(loss.item())
            return loss

    options = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(ids),
        gradient_accumulation_steps=micro_batches,
        max_steps=1 << 20,
        learning_rate=3e-4,
        adam_beta2=0.95,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        torch_compile=compiled,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids[:, :-1]] * micro_batches * 1024
    work = Noting(model=model, args=options, train_dataset=rows, callbacks=[AsAsked()])
    work.remove_callback(PrinterCallback)  # standard output is ours
    work.train()


def step_of(
    peer: str,
    config: ModelConfig,
    ids: Tensor,
    dtype: torch.dtype,
    compiled: bool,
    checkpointing: str,
    micro_batches: int,
) -> Callable[[], float]:
    """The peer's step in the plainest loop."""
    make = {"transformers": transformers, "litgpt": litgpt, "classic": classic}[peer]
    model, loss_of = make(config, checkpointing != "none")
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    context = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    def step() -> float:
        for _ in range(micro_batches):
            with context:
                loss = loss_of(model, ids[:, :-1], ids[:, 1:]) / micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() * micro_batches

    return step


def transformers(config: ModelConfig, checkpointing: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}, use_cache=False))
    if checkpointing:
        model.gradient_checkpointing_enable()

    def loss(model, ids, targets):
        # transformers shifts labels by itself; the last position has none
        return model(input_ids=ids, labels=F.pad(targets[:, :-1], (1, 0), value=-100)).loss

    return model.train(), loss


def litgpt(config: ModelConfig, checkpointing: bool):
    from litgpt import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    assert not checkpointing, "litgpt's recipe has none on one device"
    model = GPT(
        Config(
            name="bench",
            block_size=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_query_groups=config.num_key_value_heads,
            n_embd=config.hidden_size,
            rotary_percentage=1.0,
            bias=False,
            parallel_residual=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=config.intermediate_size,
        )
    )
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model, lambda model, ids, targets: chunked_cross_entropy(model(ids), targets)


# ---------------------------------------------------------------- the classic small-repository loop


def classic(config: ModelConfig, checkpointing: bool):
    """What small repositories have from llama2.c's train.py: rotation by complex numbers, all logits at once."""
    assert not checkpointing, "that loop has none"
    return Classic(config), lambda model, ids, targets: F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c, f, self.heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.q, self.k, self.v, self.o = (nn.Linear(c, c, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(c, f, bias=False) for _ in range(2))
        self.down = nn.Linear(f, c, bias=False)
        self.norm1, self.norm2 = Norm(c), Norm(c)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        b, t, c = x.shape
        h = self.norm1(x)
        q, k, v = (w(h).view(b, t, self.heads, -1) for w in (self.q, self.k, self.v))
        q, k = self.turn(q, angles), self.turn(k, angles)
        y = F.scaled_dot_product_attention(*(w.transpose(1, 2) for w in (q, k, v)), is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, c))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    @staticmethod
    def turn(x: Tensor, angles: Tensor) -> Tensor:
        """Pairs as complex numbers: (B, T, H, D), angles (T, D / 2) complex."""
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * angles[None, :, None]).flatten(3).type_as(x)


class Classic(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        half = torch.arange(0, config.head_dim, 2) / config.head_dim
        angle = torch.arange(config.max_position_embeddings)[:, None] * config.rope_theta**-half
        self.register_buffer("angles", torch.polar(torch.ones_like(angle), angle), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.angles[: ids.shape[1]])
        return self.head(self.norm(x))


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
