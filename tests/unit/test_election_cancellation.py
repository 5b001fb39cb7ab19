"""Every operation of elections and members, cancelled at every step, under what the network may do to it."""

from __future__ import annotations

import pytest
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange
from etcd_infra.testing import FaultyBackend
from tests.conftest import NAMESPACE, open_infra
from tests.helpers.cancelling import cancelled_at

KEYS = Keys(NAMESPACE)
OURS = (KeyRange.prefix(KEYS.elections), KeyRange.prefix(KEYS.members))
LATE_SECONDS = 3.0

FAULTS = {
    "answered": lambda _: None,
    "refused": lambda backend: backend.refuse_next(),
    "request lost": lambda backend: backend.lose_next_request(),
    "answer lost": lambda backend: backend.lose_next_answer(),
    "applied late": lambda backend: backend.apply_next_late(LATE_SECONDS),
    "two applied late": lambda backend: (backend.apply_next_late(1.0), backend.apply_next_late(LATE_SECONDS)),
    "slow": lambda backend: backend.delay_next(1.0),
}


async def lead(infra):
    async with infra.election("job").lead(b"value") as leadership:
        await trio.sleep(0.5)
        leadership.check()


async def lead_with_quorum(infra):
    async with infra.election("job", quorum=2).lead() as leadership:
        await trio.sleep(0.5)
        leadership.check()


async def proclaim(infra):
    async with infra.election("job").lead() as leadership:
        await leadership.proclaim(b"first")
        await leadership.proclaim(b"second")


async def work(infra):
    async def function(_):
        await trio.sleep(0.5)

    await infra.election("job").run_while_leader(function)


async def step_down(infra):
    async with infra.election("job").lead() as leadership:
        await leadership.step_down()
        await trio.sleep_forever()


async def register(infra):
    async with infra.members("job").register({"zone": "a"}):
        await trio.sleep(0.5)


async def look(infra):
    election, members = infra.election("job"), infra.members("job")
    await election.status()
    await members.list()
    async with election.observe() as leaders, election.transitions(), members.observe() as events:
        await anext(leaders)
        await anext(events)


OPERATIONS = {
    function.__name__: function
    for function in (lead, lead_with_quorum, proclaim, work, step_down, register, look)
}


@pytest.mark.parametrize("contended", [False, True], ids=["free", "contended"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_nothing_is_left(etcd, autojump_clock, operation, fault, contended):
    """Cancelled at any step, under any fault: no key is left, none comes back, and the next one leads."""
    faulty = FaultyBackend(etcd.node("one"))
    steps = 0
    async with (
        open_infra(faulty, ttl=60) as one,
        open_infra(etcd.node("two"), seed=2, ttl=60) as two,
        two.members("job").register(),
    ):
        while True:
            steps += 1
            async with trio.open_nursery() as nursery:
                if contended:
                    await nursery.start(lead_for_two_seconds, two)
                FAULTS[fault](faulty)
                reached = await cancelled_at(steps, lambda: OPERATIONS[operation](one))
                faulty.forget_faults()
            await check_nothing_is_left(etcd, one, two)
            if not reached:
                break
    assert steps > 3


async def lead_for_two_seconds(infra, task_status):
    async with infra.election("job").lead():
        task_status.started()
        await trio.sleep(2)


async def check_nothing_is_left(etcd, one, two):
    session = one.session
    await trio.sleep(2.1)
    ((theirs,),) = [[kv.lease for kv in ours(etcd.store.snapshot().kvs)]]
    assert theirs == two.session.lease.id
    with trio.fail_after(0.1):
        async with two.election("job").lead():
            pass
    quiet_since = etcd.store.revision
    await trio.sleep(LATE_SECONDS + 1)
    later = etcd.store.history.between(quiet_since + 1, etcd.store.revision)
    assert not [event for commit in later for event in ours(commit.events)]
    assert session is one.session
    assert not session.owners
    assert {session.own_key.key, session.own_key.key + b"/op/0"} == session.janitor.known_keys


def ours(things):
    return [thing for thing in things if any(thing.key in keys for keys in OURS)]
