"""Transactions under simulation: 50 seeds here, more in CI and by ``just sim``; and products that are broken."""

from __future__ import annotations

import pytest

from tests.simulation import broken_transactions as broken
from tests.simulation.running import Outcome, first_found, run_seeds
from tests.simulation.transaction_checks import CELLS, TRANSACTIONS

SEEDS_AT_ONCE = 25
INVARIANTS = ("T1", "T2", "T3", "T4", "T6", "T8", "S1", "S2", "S3", "S4", "S5", "S6", "total")

# Variant, where to begin to search, and which invariants tell.
SYMPTOMS = [
    (broken.reads_are_not_compared, 0, {"S1"}),
    (broken.ranges_are_not_compared, 0, {"S1"}),
    (broken.blind_writes_are_not_compared, 0, {"S1"}),
    (broken.each_read_is_of_now, 0, {"S2"}),
    (broken.nothing_is_validated, 0, {"S6"}),
    (broken.increments_in_two_steps, 0, {"total", "T1"}),
    (broken.intents_are_overlooked, 0, {"T5", "T7"}),
    (broken.impatient, 0, {"T4"}),
    (broken.verdict_is_not_compared, 0, {"T4", "T7"}),
    (broken.unknown_commit_is_failure, 60, {"S5", "T4"}),
    (broken.unknown_is_failure, 0, {"S5"}),
    (broken.reads_one_by_one, 0, {"T6"}),
]
SEEDS = 40


@pytest.mark.parametrize("first", range(0, 50, SEEDS_AT_ONCE))
def test_invariants_hold(first):
    """Transactions are applied whole, once and as told, on what they saw; the total is the same at every revision."""
    outcome = run_seeds(range(first, first + SEEDS_AT_ONCE), TRANSACTIONS)
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
        total.merge(run_seeds(range(first, first + 50), TRANSACTIONS))
    assert [] == total.counters.too_few(CELLS, 25)
    assert not total.failures, "\n".join(total.failures)
    assert total.counters.checked["cut after the commit"] >= 500
    assert total.counters.checked["applied late"] >= 500


@pytest.mark.parametrize(
    ("variant", "first", "symptoms"), SYMPTOMS, ids=[variant.__name__ for variant, _, _ in SYMPTOMS]
)
def test_broken_transaction_is_found(variant, first, symptoms):
    """Each mistake is found within 40 seeds of where it was first seen, and by an invariant that it breaks."""
    assert first_found(variant, symptoms, range(first, first + SEEDS), of=TRANSACTIONS) is not None
