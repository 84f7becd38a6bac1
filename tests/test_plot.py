"""plot.py draws the numbers of metrics.jsonl, all of them and no others, so that runs can be told apart."""

import itertools
import json
import math
import random
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import small_run

import plot
from core.errors import UserError

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]


def training(steps: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "step": s,
            "loss": 8 / s + rng.random(),
            "lr": 1e-3 / s,
            "grad_norm": rng.random(),
            "targets": rng.randint(50, 99),
            "seconds": 0.1 + rng.random(),
        }
        for s in range(1, steps + 1)
    ]


def write(folder: Path, records: list[dict], rest: str = "") -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + rest, encoding="utf-8")
    return str(folder)


def panels(picture, gid: str = "line") -> dict[str, list[tuple[list, list]]]:
    """Title -> steps and values of each line of a kind, gaps as None."""
    return {
        axes.get_title(): [
            ([*map(int, line.get_xdata())], [None if math.isnan(v) else float(v) for v in line.get_ydata()])
            for line in axes.lines
            if line.get_gid() == gid
        ]
        for axes in picture.axes
    }


def legend_names(picture) -> list[str]:
    return [text.get_text().strip() for text in picture.legends[0].get_texts()]


def call(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "plot.py"), *words], capture_output=True, text=True)


def test_every_panel_shows_the_numbers_of_the_file_at_their_steps(tmp_path):
    records = training(30)
    for record in records[:15]:
        record["tokens"] = 200  # as engine.py writes; older runs tell targets only
    validations = [{"step": s, "val_loss": 4 / s, "val_bits_per_byte": 2 / s} for s in (10, 20, 30)]
    mixed = sorted(records + validations, key=lambda r: r["step"])
    drawn = panels(plot.draw_figure([plot.read(write(tmp_path / "a", mixed), "a")], window=1))
    steps = [*range(1, 31)]
    assert drawn == {
        "training loss": [(steps, [r["loss"] for r in records])],
        "validation bits per byte": [([10, 20, 30], [0.2, 0.1, 2 / 30])],
        "learning rate": [(steps, [r["lr"] for r in records])],
        "gradient norm before clipping": [(steps, [r["grad_norm"] for r in records])],
        "speed": [
            (steps, [200 / r["seconds"] for r in records[:15]] + [r["targets"] / r["seconds"] for r in records[15:]])
        ],
    }


def test_the_records_of_a_real_run_are_drawn_and_their_fields_documented(tmp_path):
    small_run.run(tmp_path / "run", max_steps=6, eval_every=3)
    drawn = panels(plot.draw_figure([plot.read(str(tmp_path / "run"), "run")], window=1))
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert drawn["training loss"] == [([1, 2, 3, 4, 5, 6], [r["loss"] for r in records if "loss" in r])]
    assert drawn["validation bits per byte"] == [
        ([3, 6], [r["val_bits_per_byte"] for r in records if "val_bits_per_byte" in r])
    ]
    assert drawn["speed"] == [
        ([1, 2, 3, 4, 5, 6], [8 * small_run.SEQ_LEN / r["seconds"] for r in records if "loss" in r])
    ]
    assert len(drawn) == 5
    table = (ROOT / "docs/watching.md").read_text(encoding="utf-8")
    assert [key for key in {key for r in records for key in r} if f"| `{key}` |" not in table] == []


def test_a_run_without_bytes_shows_its_validation_loss_and_one_without_validation_no_such_panel(tmp_path):
    books = plot.Curves("books", [{"step": 5, "val_loss": 4.0, "val_bits_per_byte": 2.0}])
    chats = plot.Curves("chats", [{"step": 5, "val_loss": 1.0}, {"step": 9, "val_loss": 0.5}])
    assert panels(plot.draw_figure([books, chats])) == {
        "validation bits per byte": [([5], [2.0])],
        "validation loss": [([5, 9], [1.0, 0.5])],
    }
    assert "validation" not in " ".join(panels(plot.draw_figure([plot.Curves("short", training(3))])))
    with pytest.raises(UserError, match="none of the runs has a number"):
        plot.draw_figure([plot.Curves("empty", [{"step": 1, "loss": None}])])


def test_the_lowest_validation_of_each_run_is_told():
    runs = [
        plot.Curves(str(n), [{"step": s, "val_loss": value} for s, value in enumerate(values)])
        for n, values in enumerate([[3.0, 1.0, 2.0], [None, 2.5, 1.1254]])
    ]
    (axes,) = plot.draw_figure(runs).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lowest 1.000", "lowest 1.125"]


def test_what_is_no_finite_number_becomes_a_gap(tmp_path):
    lines = [
        '{"step": 1, "loss": 3.0}',
        '{"step": 2, "loss": null}',
        '{"step": 3, "loss": NaN}',
        '{"step": 4, "loss": Infinity}',
        '{"step": 5, "loss": "2"}',
        '{"step": 6, "loss": 1.0}',
    ]
    run = plot.read(write(tmp_path / "a", [], "\n".join(lines)), "a")
    for window in (1, 3):
        (line,) = panels(plot.draw_figure([run], window=window))["training loss"]
        assert line == ([1, 2, 3, 4, 5, 6], [3.0, None, None, None, None, 1.0])


@pytest.mark.parametrize("window", [1, 2, 5, 8, 100])
def test_the_mean_is_that_of_a_loop_over_the_points_around(window):
    rng = random.Random(window)
    values = [rng.gauss(0, 3) if rng.random() < 0.8 else math.nan for _ in range(60)]
    expected = []
    for at, value in enumerate(values):
        around = [values[i] for i in range(at - window // 2, at - window // 2 + window) if 0 <= i < len(values)]
        there = [v for v in around if not math.isnan(v)]
        expected.append(sum(there) / len(there) if not math.isnan(value) else math.nan)
    assert plot.smooth(np.array(values), window) == pytest.approx(expected, nan_ok=True, abs=1e-12)


def test_thick_lines_are_means_and_thin_ones_the_single_steps(tmp_path):
    run = plot.Curves("a", training(100))
    for asked, window in ((0, 4), (7, 7)):  # 0: a 25th of the run
        picture = plot.draw_figure([run], asked)
        (_, single), (_, mean) = panels(picture, "steps")["training loss"][0], panels(picture)["training loss"][0]
        assert single == [r["loss"] for r in run.records]
        assert mean == pytest.approx(plot.smooth(np.array(single), window).tolist())
        assert f"mean over {window} steps" in picture.get_supxlabel()
        assert panels(picture, "steps")["learning rate"] == []


def test_any_two_runs_differ_in_colour_or_dashes_and_the_first_ones_in_both_and_in_grey():
    looks = [plot.choose_style(n) for n in range(plot.MOST_RUNS)]
    for a, b in itertools.combinations(looks, 2):
        assert (a["color"], a["linestyle"]) != (b["color"], b["linestyle"])
    for a, b in itertools.combinations(looks[:4], 2):
        assert a["color"] != b["color"] and a["linestyle"] != b["linestyle"] and a["marker"] != b["marker"]
    # Rec. 601, as printers and image programs turn colours into grey.
    grey = [
        sum(w * int(look["color"][i : i + 2], 16) / 255 for w, i in ((0.299, 1), (0.587, 3), (0.114, 5)))
        for look in looks[:3]
    ]
    assert all(abs(a - b) > 0.2 for a, b in itertools.combinations(grey, 2)) and max(grey) < 0.75
    with pytest.raises(UserError, match="told apart"):
        plot.draw_figure([plot.Curves(str(n), training(2)) for n in range(plot.MOST_RUNS + 1)])


def test_runs_are_called_by_their_folders_and_by_their_paths_where_those_are_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["out/a", "old/a", "out/b/", "_c", "$x^2$"]
    assert plot.choose_names(given) == ["out/a", "old/a", "b", "_c", "$x^2$"]
    with pytest.raises(UserError, match="given twice"):
        plot.choose_names(["out/a", "out/../out/a"])
    picture = plot.draw_figure([plot.Curves(name, training(3, n)) for n, name in enumerate(plot.choose_names(given))])
    assert legend_names(picture) == ["out/a", "old/a", "b", "_c", r"\$x^2\$"]
    assert [len(lines) for lines in panels(picture).values()] == [5, 5, 5, 5]


def test_the_command_counts_torn_lines_and_writes_a_png(tmp_path):
    a = write(tmp_path / "a", training(5), '{"step": 6, "lo')
    b = write(tmp_path / "b", training(4), '[1]\n{"loss": 1.0}\n\n')
    done = call(a, b, "--output", str(tmp_path / "new/both.png"), "--smooth", "2")
    assert done.returncode == 0, done.stderr
    assert "a/metrics.jsonl: 1 torn" in done.stderr and "b/metrics.jsonl: 2 torn" in done.stderr
    assert "both.png: 4 panels of a (5 records), b (4 records)" in done.stdout
    data = (tmp_path / "new/both.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">II", data[16:24])[0] == 9 * 150
    assert struct.unpack(">I", data[data.index(b"pHYs") + 4 :][:4])[0] == pytest.approx(150 / 0.0254, abs=1)


def test_long_noisy_runs_make_a_small_file():
    runs = [plot.Curves(f"run {n}", training(5_000, n)) for n in range(4)]
    assert len(plot.make_png(plot.draw_figure(runs))) < 150_000


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "error: no run folder in front of the options -- python plot.py out/pretrain out/sft"),
        (["--smooth", "5", "a"], "error: no run folder in front of the options -- python plot.py out/pretrain out/sft"),
        (
            ["{}/none"],
            "error: {}/none/metrics.jsonl: no such file -- a folder that pretrain.py or sft.py has written has one",
        ),
        (["{}/empty"], "error: {}/empty/metrics.jsonl: no record in it yet"),
        (["{}/empty", "--output", "a.jpg"], "error: [plot] output = 'a.jpg', must end in .png -- set in --output"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_exit_2(tmp_path, words, line):
    write(tmp_path / "empty", [])
    done = call(*(word.format(tmp_path) for word in words))
    assert (done.returncode, done.stderr.strip()) == (2, line.format(tmp_path))


def test_without_matplotlib_the_command_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["plot.py", write(tmp_path / "a", training(2))])
    with pytest.raises(UserError, match=re.escape("pip install -r requirements-plot.txt")):
        plot.main()


@pytest.fixture
def two_characters(tmp_path):
    """A font that has no characters but these two, known to matplotlib."""
    fonts = pytest.importorskip("fontTools.fontBuilder")
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    builder, pen = fonts.FontBuilder(1000, isTTF=True), TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 900)), pen.lineTo((900, 0)), pen.closePath()
    names, shape = [".notdef", "first", "second"], pen.glyph()
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({0x10FE00: "first", 0x10FE01: "second"})  # private use, far out: no other font has them
    builder.setupGlyf(dict.fromkeys(names, shape))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Two Characters", "styleName": "Regular"})
    builder.setupOS2(), builder.setupPost()
    builder.save(tmp_path / "two.ttf")
    before = [*font_manager.fontManager.ttflist]
    font_manager.fontManager.addfont(tmp_path / "two.ttf")
    yield "\U0010fe00\U0010fe01"
    font_manager.fontManager.ttflist[:] = before


def test_a_name_is_written_in_a_font_that_has_its_characters_or_the_run_gets_a_number(two_characters, capsys):
    lacking = "\U0010fe77"
    runs = [plot.Curves(name, training(2)) for name in (f"a{two_characters}", lacking, "b")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each character that it draws as a box
        picture = plot.draw_figure(runs)
        plot.make_png(picture)
    assert legend_names(picture) == [f"a{two_characters}", "run 2", "b"]
    assert picture.legends[0].get_texts()[0].get_family() == [plot.FONT, "Two Characters"]
    assert "run 2" in capsys.readouterr().err
