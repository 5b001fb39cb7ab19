"""Read-write locks, semaphores and multi-locks under simulation: 48 seeds here, more in CI; and broken ones."""

from __future__ import annotations

import pytest

from tests.simulation import broken_lock_family as broken
from tests.simulation.lock_family import KINDS
from tests.simulation.lock_family_checks import LOCK_FAMILY, LOCK_FAMILY_CELLS
from tests.simulation.running import Outcome, first_found, run_seeds

SEEDS_AT_ONCE = 24
INVARIANTS = ("L1", "L2", "L3", "L4", "L6", "L7", "L8", "passing", "sharing", "permits", "queue", "whole")

# Variant, and which invariants tell.
SYMPTOMS = [
    (broken.reader_ignores_writers, {"L1", "L3"}),
    (broken.reader_waits_for_one_writer, {"L1", "L3"}),
    (broken.reader_passes_who_waits, {"passing"}),
    (broken.writer_ignores_readers, {"L1", "L3"}),
    (broken.writer_waits_for_one_reader, {"L1", "L3"}),
    (broken.writer_is_its_heir, {"L1", "L3"}),
    (broken.unseen_reader, {"L3"}),
    (broken.permits_not_counted, {"permits"}),
    (broken.holders_not_compared, {"permits"}),
    (broken.own_number_of_permits, {"permits"}),
    (broken.attempt_jumps_the_queue, {"queue"}),
    (broken.no_queue, {"queue"}),
    (broken.deaf_head, {"L4"}),
    (broken.one_after_the_other, {"whole"}),
    (broken.first_in_one_line, {"L1", "whole"}),
    (broken.proves_one, {"whole"}),
    (broken.keeps_the_others, {"L6", "liveness"}),
]
SEEDS = 40


@pytest.mark.parametrize("first", range(0, 48, SEEDS_AT_ONCE))
def test_invariants_hold(first):
    """All invariants of locks and of each kind hold, everybody gets through, and nothing is left."""
    outcome = run_seeds(range(first, first + SEEDS_AT_ONCE), LOCK_FAMILY)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert SEEDS_AT_ONCE == outcome.counters.runs
    assert all(outcome.counters.checked[invariant] for invariant in INVARIANTS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_fault_meets_what_it_threatens():
    """In 3,000 seeds each fault meets each invariant that it threatens in at least 25 runs."""
    total = Outcome()
    for first in range(0, 3000, 100):
        total.merge(run_seeds(range(first, first + 100), LOCK_FAMILY))
    assert [] == total.counters.too_few(LOCK_FAMILY_CELLS, 25)
    assert not total.failures, "\n".join(total.failures)


@pytest.mark.parametrize(("variant", "symptoms"), SYMPTOMS, ids=lambda value: getattr(value, "__name__", ""))
def test_mistake_is_found(variant, symptoms):
    """Each mistake is found within 40 seeds of its kind's turns, and by an invariant that it breaks."""
    groups = (broken.RWLOCKS, broken.SEMAPHORES, broken.MULTI_LOCKS)
    kind = next(number for number, group in enumerate(groups) if variant in group)
    assert first_found(variant, symptoms, range(kind, SEEDS, len(KINDS)), of=LOCK_FAMILY) is not None


def test_list_of_mistakes_is_complete():
    """Every broken variant is looked for."""
    assert {variant for variant, _ in SYMPTOMS} == {*broken.BROKEN}
