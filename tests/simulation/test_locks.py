"""Locks under simulation: 150 seeds here, 3,000 and more by ``just sim``."""

from __future__ import annotations

import time

import pytest

from tests.simulation.lock_checks import CELLS
from tests.simulation.running import Outcome, run_seeds

SEEDS_AT_ONCE = 25


@pytest.mark.parametrize("first", range(0, 150, SEEDS_AT_ONCE))
def test_invariants_hold(first):
    """L1 to L8 hold at every revision, everybody gets through when it is calm, and nothing is left."""
    outcome = run_seeds(range(first, first + SEEDS_AT_ONCE))
    assert not outcome.failures, "\n".join(outcome.failures)
    assert SEEDS_AT_ONCE == outcome.counters.runs
    assert all(outcome.counters.checked[invariant] for invariant in ("L1", "L2", "L3", "L4", "L6", "L7", "L8"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_fault_meets_what_it_threatens():
    """In 3,000 seeds each fault meets each invariant that it threatens in at least 25 runs."""
    total = Outcome()
    for first in range(0, 3000, 100):
        total.merge(run_seeds(range(first, first + 100)))
    assert [] == total.counters.too_few(CELLS, 25)
    assert not total.failures, "\n".join(total.failures)


@pytest.mark.slow
def test_pace():
    """At least 5,000 simulated requests per second of processor time (best of three)."""
    best = 0.0
    for first in (0, 40, 80):
        began = time.process_time()
        outcome = run_seeds(range(first, first + 40))
        best = max(best, outcome.requests / (time.process_time() - began))
    assert 5000 <= best
