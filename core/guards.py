"""What ends a run before its last step: a stop signal, numbers that are none, a loss that stands out.

In:  signals, losses, norms. Out: a flag, or an error that says what to do.
Knows nothing of models or files.
"""

import math
import os
import signal
from collections import deque
from collections.abc import Callable

from core.errors import Diverged
from core.optim import LossScale


class StopSignals:
    """SIGTERM and SIGINT ask for a stop after the running step; a second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "StopSignals":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number, frame) -> None:
        # Not much may happen in a handler; the loop looks at `asked` at the end of its step.
        self.asked = True
        for either in self._before:
            signal.signal(either, signal.SIG_DFL)
        os.write(2, b"stopping after this step; once more stops at once, without saving\n")

    def __exit__(self, *error) -> None:
        # As they were: the program goes on after the training.
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Spikes:
    """Tells, or stops at, a loss far above those of the steps before: a bad row, or the beginning of divergence.

    Source: the rule of OLMo's trainer, 6 standard deviations over 128 steps.
    """

    def __init__(self, stop: bool, log: Callable[[str], None]):
        self.stop, self.log = stop, log
        self.recent: deque[float] = deque(maxlen=128)

    def see(self, step: int, loss: float) -> None:
        # Before 128 losses are known nothing is usual, and nothing stands out.
        recent = self.recent
        # With fewer losses one knows too little: at the beginning they fall steeply.
        if len(recent) == recent.maxlen:
            usual = sum(recent) / len(recent)
            limit = usual + 6 * math.sqrt(sum((other - usual) ** 2 for other in recent) / len(recent))
            if loss > limit:
                line = f"step {step}: loss {loss:.4f} is above {limit:.4f}, 6 sigma over the 128 before"
                if self.stop:
                    raise Diverged(line, "the weights were not touched; a lower --lr, or look at its rows")
                self.log(f"warning: {line}")
        recent.append(loss)


def refuse_non_finite(what: str, overflows: int, scaler: LossScale | None, rows: dict, note: Callable) -> None:
    """Non-finite numbers are normal in fp16 while the scale settles; in any other case training has diverged.

    Args:
        what: the step and its numbers.
        overflows: of the steps before, in a row.
        rows: number -> where it comes from, of each row of the step.
        note: called with what is to be kept for the user.
    Raises:
        Diverged: unless the scale is still settling.
    """
    if scaler and overflows < 20 and scaler.scale >= 1:
        return
    # What the user needs to look for the cause: the numbers of the step, and the rows that it read.
    what += f", scale {scaler.scale:g}" if scaler else ""
    note({"what": what, "rows": rows})
    some = f"rows {list(rows)[:4]}: {'; '.join(list(rows.values())[:4])}; all {len(rows)} in diverged.json"
    raise Diverged(f"{what}; {some}", "the weights were not touched; a lower --lr or --dtype fp32 may help")
