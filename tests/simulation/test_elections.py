"""Elections under simulation: 50 seeds here, more in CI and by ``just sim``; and products that are broken."""

from __future__ import annotations

import pytest

from tests.simulation import broken_elections as broken
from tests.simulation.election_checks import ELECTION_CELLS, ELECTIONS
from tests.simulation.running import Outcome, first_found, run_seeds

SEEDS_AT_ONCE = 25
INVARIANTS = ("L1", "L2", "L3", "L4", "L6", "L8", "E1", "E2", "E4", "quorum")

# Variant, where to begin to search, and which invariants tell.
SYMPTOMS = [
    (broken.resigns_before_it_stops, 0, {"L8"}),
    (broken.proposal_without_lease, 0, {"E1"}),
    (broken.proposal_without_proof, 30, {"E1", "L6", "liveness"}),
    (broken.observer_orders_by_change, 0, {"E2"}),
    (broken.observer_overlooks_deletions, 30, {"E2"}),
    (broken.stays_registered, 0, {"L6", "liveness"}),
    (broken.quorum_by_hearsay, 0, {"quorum"}),
]
SEEDS = 40


@pytest.mark.parametrize("first", range(0, 50, SEEDS_AT_ONCE))
def test_invariants_hold(first):
    """All invariants of locks and of elections hold, everybody gets through, and nothing is left."""
    outcome = run_seeds(range(first, first + SEEDS_AT_ONCE), ELECTIONS)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert SEEDS_AT_ONCE == outcome.counters.runs
    assert all(outcome.counters.checked[invariant] for invariant in INVARIANTS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_fault_meets_what_it_threatens():
    """In 3,000 seeds each fault meets each invariant that it threatens in at least 25 runs."""
    total = Outcome()
    for first in range(0, 3000, 100):
        total.merge(run_seeds(range(first, first + 100), ELECTIONS))
    assert [] == total.counters.too_few(ELECTION_CELLS, 25)
    assert not total.failures, "\n".join(total.failures)


@pytest.mark.parametrize(
    ("variant", "first", "symptoms"), SYMPTOMS, ids=lambda value: getattr(value, "__name__", "")
)
def test_broken_election_is_found(variant, first, symptoms):
    """Each mistake is found within 40 seeds of where it was first seen, and by the invariant that it breaks."""
    assert first_found(variant, symptoms, range(first, first + SEEDS), of=ELECTIONS) is not None
