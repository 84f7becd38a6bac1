"""One training step of a Llama as others write it, for `python -m bench train`.

In:  sizes, ids, dtype. Out: one optimizer step, and its loss, each time one is asked for.
Each peer is that project's model in the plainest loop its documentation shows: forward under autocast, backward, clip,
AdamW as torch makes it by default. Ours is trainer.py's own loop. pip install transformers; litgpt with --no-deps, and
lightning.
Knows nothing of files or of the other contestants.

    python -m bench.peers '{"peer": "classic", ...}'       # a line in: take a step; a line out: what it took
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.data import Batch
from core.device import DTYPES
from core.distributed import Ranks
from core.memory import save_memory
from core.optim import OptimConfig, make_optimizers
from core.parallel import Strategy
from model import Llama, ModelConfig, rope_table
from trainer import Task, TrainConfig, next_token_loss, train

PEERS = ("ours", "transformers", "trainer", "litgpt", "classic")
ALONE = Ranks(0, 1, torch.device("cpu"))
NEVER = 1 << 40  # steps


@dataclass(frozen=True)
class Setup:
    """What all contestants train, and how.

    Attributes:
        ids: (B, T + 1), always the same ones: speed does not depend on them.
        checkpointing: none, selective or full; theirs know only on and off.
    """

    config: ModelConfig
    ids: Tensor
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    checkpointing: str = "none"
    micro_batches: int = 1


def main() -> None:
    """For each line that comes, a line: seconds and loss of a step; then the highest memory of the process."""
    asked = json.loads(sys.argv[1])
    torch.manual_seed(0)
    ids = torch.randint(0, asked["sizes"]["vocab_size"], (asked["rows"], asked["seq_len"] + 1))
    options = {name: asked[name] for name in ("compiled", "checkpointing", "micro_batches")}
    setup = Setup(ModelConfig(**asked["sizes"]), ids, DTYPES[asked["dtype"]], **options)
    compete(asked["peer"], setup, Turns())
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    about = {"peak_gb": int(peak) * 1024 / 1e9}
    if asked["peer"] == "ours" and not setup.compiled and setup.checkpointing == "none":
        about["parts"] = parts(setup)
    print(json.dumps(about), flush=True)


def compete(peer: str, setup: Setup, turns) -> None:
    """Steps for as long as turns.wait()."""
    if peer in ("ours", "trainer"):  # they have loops of their own
        return (ours if peer == "ours" else trainer)(setup, turns)
    step = step_of(peer, setup)
    while turns.wait():
        turns.tell(step())


class Turns:
    """Who asks for the steps: a line in for each, its seconds and loss as a line out."""

    def wait(self) -> bool:
        asked = bool(sys.stdin.readline())
        self.began = time.perf_counter()
        return asked

    def tell(self, loss: float) -> None:
        told = {"seconds": time.perf_counter() - self.began, "loss": loss}
        print(json.dumps(told), file=sys.__stdout__, flush=True)  # what a loop itself prints goes elsewhere


# ---------------------------------------------------------------- ours


def fresh_model(config: ModelConfig) -> Llama:
    """A Llama with its first weights."""
    model = shapes_of(config)
    Strategy(model, shapes_of(config).weights_at_birth(0), TrainConfig(), ALONE, torch.float32)
    return model


def shapes_of(config: ModelConfig) -> Llama:
    """A Llama on the meta device."""
    with torch.device("meta"):
        return save_memory(Llama(config))


class Enough(Exception):
    """No more steps are asked for."""


class SameRows:
    """Rows of which all are alike; the first micro-batch of a step waits until the step is asked for."""

    digest = "the same"

    def __init__(self, setup: Setup, turns):
        self.turns, self.micro_batches, self.given = turns, setup.micro_batches, 0
        self.ids, self.targets = setup.ids[:, :-1], setup.ids[:, 1:]
        self.seq_len = self.ids.shape[1]

    def __len__(self) -> int:
        return 1 << 40

    def batch(self, indices: Sequence[int]) -> Batch:
        if self.given % self.micro_batches == 0 and not self.turns.wait():
            raise Enough
        self.given += 1
        return Batch(self.ids, self.targets, None, list(indices))

    def where(self, i: int) -> str:
        return "random ids"


def ours(setup: Setup, turns) -> None:
    """The loop itself, trainer.py: all that a run does in a step, its records among it, but for reading data."""
    model, rows = shapes_of(setup.config), SameRows(setup, turns)
    task = Task(model, shapes_of(setup.config).weights_at_birth(0), rows, {}, next_token_loss, None, {}, {})
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr), suppress(Enough):
        options = TrainConfig(
            out_dir=folder,
            max_steps=NEVER,
            batch_tokens=setup.micro_batches * rows.ids.numel(),
            micro_batch=len(rows.ids),
            dtype=next(name for name, dtype in DTYPES.items() if dtype == setup.dtype),
            compile=setup.compiled,
            gradient_checkpointing=setup.checkpointing,
            save_every=NEVER,
            eval_every=NEVER,
            log_every=NEVER,
        )
        cfg = SimpleNamespace(train=options, optim=OptimConfig(warmup_steps=0))
        train(task, cfg, ALONE, track=lambda record: turns.tell(record["loss"]))


def parts(setup: Setup) -> dict[str, float]:
    """Seconds of each part of our step, forward and backward, alone and all layers together; medians of five."""
    config, ids, dtype = setup.config, setup.ids, setup.dtype
    model = fresh_model(config)
    block, inputs, targets = model.model.layers[0], ids[:, :-1], ids[:, 1:]
    x = torch.randn(*inputs.shape, config.hidden_size, requires_grad=True)
    rope = rope_table(torch.arange(inputs.shape[1])[None], config)
    ways = {
        "embedding": (1, lambda: model.model.embed_tokens(inputs)),
        "attention": (config.num_hidden_layers, lambda: block.self_attn(x, rope, None)),
        "MLP": (config.num_hidden_layers, lambda: block.mlp(x)),
        "norms": (2 * config.num_hidden_layers + 1, lambda: block.input_layernorm(x)),
        "head and loss": (1, lambda: model.loss(x, model.lm_head, targets)),
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
    (optimizer,) = make_optimizers(model, OptimConfig())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return found | {"optimizer": statistics.median(seconds)}


# ---------------------------------------------------------------- transformers and litgpt


def trainer(setup: Setup, turns) -> None:
    """transformers' Trainer, which waits before each step and tells after it. In the main thread: glibc's allocator
    keeps no large memory for others."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model, _ = transformers(setup.config, setup.checkpointing != "none")
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
        per_device_train_batch_size=len(setup.ids),
        gradient_accumulation_steps=setup.micro_batches,
        max_steps=1 << 20,
        learning_rate=3e-4,
        adam_beta2=0.95,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        bf16=setup.dtype == torch.bfloat16,
        use_cpu=True,
        torch_compile=setup.compiled,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in setup.ids[:, :-1]] * setup.micro_batches * 1024
    work = Noting(model=model, args=options, train_dataset=rows, callbacks=[AsAsked()])
    work.remove_callback(PrinterCallback)  # standard output is ours
    work.train()


def step_of(peer: str, setup: Setup) -> Callable[[], float]:
    """The peer's step in the plainest loop."""
    make = {"transformers": transformers, "litgpt": litgpt, "classic": classic}[peer]
    model, loss_of = make(setup.config, setup.checkpointing != "none")
    if setup.compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    context = nullcontext() if setup.dtype == torch.float32 else torch.autocast("cpu", setup.dtype)
    ids, count = setup.ids, setup.micro_batches

    def step() -> float:
        for _ in range(count):
            with context:
                loss = loss_of(model, ids[:, :-1], ids[:, 1:]) / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() * count

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
    main()
