"""One seed gives one run: in every process, whatever its hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.running import run_seed

ROOT = Path(__file__).parents[2]
DIGESTS = """
import hashlib, logging, sys
from tests.simulation.running import WORKLOADS, run_seed
logging.disable(logging.CRITICAL)
for seed in range(int(sys.argv[1]), int(sys.argv[2])):
    run, _ = run_seed(seed, of=WORKLOADS[sys.argv[3]])
    print(seed, hashlib.sha256("\\n".join(run.log_lines()).encode()).hexdigest())
"""
LINES = """
import logging, sys
from tests.simulation.running import run_seed
logging.disable(logging.CRITICAL)
run, _ = run_seed(int(sys.argv[1]))
print("\\n".join(run.log_lines()))
"""


def start(code, *arguments, hash_seed):
    """Start another process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def outputs(code, *arguments):
    """Return what two processes with different hash seeds print."""
    processes = [start(code, *arguments, hash_seed=hash_seed) for hash_seed in (1, 4242)]
    return [process.communicate(timeout=110)[0] for process in processes]


def test_event_logs_are_identical():
    """The whole event log of a seed is the same, byte for byte, in two processes with different hash seeds."""
    one, other = outputs(LINES, 51)
    assert one == other
    assert 100 < one.count(b"\n")


def test_twenty_seeds_repeat():
    """Twenty more seeds give the same event logs in two processes."""
    one, other = outputs(DIGESTS, 100, 120, "locks")
    assert one == other
    assert 20 == one.count(b"\n")


def test_topics_repeat():
    """Twelve seeds of topics give the same event logs in two processes."""
    one, other = outputs(DIGESTS, 100, 112, "topics")
    assert one == other
    assert 12 == one.count(b"\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, 1000, 200))
def test_a_thousand_seeds_repeat(first):
    """A thousand seeds give the same event logs in two processes."""
    one, other = outputs(DIGESTS, first, first + 200, "locks")
    assert one == other
    assert 200 == one.count(b"\n")


def test_a_seed_repeats_within_a_process():
    """Running other seeds in between changes nothing."""
    before = run_seed(7)[0].log_lines()
    for seed in range(8, 11):
        assert run_seed(seed)[0].log_lines() != before
    assert before == run_seed(7)[0].log_lines()
