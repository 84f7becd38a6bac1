"""Run folders in, one picture of their curves out: a PNG.

    python plot.py out/pretrain out/sft                           # writes curves.png
    python plot.py out/slow out/fast --output lr.png --smooth 50

Reads metrics.jsonl of each folder, also while the run goes on. Thin lines are single steps, thick ones the mean of the
steps around each. Runs differ in colour, dashes and markers: in grey print, and for colour-blind readers, too.
Needs matplotlib (pip install -r requirements-plot.txt). Knows nothing of models, data or the training loop.
"""

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from core import config, errors, files
from core.config import Range, Section
from core.errors import UserError

# Okabe and Ito's palette without its yellow, too pale on paper; neighbours differ in lightness as well as in hue.
# Source: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v")
MOST_RUNS = 28  # 7 colours and 4 kinds of dashes without a common divisor: no two runs share both
DPI = 150
FEW = 40  # so many points are marked one by one
FONT = "DejaVu Sans"  # comes with matplotlib


@dataclass(frozen=True)
class PlotConfig(Section):
    output: str = "curves.png"  # an earlier one is replaced
    # Steps in the thick line's mean; 1: single steps only; 0: a 25th of the longest run.
    smooth: Annotated[int, Range(least=0)] = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.output.lower().endswith(".png"):
            raise ValueError(f"output = {self.output!r}, must end in .png")


@dataclass(frozen=True)
class Curves:
    """One run: what the picture calls it, and the records of its metrics.jsonl in their order."""

    name: str
    records: list[dict]


def get_speed(record: dict) -> float | None:
    """Tokens per second of a training step, those without a loss included where the record says how many; else None."""
    tokens = record.get("tokens", record.get("targets"))
    return tokens / record["seconds"] if tokens and record["seconds"] else None


def get_loss_without_bytes(record: dict) -> float | None:
    """The validation loss where bits per byte are not known, as of chats."""
    return None if "val_bits_per_byte" in record else record.get("val_loss")


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    key: str  # records without it have no point here
    value: Callable[[dict], float | None]
    noisy: bool = False  # differs from step to step: thin line and mean
    lowest: bool = False  # the picture names its lowest value: that of the model in the run folder
    from_zero: bool = False


def make_panels() -> list[Panel]:
    """All panels in the order of the picture."""
    return [
        Panel("training loss", "nats per token", "loss", lambda r: r["loss"], noisy=True),
        Panel("validation bits per byte", "bits", "val_bits_per_byte", lambda r: r["val_bits_per_byte"], lowest=True),
        Panel("validation loss", "nats per token", "val_loss", get_loss_without_bytes, lowest=True),
        Panel("learning rate", "", "lr", lambda r: r["lr"]),
        Panel("gradient norm before clipping", "", "grad_norm", lambda r: r["grad_norm"], noisy=True),
        Panel("speed", "tokens per second", "seconds", get_speed, noisy=True, from_zero=True),
    ]


def main() -> None:
    # Run folders stand in front of the options.
    words = sys.argv[1:]
    number = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    if not number and not {"-h", "--help"} & {*words}:
        raise UserError("no run folder in front of the options", "python plot.py out/pretrain out/sft")
    cfg = config.load(__doc__, {"plot": PlotConfig}, words[number:]).plot
    require_matplotlib()

    # Records in, picture out.
    runs = [read(folder, name) for folder, name in zip(words, choose_names(words[:number]))]
    picture, path = draw_figure(runs, cfg.smooth), Path(cfg.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, lambda p: p.write_bytes(make_png(picture)))
    print(f"{path}: {len(picture.axes)} panels of {', '.join(f'{r.name} ({len(r.records):,} records)' for r in runs)}")


def require_matplotlib() -> None:
    """UserError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("a picture needs the package matplotlib", "pip install -r requirements-plot.txt") from None


def choose_names(folders: list[str]) -> list[str]:
    """What to call each folder: its own name where no other has it, else the whole path as given."""
    own = [Path(folder).resolve().name for folder in folders]
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise UserError(f"{' '.join(folders)}: the same folder is given twice")
    return [name if own.count(name) == 1 else folder for name, folder in zip(own, folders)]


def read(folder: str, name: str) -> Curves:
    """The records of a run; lines that are none, as a kill leaves them, are counted on stderr.

    Raises:
        UserError: there is no metrics.jsonl, or no record in it.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file", "a folder that pretrain.py or sft.py has written has one")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = [record for line in lines if (record := parse(line))]
    if torn := sum(bool(line.strip()) for line in lines) - len(records):
        print(f"note: {path}: {torn} torn lines are left out", file=sys.stderr)
    if not records:
        raise UserError(f"{path}: no record in it yet")
    return Curves(name, records)


def parse(line: str) -> dict | None:
    """A line's record, or None if it is torn."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def read_points(run: Curves, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Steps (N,) and values (N,) of a run's points in a panel; what is no finite number is NaN, a gap in the line."""
    records = [r for r in run.records if panel.key in r]
    values = [panel.value(r) for r in records]
    finite = [v if isinstance(v, (int, float)) and math.isfinite(v) else math.nan for v in values]
    return np.array([r["step"] for r in records]), np.array(finite, dtype=float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Means over the `window` points around each, fewer at the ends; gaps do not count and stay gaps.

    Args:
        values: (N,), NaN where a gap is.
    Returns:
        (N,)
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.arange(len(values)) - window // 2
    low, high = np.maximum(first, 0), np.minimum(first + window, len(values))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, math.nan)


def draw_figure(runs: list[Curves], window: int = 0):
    """A matplotlib Figure with a panel for each quantity that any of the runs has.

    Args:
        window: steps in the mean that thick lines show; 0: a 25th of the longest run.
    Raises:
        UserError: more runs than can be told apart, or nothing to draw.
    """
    from matplotlib.figure import Figure

    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs: more than {MOST_RUNS} cannot be told apart in one picture")
    # The points of all runs in each panel; a panel without a number in any of them is left out.
    window = window or max(1, max(sum("loss" in r for r in run.records) for run in runs) // 25)
    drawn = [(panel, [read_points(run, panel) for run in runs]) for panel in make_panels()]
    drawn = [(panel, points) for panel, points in drawn if any(np.isfinite(values).any() for _, values in points)]
    if not drawn:
        raise UserError("none of the runs has a number to draw")

    # Two panels in a row. All show the same steps: what happens at a step is at the same place in each.
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    last = max(steps.max() for _, points in drawn for steps, _ in points if len(steps))
    picture = Figure(figsize=(4.5 * columns, 0.7 + 2.4 * rows), dpi=DPI, layout="constrained")
    for at, (panel, points) in enumerate(drawn):
        axes = picture.add_subplot(rows, columns, at + 1)
        axes.set_title(panel.title, fontsize=11)
        axes.set_ylabel(panel.unit)
        if at >= len(drawn) - columns:
            axes.set_xlabel("step")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        for number, (steps, values) in enumerate(points):
            if np.isfinite(values).any():
                draw_run(axes, panel, steps, values, choose_style(number), window, faint=max(0.1, 0.6 / len(runs)))
        axes.set_xlim(0, 1.06 * last)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    draw_legend(picture, runs, window)
    return picture


def make_png(picture) -> bytes:
    """The picture as a PNG of 64 colours: lines on white need no more, and a third of the bytes does."""
    from PIL import Image  # comes with matplotlib

    full, small = io.BytesIO(), io.BytesIO()
    picture.savefig(full, format="png")
    few = Image.open(full).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(small, "png", optimize=True, dpi=(DPI, DPI))
    return small.getvalue()


def choose_style(number: int) -> dict:
    """How the lines of a run look."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.8,
    }


def draw_run(axes, panel: Panel, steps: np.ndarray, values: np.ndarray, look: dict, window: int, faint: float) -> None:
    """One run in one panel."""
    if panel.noisy and window > 1:
        # Below the thick lines of all runs, and the fainter the more they are.
        axes.plot(steps, values, color=look["color"], linewidth=0.7, alpha=faint, zorder=1.5, gid="steps")
        values = smooth(values, window)
    axes.plot(steps, values, **look | ({} if len(steps) <= FEW else {"marker": ""}), gid="line")
    if panel.lowest:
        axes.lines[-1].set_label(f"lowest {np.nanmin(values):.3f}")
        axes.legend(fontsize=9, handlelength=4, frameon=False)


def draw_legend(picture, runs: list[Curves], window: int) -> None:
    """The runs' names above all panels, and below what the lines show."""
    from matplotlib.lines import Line2D

    # Each name in a font that has its characters; a number where there is none.
    labels, fonts = [], [FONT]
    for number, run in enumerate(runs):
        font = find_font(run.name)
        if font is None:
            print(
                f"note: no font here has all characters of {run.name}: the picture calls it run {number + 1}",
                file=sys.stderr,
            )
        elif font not in fonts:
            fonts.append(font)
        # matplotlib before 3.10 leaves out what begins with an underscore, hence the space; $ would begin a formula.
        labels.append(" " + (run.name if font else f"run {number + 1}").replace("$", r"\$"))

    # A line of each run's style beside its name.
    handles = [Line2D([], [], **choose_style(number)) for number in range(len(runs))]
    picture.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(runs), 4),
        frameon=False,
        handlelength=4,
        prop={"family": fonts, "size": 11},
    )
    if window > 1:
        picture.supxlabel(f"thin: single steps, thick: mean over {window} steps", fontsize=9, color="0.3")


def find_font(text: str) -> str | None:
    """The family of an installed font that has what matplotlib's own lacks of a text; None: there is none."""
    from matplotlib import font_manager

    def has(path: str, characters: set[str]) -> bool:
        try:
            font = font_manager.get_font(path)
            return all(font.get_char_index(ord(c)) for c in characters)
        except (OSError, RuntimeError):  # a font that freetype cannot read, as some of emoji
            return False

    # Matplotlib's own font will do for most names.
    own = font_manager.findfont(FONT)
    lacking = {c for c in text if not has(own, {c})}
    if not lacking:
        return FONT
    # Upright and of normal weight first. The Last Resort font, which comes with matplotlib, has a box for everything.
    fonts = sorted(font_manager.fontManager.ttflist, key=lambda f: (f.style != "normal", f.weight != 400, f.name))
    return next((f.name for f in fonts if not f.name.startswith("Last Resort") and has(f.fname, lacking)), None)


if __name__ == "__main__":
    errors.run(main)
