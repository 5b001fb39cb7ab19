"""Every lock operation, cancelled at every step, crossed with what the network may do to its writes."""

from __future__ import annotations

import pytest
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange
from etcd_infra._primitives._lock_like import Renewal
from etcd_infra.errors import LockLostError
from etcd_infra.testing import FaultyBackend
from tests.conftest import NAMESPACE, open_infra
from tests.helpers.cancelling import cancelled_at

KEYS = Keys(NAMESPACE)
LINE = KeyRange.prefix(KEYS.lock_line("job"))
LATE_SECONDS = 3.0

KINDS = {
    "answered": lambda _: None,
    "refused": lambda backend: backend.refuse_next(),
    "request lost": lambda backend: backend.lose_next_request(),
    "answer lost": lambda backend: backend.lose_next_answer(),
    "applied late": lambda backend: backend.apply_next_late(LATE_SECONDS),
    "two applied late": lambda backend: (backend.apply_next_late(1.0), backend.apply_next_late(LATE_SECONDS)),
    "slow": lambda backend: backend.delay_next(1.0),
}
FAULTS = [(kind, 0) for kind in KINDS] + [
    (kind, skipped) for kind in ("request lost", "answer lost", "applied late") for skipped in (1, 2)
]


def strike(faulty, kind, skipped):
    """Arm a fault for the first write after `skipped` others."""
    writes = FaultyBackend(faulty.inner).only
    seen = 0

    def only(verb, request):
        nonlocal seen
        seen += writes(verb, request)
        return writes(verb, request) and seen > skipped

    faulty.only = only
    KINDS[kind](faulty)


async def enter(infra, options):
    async with infra.lock("job", **options):
        await trio.sleep(0.5)


async def attempt(infra, options):
    async with infra.lock("job", **options).attempt():
        await trio.sleep(0.5)


async def by_hand(infra, options):
    hold = await infra.lock("job", **options).acquire()
    await hold.release()


async def extended(infra, options):
    async with infra.lock("job", **options) as hold:
        await hold.extend()


async def looked_at(infra, options):
    lock = infra.lock("job", **options)
    await lock.inspect()
    async with lock as hold:
        await lock.validate(hold.fence)
        await lock.current_token()
        async with lock.fenced(hold.fence):
            await trio.sleep(0.5)


OPERATIONS = {function.__name__: function for function in (enter, attempt, by_hand, extended, looked_at)}
LEASES = {
    "session's lease": {},
    "own lease": {"ttl": 20},
    "own lease, by hand": {"ttl": 20, "renewal": Renewal.MANUAL},
}


@pytest.mark.parametrize("contended", [False, True], ids=["free", "contended"])
@pytest.mark.parametrize("lease", LEASES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]} {fault[1]}")
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_nothing_is_left(etcd, autojump_clock, operation, fault, lease, contended):
    """Cancelled at any step, under any fault, an operation leaves no key, no lease, and nobody waiting."""
    faulty = FaultyBackend(etcd.node("one"))
    steps = 0
    async with open_infra(faulty, ttl=60) as one, open_infra(etcd.node("two"), seed=2, ttl=60) as two:
        while True:
            steps += 1
            holder = await two.lock("job").acquire() if contended else None
            released = trio.Event()

            async def let_go(holder=holder, released=released) -> None:
                await trio.sleep(2)
                if holder is not None:
                    await holder.release()
                released.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(let_go)
                strike(faulty, *fault)
                reached = await cancelled_at(steps, lambda: OPERATIONS[operation](one, LEASES[lease]))
                faulty.forget_faults()
                await released.wait()
            await check_nothing_is_left(etcd, one, two, grants_may_be_late="late" in fault[0])
            if not reached:
                break
    assert steps > 3


async def check_nothing_is_left(etcd, one, two, *, grants_may_be_late):
    """
    The session lives; in its lifetime everything of the operation goes, and nothing comes back.

    A grant that is applied after its revocation can not be prevented: that lease holds no key, nobody keeps
    it alive, and it ends with its TTL.
    """
    session = one.session
    await trio.sleep(2.1)
    assert not [kv for kv in etcd.store.snapshot().kvs if kv.key in LINE]
    extra = set(await etcd.lease_list()) - {one.session.lease.id, two.session.lease.id}
    if grants_may_be_late:
        assert [()] * len(extra) == [(await etcd.lease_time_to_live(lease, keys=True)).keys for lease in extra]
        await trio.sleep(20)
        extra &= set(await etcd.lease_list())
    assert not extra
    with trio.fail_after(0.1):
        async with two.lock("job").attempt() as hold:
            assert hold is not None
    quiet_since = etcd.store.revision
    await trio.sleep(LATE_SECONDS + 1)
    later = etcd.store.history.between(quiet_since + 1, etcd.store.revision)
    assert not [event for commit in later for event in commit.events if event.key in LINE]
    assert session is one.session
    assert not session.owners
    assert session.janitor.known_keys == {session.own_key.key, session.own_key.key + b"/op/0"}


async def test_loss_while_leaving_is_still_reported(etcd, autojump_clock):
    """A hold that was lost and is then left under a fault raises its loss all the same."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        with pytest.raises(LockLostError):
            async with infra.lock("job") as hold:
                await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
                faulty.refuse_next()
