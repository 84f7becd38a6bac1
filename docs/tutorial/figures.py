"""The tutorial's code in, its pictures out: docs/tutorial/img/*.png.

    pip install matplotlib
    python docs/tutorial/figures.py

Every picture shows numbers that the library computes: masks, angles and rates from its functions, losses and attention
weights from the model that chapter 7 trains. Labels are in English, so that no Chinese font is needed.
"""

import sys
from pathlib import Path

import chapters  # first: it tells Python where the library is
import torch

from core import errors
from core.optim import OptimConfig, learning_rate
from model import ModelConfig, positions_and_mask, rope_table

DPI = 100  # with a palette of one hue, a picture this size stays far below 60 KB


def pyplot():
    """matplotlib.pyplot, drawing to files only; UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise errors.UserError("the figures need matplotlib", "pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def mask(plt):
    """Which positions of a row see which: documents of 6, 3, 8, 5 and 2 tokens packed into 24 positions (chapter 3)."""
    docs = torch.repeat_interleave(torch.arange(5), torch.tensor([6, 3, 8, 5, 2]))[None]  # (1, T)
    positions, seen = positions_and_mask(docs, docs)  # (1, T), (1, 1, T, T)
    fig, ax = plt.subplots(figsize=(4.6, 4.4))
    ax.pcolormesh(seen[0, 0].flip(0).numpy(), cmap="Blues", vmax=1.3, edgecolors="lightgrey", linewidth=0.4)
    size = docs.shape[1]
    ax.set_xticks([i + 0.5 for i in range(size)], positions[0].tolist(), fontsize=7)
    ax.set_yticks([size - i - 0.5 for i in range(size)], positions[0].tolist(), fontsize=7)
    ax.set(
        xlabel="key, by its position in its document",
        ylabel="query, by its position in its document",
        title="five documents in one row",
        aspect="equal",
    )
    return fig


def rope(plt):
    """Cosine of the angle of each pair of a head of 16 numbers, at 128 positions (chapter 4)."""
    config = ModelConfig(vocab_size=1, hidden_size=16, num_attention_heads=1)
    cos, _ = rope_table(torch.arange(128)[None], config)  # (1, 1, T, D)
    fig, ax = plt.subplots(figsize=(6.4, 2.6))
    shown = ax.imshow(cos[0, 0, :, :8].T.numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    fig.colorbar(shown, label="cosine of the angle")
    ax.set(xlabel="position p", ylabel="pair i", title="angle = p x 10000^(-2i/16)", yticks=range(8))
    return fig


def attention(plt, trained: dict):
    """Attention weights of every head of the last layer of chapter 7's model, on its first row (chapter 4)."""
    model, (ids, _, _) = trained["trained"], trained["rows"].row(0)
    ids = torch.from_numpy(ids)[None]  # (1, T)
    with torch.no_grad():
        turned, _ = model.context(ids, None)
        x = model.model.embed_tokens(ids)
        *before, last = model.model.layers
        for block in before:
            x = block(x, turned, None, None)
        q, k, _ = last.self_attn.project(last.input_layernorm(x), turned)  # (1, H, T, D)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)[0]  # (H, T, T)
    fig, axes = plt.subplots(1, len(weights), figsize=(8.4, 2.7), sharey=True)
    for head, (ax, w) in enumerate(zip(axes, weights)):
        ax.imshow(w.numpy(), cmap="Blues", vmin=0, vmax=0.6, interpolation="nearest")
        ax.set(title=f"head {head}", xlabel="key", xticks=range(0, 16, 5), yticks=range(0, 16, 5))
    axes[0].set_ylabel("query")
    return fig


def schedule(plt):
    """The learning rate over 1,000 steps, both schedules (chapter 6)."""
    fig, ax = plt.subplots(figsize=(5.6, 2.8))
    for name in ("cosine", "wsd"):
        cfg = OptimConfig(schedule=name)
        ax.plot([learning_rate(step, 1000, cfg) for step in range(1000)], label=name)
    ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None), title="warmup_steps 100, lr 3e-4, min_lr 3e-5")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    ax.legend()
    return fig


def loss(plt, trained: dict):
    """Losses of chapter 7's run."""
    fig, ax = plt.subplots(figsize=(5.6, 2.8))
    ax.plot(trained["losses"], label="trainer.train")
    size = trained["tok"].vocab_size
    ax.axhline(torch.tensor(size).log().item(), linestyle=":", color="grey", label=f"ln {size}")
    ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    ax.legend()
    return fig


def draw(folder: Path) -> list[Path]:
    """Draw every figure.

    Args:
        folder: made if it is missing; files of the same names are replaced.

    Returns:
        the files.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt, trained = pyplot(), {}
    with chapters.empty_folder():
        for _ in chapters.run(chapters.chapter(7), trained):
            pass
        drawn = {
            "mask": mask(plt),
            "attention": attention(plt, trained),
            "rope": rope(plt),
            "schedule": schedule(plt),
            "loss": loss(plt, trained),
        }
    folder.mkdir(parents=True, exist_ok=True)
    for name, fig in drawn.items():
        # Without the writer's version: the same numbers give the same file.
        fig.savefig(folder / f"{name}.png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        plt.close(fig)
    return [folder / f"{name}.png" for name in drawn]


def main() -> None:
    if len(sys.argv) > 1:
        raise errors.UserError(f"{sys.argv[1]}: figures.py takes no options")
    for path in draw(chapters.HERE / "img"):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    errors.run(main)
