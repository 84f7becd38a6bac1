"""What pretrain.py and sft.py do to a base model before they train it: longer contexts, LoRA, QLoRA.

In:  an opened model, the sections `long` and `lora`. Out: `fill` and saver for `engine.train`.
Knows nothing of texts or chats.
"""

from collections.abc import Callable
from pathlib import Path

from core.errors import UserError
from extras import longlora, lora, nf4
from model import Llama


def begin(model: Llama, fill: Callable, cfg, base: Path | str, identity: dict, intro: list[str]):
    """Change a model on the meta device as the options say, in place.

    Args:
        cfg: with sections long, lora, optim and train.
        base: the folder that was opened; "": a model with new weights.
        identity: of the run; gets what a resumed run must share.
        intro: lines for the run's beginning; gets what is trained.
    Returns:
        `fill` for the whole, and the saver, None for a whole model.
    Raises:
        UserError: options that do not go together.
    """
    if not base and (cfg.lora.r or cfg.long.context):
        raise UserError("LoRA and longer contexts start from a model that there is", "--init_from DIR")
    changes = longlora.begin(model, cfg.long)
    if changes or cfg.long.shifted:
        identity["long"] = changes | {"shifted": cfg.long.shifted}
    if not cfg.lora.r:
        return fill, None
    check(cfg)
    weight = nf4.Weight if cfg.lora.quantize else None
    fill, saver = lora.begin(model, fill, cfg.lora, cfg.train.seed, base, weight, changes)
    identity["lora"] = saver.identity
    trained, frozen = ([p for p in model.parameters() if p.requires_grad is flag] for flag in (True, False))
    kind = "QLoRA" if cfg.lora.quantize else "LoRA"
    intro.append(f"{kind}: {sum(p.numel() for p in trained):,} parameters are trained, "
                 f"{sum(p.numel() * p.element_size() for p in frozen) / 1e6:,.0f} MB are frozen")  # fmt: skip
    return fill, saver


def check(cfg) -> None:
    """Refuse options that do not go with LoRA."""
    if cfg.optim.optimizer == "muon":  # its updates have full rank, a product's factors do not
        raise UserError("optimizer = \"muon\" does not go with LoRA", "--optimizer adamw, or configs/lora.toml")
    if cfg.train.max_memory_gb:
        raise UserError("max_memory_gb knows what training of all weights needs, not LoRA")
    if cfg.lora.quantize and cfg.train.parallel == "fsdp":
        raise UserError("parallel = \"fsdp\" does not go with quantize", "--parallel ddp: packed weights are small")
