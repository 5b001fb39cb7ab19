"""What the command line prints."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from etcd_infra import HealthInfo, LockInfo
from etcd_infra._inspect.render import to_json, to_table


def text(kind, infos, now=1000.0):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(to_table(kind, infos, now=now))
    return console.export_text()


def test_rows_name_what_is_missing():
    """A row shows each field; what is missing is a dash, ages are relative, TTLs have their unit."""
    shown = text("locks", (LockInfo("job", "node-1", 7, ("b", "c"), 20, 940.0), LockInfo("free")))
    for part in ("job", "node-1", "7", "20 s", "60 s ago", "free", "-"):
        assert part in shown
    assert "acquired" in shown
    assert "acquired at" not in shown


def test_nothing_is_said():
    """An empty list is said to be empty."""
    assert "locks: none" in text("locks", ())


def test_many_fields_stand_below_each_other():
    """Health has many fields: one line each."""
    shown = text("health", (HealthInfo(healthy=True, latency=0.0123, endpoint="http://h:1"),))
    assert "12.3 ms" in shown
    assert "yes" in shown


@pytest.mark.parametrize(
    ("age", "expected"),
    [(5, "5 s"), (-3, "0 s"), (119, "119 s"), (600, "10 min"), (90_000, "25 h"), (10**6, "11 d")],
)
def test_ages(age, expected):
    """Ages are rounded to a unit that says something; a clock ahead of ours gives no negative ones."""
    assert f"{expected} ago" in text("locks", (LockInfo("job", acquired_at=1000.0 - age),))


def test_json_is_what_was_found():
    """JSON has every field, with sorted keys."""
    info = LockInfo("job", "node-1", 7, ("b",), 20, 940.0)
    assert {
        "acquired_at": 940.0,
        "holder": "node-1",
        "name": "job",
        "queue": ["b"],
        "queued_at": [],
        "token": 7,
        "ttl": 20,
    } == json.loads(to_json(info))
    assert list(json.loads(to_json(info))) == sorted(json.loads(to_json(info)))
