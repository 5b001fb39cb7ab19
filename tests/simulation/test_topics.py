"""Topics under simulation: 50 seeds here, more in CI and by ``just sim``; and products that are broken."""

from __future__ import annotations

import pytest

from tests.simulation import broken_topics as broken
from tests.simulation.running import Outcome, first_found, run_seeds
from tests.simulation.topic_checks import CELLS, TOPICS

SEEDS_AT_ONCE = 10
INVARIANTS = (
    "P1",
    "P1 once",
    "P2",
    "P3",
    "P4",
    "P5",
    "P6",
    "attempts",
    "claim",
    "dead letter",
    "fence",
    "receipt",
)

# Variant, where to begin to search, and which invariants tell.
SYMPTOMS = [
    (broken.effects_in_a_second_write, 0, {"P3"}),
    (broken.settled_when_handed_over, 0, {"P2"}),
    (broken.gaps_of_the_watch_are_overlooked, 0, {"P6", "P2", "P4"}),
    (broken.position_is_a_revision, 0, {"P6", "P2"}),
    (broken.ring_reaches_too_far, 0, {"P6", "P2"}),
    (broken.trims_past_the_slowest, 10, {"trim"}),
    (broken.trims_without_a_mark, 0, {"trim"}),
    (broken.mark_is_overlooked, 0, {"P6"}),
    (broken.claims_over_claims, 0, {"claim"}),
    (broken.progress_is_not_compared, 0, {"P2", "P1"}),
    (broken.floor_moves_too_far, 0, {"P2"}),
    (broken.ids_are_not_compared, 0, {"P5"}),
    (broken.ordered_by_key, 0, {"P4"}),
    (broken.dead_and_alive, 0, {"dead letter"}),
    (broken.number_is_kept, 0, {"P4", "program"}),
    (broken.lost_claims_are_remembered, 0, {"liveness"}),
]
SEEDS = 40


@pytest.mark.parametrize("first", range(0, 50, SEEDS_AT_ONCE))
def test_invariants_hold(first):
    """Messages are published once and as told, delivered in order or reported lost, and their effects take place once."""
    outcome = run_seeds(range(first, first + SEEDS_AT_ONCE), TOPICS)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert SEEDS_AT_ONCE == outcome.counters.runs
    assert all(outcome.counters.checked[invariant] for invariant in INVARIANTS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fault_meets_what_it_threatens():
    """In 3,000 seeds each fault meets each invariant that it threatens in at least 25 runs."""
    total = Outcome()
    for first in range(0, 3000, 50):
        total.merge(run_seeds(range(first, first + 50), TOPICS))
    assert [] == total.counters.too_few(CELLS, 25)
    assert not total.failures, "\n".join(total.failures)


@pytest.mark.parametrize(
    ("variant", "first", "symptoms"), SYMPTOMS, ids=[variant.__name__ for variant, _, _ in SYMPTOMS]
)
def test_broken_topic_is_found(variant, first, symptoms):
    """Each mistake is found within 40 seeds of where it was first seen, and by an invariant that it breaks."""
    assert first_found(variant, symptoms, range(first, first + SEEDS), of=TOPICS) is not None
