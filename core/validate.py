"""How good the model is now: losses on rows that it is not trained on, and a sample.

In:  a task and a strategy (see trainer.py). Out: lines, and facts for run.json.
Knows nothing of training or of files.
"""

import math

import torch

from core.checkpoint import State
from core.data import Rows
from core.log import Log, plain
from core.parallel import Strategy


def validate(task, options, strategy: Strategy, autocast, log: Log, state: State) -> tuple[dict, bool]:
    """Measure, and print an early sample.

    Returns:
        step, val_loss in nats and what else run.json says of the model; whether it is the best model so far.
    """
    facts, better = {"step": state.step}, True
    if task.val_rows:
        # Losses are sums: of several sources the one with more targets weighs more.
        strategy.model.eval()
        sizes, parts = {}, {}
        for name, rows in task.val_rows.items():
            sizes[name] = min(len(rows), max(1, options.eval_tokens // rows.seq_len))
            parts[name] = evaluate(task, rows, sizes[name], options.micro_batch, strategy, autocast)
        strategy.model.train()
        loss = sum(nats for nats, _ in parts.values()) / max(1.0, sum(targets for _, targets in parts.values()))
        better = math.isfinite(loss) and (state.best is None or loss < state.best)
        facts["val_loss"], line = plain(loss), f"step {state.step} validation loss {loss:.4f}"
        # Bits per byte can be compared between vocabularies. They need one text, and the number of its bytes.
        (name, rows), (nats, _) = next(iter(task.val_rows.items())), next(iter(parts.values()))
        if len(parts) == 1 and (text_bytes := rows.text_bytes(sizes[name])):
            bits = nats / math.log(2) / text_bytes
            facts["val_bits_per_byte"], line = plain(bits), f"{line} bits/byte {bits:.4f}"
        log(line + " (best so far)" * better)
        # Of several sources each has its own loss.
        if len(parts) > 1:
            means = {name: nats / max(1.0, targets) for name, (nats, targets) in parts.items()}
            log("  of which " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
            facts["val_loss_by_source"] = {name: plain(mean) for name, mean in means.items()}
        log.metrics(facts)
    # A number says little about a text: a sample shows it.
    # A sample says more to people than a loss.
    if task.sample:
        strategy.model.eval()
        log(strategy.sample(task.sample))
        strategy.model.train()
    return facts, better


@torch.no_grad()
def evaluate(task, rows: Rows, number: int, micro_batch: int, strategy: Strategy, autocast) -> tuple[float, float]:
    """Loss in nats, and number of targets, of the first rows."""
    among, total = strategy.data, torch.zeros(2, dtype=torch.float64, device=strategy.ranks.device)
    # Each rank takes its share of the rows; one sum brings the losses together.
    for start in range(0, number, among.world * micro_batch):
        first = start + among.rank * micro_batch
        mine = range(first, min(first + micro_batch, number))
        # Cut models need all ranks in every forward pass: one that has no rows left takes any and does not count them.
        batch = rows.batch(mine or range(1)).to(strategy.ranks.device)
        with autocast:
            loss = task.loss(strategy.module, batch)
        total += torch.stack([loss.double(), batch.count.double()]) * strategy.weight * bool(mine)
    nats, targets = strategy.ranks.sum(total).tolist()
    return nats, targets
