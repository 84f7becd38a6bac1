"""Promises of extras.decoding.stop: a text ends before its first stop string, and leaks no part of one."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from extras.decoding.stop import UntilStop


@given(st.text("ab。", max_size=12), st.lists(st.text("ab。", min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_before_its_first_stop_string_and_leaks_no_part_of_it(text, stops, data):
    """Against a search at every end in the whole text, however it comes in pieces."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    until = UntilStop(stops)
    said = "".join(until.push(text[a:b]) for a, b in pairwise([0, *cuts, len(text)]))
    end = next((end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))), None)
    if end is None:
        assert not until.stopped and said + until.flush() == text
        held = text[len(said) :]  # no more was held back than the beginning of a stop string
        assert not held or any(stop.startswith(held) for stop in stops)
    else:
        longest = max((stop for stop in stops if text[:end].endswith(stop)), key=len)
        assert until.stopped and until.flush() == "" and said == text[:end].removesuffix(longest)


def test_the_stop_string_that_is_whole_first_counts_however_the_text_is_cut():
    assert UntilStop(["一二三", "二"]).push("一二三") == "一"
    until = UntilStop(["一二三", "二"])
    assert [until.push(c) for c in "一二三"] == ["", "一", ""]
