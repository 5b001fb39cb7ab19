"""The page of guarantees names its evidence, and the evidence exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
}
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.match(r"\| F\d+:", line)]


def test_every_test_that_is_named_exists():
    """No test that the page names was renamed or removed."""
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 40
    assert set() == named - TESTS


def test_every_path_that_is_named_exists():
    """No file that the page names was moved."""
    assert [] == [path for path in re.findall(r"`(tests/[\w/.]+)`", PAGE) if not (ROOT / path).exists()]


def test_every_fault_has_its_row():
    """The table goes through the faults from the first to the last."""
    assert [f"F{number}" for number in range(1, 25)] == [row[0].split(":")[0].strip() for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split(":")[0].strip())
def test_every_row_says_what_holds_and_shows_it(row):
    """Each fault has a promise, and at least one test that shows it."""
    _, holds, _, shown = row
    assert holds.strip()
    assert re.search(r"`test_\w+`", shown)
