"""Locks between many processes on a real cluster that is being broken, held against etcd's own history."""

from __future__ import annotations

import pytest
import trio

from etcd_infra.testing import find_etcd
from tests.helpers.etcds import crash_safe_etcd, etcd_programs
from tests.helpers.proving.ground import Show, prove

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]


async def run(directory, show, *, program):
    """Run a show, print what it showed, and fail with everything that is wrong."""
    with trio.fail_after(show.broken_seconds + show.patience + 60):
        outcome = await prove(program, directory, show)
    print(f"\n{program}: {outcome}")
    assert [] == outcome.wrong[:20], f"the logs are in {directory}"
    return outcome


async def test_processes_fight_while_everything_breaks_for_a_moment(tmp_path):
    """
    Four processes, ten seconds of faults: no invariant of locks is broken, everybody gets through, nothing is left.

    On the one etcd at hand; its members are killed only if it keeps its promises then.
    """
    program = crash_safe_etcd() or etcd_programs()[0]
    safe = crash_safe_etcd() is not None
    if not safe:
        print("no member is killed: this etcd may lose acknowledged writes then")
    show = Show(
        processes=4, rounds=40, locks=2, broken_seconds=8, kills_members=safe, pace=0.4, ttl=2, patience=40
    )
    outcome = await run(tmp_path, show, program=program)
    assert 160 <= outcome.granted
    assert 10 <= outcome.under_fault["any"]
    assert 4 <= len(outcome.faults)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_sixteen_processes_two_hundred_rounds_each(tmp_path):
    """
    Sixteen processes, 3,200 acquisitions, two minutes of faults of fifteen kinds, members killed.

    No invariant is broken, at least fifty hand-overs happen under fault, everybody gets through, nothing is left.
    """
    program = crash_safe_etcd()
    if program is None:
        pytest.skip("no etcd here keeps acknowledged writes when a member is killed (3.4.21, 3.5.5 or later)")
    show = Show(processes=16, rounds=200, locks=4, broken_seconds=120, kills_members=True)
    outcome = await run(tmp_path, show, program=program)
    assert 3200 <= outcome.granted
    assert 50 <= outcome.under_fault["any"]
    assert 15 == len(outcome.faults), outcome.faults
    assert max(outcome.waits, default=0.0) < 10.0


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_every_kind_of_lock_while_everything_breaks(tmp_path):
    """
    Locks, both sides of read-write locks, permits and several locks at once, on a cluster that is being broken.

    Held against etcd's own history: no writer beside anybody, no permit too many or out of turn, all locks or none,
    no stale write is accepted, no place comes back, everybody gets through, and nothing is left.
    """
    program = crash_safe_etcd() or etcd_programs()[0]
    safe = crash_safe_etcd() is not None
    show = Show(
        processes=6,
        rounds=50,
        locks=3,
        broken_seconds=20,
        kills_members=safe,
        pace=0.4,
        ttl=2,
        patience=60,
        of="all",
    )
    outcome = await run(tmp_path, show, program=program)
    assert 300 <= outcome.granted
    assert 10 <= outcome.under_fault["any"]
    assert 10 <= len(outcome.faults)
