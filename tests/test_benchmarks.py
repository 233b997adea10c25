"""The table of a card is whole at any moment, and what cannot be measured is told in its place."""

import json
import time
from xml.etree import ElementTree

from benchmarks.card import Row, Table
from benchmarks.length import draw


def read(folder):
    return (folder / "card.md").read_text(encoding="utf-8"), json.loads((folder / "card.json").read_text("utf-8"))


def test_a_row_is_written_as_it_is_done_and_one_that_fails_says_why(tmp_path):
    table = Table("a card", tmp_path, time.monotonic() + 100)
    table.measure("diffusers, eager", lambda: Row("", 2.0, roofline=0.5))
    text, found = read(tmp_path)
    assert "| diffusers, eager | 2.000 | 1.00 | - | - | 50% |" in text
    assert found["rows"][0]["seconds"] == 2.0

    def fail():
        raise ValueError("no such kernel\nmore")

    table.measure("broken", fail)
    table.measure("plain", lambda: Row("", 1.6, 3 * 10**9, 1e-6, 0.6))
    table.measure("decode", lambda: Row("", 30.0))
    text, _ = read(tmp_path)
    assert "| broken | did not run: no such kernel | | | | |" in text
    assert "| plain | 1.600 | 1.25 | 3.0 | 1e-06 | 60% |" in text
    assert "| decode | 30.000 | - | - | - | - |" in text
    assert table.seconds("plain") == 1.6
    assert table.seconds("broken") is None


def test_rows_after_the_deadline_do_not_begin(tmp_path):
    table = Table("a card", tmp_path, time.monotonic() - 1)
    table.measure("late", lambda: 1 / 0)
    assert "| late | not reached in the time given |" in read(tmp_path)[0]


def test_the_plot_has_a_line_a_side_and_is_readable():
    found = [
        {"tokens": tokens, "seconds": {"diffusers": tokens / 1000, "ours": tokens / 1100}}
        for tokens in (400, 1000, 4000)
    ]
    drawn = ElementTree.fromstring(draw(found))
    lines = [child for child in drawn if child.tag.endswith("polyline")]
    assert len(lines) == 2
    theirs, ours = ([float(point.split(",")[1]) for point in line.get("points").split()] for line in lines)
    # Up is down in an SVG: what takes less is drawn lower.
    assert all(mine > other for mine, other in zip(ours, theirs, strict=True))
    assert theirs == sorted(theirs, reverse=True)
