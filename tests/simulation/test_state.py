"""State and counters under simulation: 50 seeds here, more in CI and by ``just sim``; and products that are broken."""

from __future__ import annotations

import pytest

from tests.simulation import broken_state as broken
from tests.simulation.running import Outcome, first_found, run_seeds
from tests.simulation.state_checks import CELLS, STATE

SEEDS_AT_ONCE = 25
INVARIANTS = ("V1", "V2", "V3", "V4", "V5", "C1", "C2", "fence", "behind")

# Variant, where to begin to search, and which invariants tell.
SYMPTOMS = [
    (broken.sends_again_blindly, 30, {"V2", "behind", "C1"}),
    (broken.unknown_is_failure, 0, {"V4"}),
    (broken.success_is_unknown_no_more, 0, {"V4"}),
    (broken.compares_nothing, 0, {"V3", "V4"}),
    (broken.fence_not_sent, 500, {"L1"}),
    (broken.counts_by_reading_and_writing, 0, {"C1"}),
    (broken.deletes_on_trust, 0, {"V4"}),
    (broken.ends_too_early, 0, {"behind"}),
    (broken.writes_at_once, 0, {"behind"}),
    (broken.watches_from_now, 0, {"V5"}),
]
SEEDS = 40


@pytest.mark.parametrize("first", range(0, 50, SEEDS_AT_ONCE))
def test_invariants_hold(first):
    """Writes are applied once and as told, reads and watches show what was there, counters lose nothing."""
    outcome = run_seeds(range(first, first + SEEDS_AT_ONCE), STATE)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert SEEDS_AT_ONCE == outcome.counters.runs
    assert all(outcome.counters.checked[invariant] for invariant in INVARIANTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fault_meets_what_it_threatens():
    """
    In 3,000 seeds each fault meets each invariant that it threatens in at least 25 runs.

    Among them are at least 500 writes whose answer was cut off after the commit, and 500 that were applied after their
    caller had been told: everybody was told the truth.
    """
    total = Outcome()
    for first in range(0, 3000, 50):
        total.merge(run_seeds(range(first, first + 50), STATE))
    assert [] == total.counters.too_few(CELLS, 25)
    assert not total.failures, "\n".join(total.failures)
    assert total.counters.checked["cut after the commit"] >= 500
    assert total.counters.checked["applied late"] >= 500


@pytest.mark.parametrize(
    ("variant", "first", "symptoms"), SYMPTOMS, ids=lambda value: getattr(value, "__name__", "")
)
def test_broken_state_is_found(variant, first, symptoms):
    """Each mistake is found within 40 seeds, and by an invariant that it breaks."""
    assert first_found(variant, symptoms, range(first, first + SEEDS), of=STATE) is not None
