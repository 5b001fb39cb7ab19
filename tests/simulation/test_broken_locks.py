"""The simulation finds locks that are broken: each mistake that lock libraries make, by its own symptom."""

from __future__ import annotations

import pytest

from etcd_infra.testing import Fault, FaultKind
from tests.simulation import broken
from tests.simulation.locks import Shape, settings_of
from tests.simulation.running import first_found, run_seed

# Variant, where to begin to search, and which invariants tell. The rare ones need hundreds of seeds from 0 on: those
# searches are the slow test's.
SYMPTOMS = [
    (broken.no_fence, 0, {"L1"}),
    (broken.no_generation, 200, {"L6", "liveness"}),
    (broken.no_confirmation, 0, {"L3"}),
    (broken.watches_holder, 0, {"L1", "L3"}),
    (broken.release_by_name, 0, {"L2", "L8"}),
    (broken.release_first, 0, {"L8"}),
    (broken.deadline_ignored, 20, {"L7"}),
    (broken.no_margin, 340, {"L7"}),
    (broken.monotonic_only, 20, {"L7"}),
    (broken.key_unwatched, 30, {"L7"}),
    (broken.cancelled_stays, 0, {"L6", "liveness"}),
    (broken.unknown_is_failure, 0, {"L6", "liveness"}),
    (broken.token_from_header, 425, {"L2", "L3"}),
    (broken.stale_look, 220, {"L4", "L7", "liveness"}),
    (broken.held_by_flag, 0, {"L7"}),
    (broken.deaf_waiter, 0, {"L4"}),
]
NAMES = [variant.__name__ for variant, _, _ in SYMPTOMS]
SEEDS = 40


@pytest.mark.parametrize(("variant", "first", "symptoms"), SYMPTOMS, ids=NAMES)
def test_mistake_is_found(variant, first, symptoms):
    """Each broken variant violates what it breaks, within 40 seeds of where it was first seen."""
    assert first_found(variant, symptoms, range(first, first + SEEDS)) is not None


def test_lock_without_fence_is_found_soon():
    """Without the fencing compare five seeds are enough to see two owners write."""
    assert first_found(broken.no_fence, {"L1"}, range(5)) is not None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("variant", "first", "symptoms"), SYMPTOMS, ids=NAMES)
def test_mistake_is_found_from_the_first_seed_on(variant, first, symptoms):
    """A blind search finds each broken variant within a thousand seeds."""
    assert first_found(variant, symptoms, range(1000)) is not None


def test_deadline_from_answer_is_found():
    """Trust that counts from a renewal's answer outlives the lease when answers are slow and then none comes."""
    slow = [Fault(FaultKind.DELAYED_ANSWER, round(0.5 + 0.1 * number, 1), "a", 1.8) for number in range(60)]
    plan = (*slow, Fault(FaultKind.CUT_REQUESTS, 6.6, "a", 14.0))
    settings = settings_of(("a", "b"), 25.0, 10)
    shape = Shape(ttl=10, locks=("job",), tasks=1, work=12.0, pause=0.1, settings=settings)
    found = set()
    for seed in range(4, 12):
        assert not run_seed(seed, plan=plan, shape=shape)[0].violations
        with broken.deadline_from_answer():
            found |= {violation.invariant for violation in run_seed(seed, plan=plan, shape=shape)[0].violations}
    assert {"L7"} == found


def test_list_of_mistakes_is_complete():
    """Every broken variant is looked for."""
    assert {variant.__name__ for variant in broken.BROKEN} == {*NAMES, "deadline_from_answer"}
