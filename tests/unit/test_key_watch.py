"""The shared watch: what happens while it is down, before it exists, and after nobody wanted it."""

from __future__ import annotations

import pytest
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange
from etcd_infra._primitives._hold import LockStatus
from etcd_infra._session.key_watch import IDLE_SECONDS
from etcd_infra.errors import LockLostError
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra
from tests.helpers.watches import FaultyWatches

KEYS = Keys(NAMESPACE)


def key_of(hold):
    return hold.fence.proof[0].range.key


async def test_key_deleted_while_the_watch_is_down_cancels_the_body(etcd, autojump_clock):
    """The key is deleted in a partition: soon after its end the body is cancelled, and the hold FENCED."""
    node = etcd.node("one")
    async with open_infra(node, ttl=60) as infra:
        with trio.fail_after(5), pytest.raises(LockLostError):
            async with infra.lock("job") as hold:
                await trio.sleep(1)
                node.partition()
                await etcd.delete(KeyRange.one(key_of(hold)))
                await trio.sleep(1)
                assert LockStatus.ACQUIRED is hold.status
                node.heal()
                await trio.sleep_forever()
        assert LockStatus.FENCED is hold.status
        infra.session.check()


async def test_key_made_anew_before_the_guard_s_first_read_is_not_mine(etcd, autojump_clock):
    """While the watch is open already, the key is made anew before the guard looks: the hold is FENCED."""
    async with open_infra(etcd.node("one"), ttl=60) as infra:
        await infra.lock("other").acquire()
        await trio.sleep(1)
        hold = await infra.lock("job").acquire()
        await trio.sleep(0.1)
        await etcd.delete(KeyRange.one(key_of(hold)))
        await etcd.put(key_of(hold), b"", lease=infra.session.lease.id)
        await trio.sleep(1)
        assert LockStatus.FENCED is hold.status


async def test_holder_that_goes_in_a_gap_of_the_watch_is_not_missed(etcd, autojump_clock):
    """The watch breaks while a look is answered, and the holder goes meanwhile: the new watch wakes the waiter."""
    slow = FaultyBackend(etcd.node("two"))
    watches = FaultyWatches(slow)
    async with open_infra(etcd.node("one"), ttl=60) as one, open_infra(watches, seed=2, ttl=60) as two:
        hold = await one.lock("job").acquire()
        granted = trio.Event()

        async def wait() -> None:
            async with two.lock("job"):
                granted.set()

        async with trio.open_nursery() as nursery:
            slow.only = lambda verb, _: verb == "range"
            slow.delay_next_answer(2)
            nursery.start_soon(wait)
            await trio.sleep(0.5)
            assert 1 == slow.struck
            slow.only = lambda verb, _: verb == "watch"
            slow.delay_next(0.5)
            watches.break_all()
            await trio.sleep(0.3)
            assert 2 == slow.struck
            await hold.release()
            await trio.sleep(1)
            assert not granted.is_set()
            with trio.fail_after(2):
                await granted.wait()


async def test_failed_read_of_a_guard_is_repeated(etcd, autojump_clock):
    """The watch is open, and reads fail for 7 s after the key is gone: afterwards the hold is FENCED."""
    faulty = FaultyBackend(etcd.node("one"))
    faulty.only = lambda verb, request: verb == "txn" and request.is_read_only
    async with open_infra(faulty, ttl=60) as infra:
        await infra.lock("other").acquire()
        await trio.sleep(1)
        hold = await infra.lock("job").acquire()
        await etcd.delete(KeyRange.one(key_of(hold)))
        for _ in range(100):
            faulty.refuse_next()
        await trio.sleep(7)
        assert LockStatus.ACQUIRED is hold.status
        faulty.forget_faults()
        await trio.sleep(2)
        assert LockStatus.FENCED is hold.status


async def test_watch_closes_when_idle_and_opens_again(etcd, autojump_clock):
    """The watch outlives 10 s without listeners, not 31; the next one who waits has it opened again."""
    recording = RecordingBackend(etcd.node("one"))

    async def hold_for_a_second() -> None:
        async with one.lock("job"):
            await trio.sleep(1)

    async def touch() -> None:
        async with two.lock("other"):
            pass

    async with open_infra(recording, ttl=60) as one, open_infra(etcd.node("two"), seed=2, ttl=60) as two:
        await hold_for_a_second()
        await touch()
        await trio.sleep(10)
        await touch()
        await hold_for_a_second()
        assert 1 == recording.verbs().count("watch")
        await touch()
        await trio.sleep(IDLE_SECONDS + 1)
        await touch()
        assert 1 == recording.verbs().count("watch")
        busy = await two.lock("job").acquire()
        with trio.fail_after(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hold_for_a_second)
                await trio.sleep(0.5)
                assert 2 == recording.verbs().count("watch")
                await busy.release()


async def test_deletion_before_the_key_was_created_is_not_the_hold_s(etcd, autojump_clock):
    """A late event tells of a deletion up to the create revision: only one beyond it ends the hold."""
    async with open_infra(etcd.node("one"), ttl=60) as infra:
        hold = await infra.lock("job").acquire()
        await trio.sleep(1)
        watch = infra.session.key_watch(KEYS.locks)
        watch.deliver_deleted(key_of(hold), hold.token)
        assert LockStatus.ACQUIRED is hold.status
        watch.deliver_deleted(key_of(hold), hold.token + 1)
        assert LockStatus.FENCED is hold.status
