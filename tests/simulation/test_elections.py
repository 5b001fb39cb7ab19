"""Elections under simulation: 50 seeds here, more in CI and by ``just sim``; and products that are broken."""

from __future__ import annotations

import pytest

from tests.simulation import broken_elections as broken
from tests.simulation.election_checks import ELECTION_CELLS, ELECTIONS
from tests.simulation.running import Outcome, run_seed, run_seeds

SEEDS_AT_ONCE = 25
INVARIANTS = ("L1", "L2", "L3", "L4", "L6", "L8", "E1", "E2", "E4", "quorum")

# Variant, and which invariants tell.
SYMPTOMS = [
    (broken.resigns_before_it_stops, {"L8"}),
    (broken.proposal_without_lease, {"E1"}),
    (broken.proposal_without_proof, {"E1", "L6", "liveness"}),
    (broken.observer_orders_by_change, {"E2"}),
    (broken.observer_overlooks_deletions, {"E2"}),
    (broken.stays_registered, {"L6", "liveness"}),
    (broken.quorum_by_hearsay, {"quorum"}),
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


@pytest.mark.parametrize(("variant", "symptoms"), SYMPTOMS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_election_is_found(variant, symptoms):
    """Each mistake is found within 40 seeds, and by the invariant that it breaks."""
    with variant():
        for seed in range(SEEDS):
            run, _ = run_seed(seed, of=ELECTIONS)
            if symptoms & {violation.invariant for violation in run.violations}:
                return
    pytest.fail(f"{variant.__name__} is not found in {SEEDS} seeds")
