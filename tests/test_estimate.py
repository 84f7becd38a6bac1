"""Promises of --dry_run's arithmetic; the commands with it are in test_commands.py."""

import pytest

from extras.estimate import memory, report


def test_days_are_those_of_a_known_example():
    """A 0.5B model, 30B tokens, six RTX 3090 at 45 %, activations computed again: 8 N D FLOPs."""
    assert report.days(8 * 0.5e9 * 30e9, report.CARDS["RTX 3090"], 6, 0.45) == pytest.approx(7.24, abs=0.01)


@pytest.mark.parametrize("fixed, slope", [(0.0, 1.0), (3.0, 0.37), (5.0, 0.001), (99.0, 1.0)])
@pytest.mark.parametrize("bend", [1.0, 1.3])
def test_the_largest_number_of_rows_is_that_of_trying_all(fixed, slope, bend):
    asked = []

    def need(rows):
        asked.append(rows)
        return fixed + slope * rows**bend

    naive = max([n for n in range(1, 513) if fixed + slope * n**bend <= 60], default=0)
    assert memory.fitting_rows(need, 60, 512) == naive
    assert len(asked) == len(set(asked)) and len(asked) < (8 if bend == 1 else 40)


def test_sizes_of_memory_are_read_or_refused():
    assert [report.gigabytes(t) for t in ("6GB", "6.5 gb", "800MB", "24G")] == [6, 6.5, 0.8, 24]
    for wrong in ("6", "0GB", "six", "6TB", "-6GB"):
        with pytest.raises(ValueError, match="must be a size"):
            report.gigabytes(wrong)
