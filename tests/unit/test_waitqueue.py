"""The line at its edges: late answers, moved generations, foreign hands, a full store."""

from __future__ import annotations

import pytest
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange, Txn
from etcd_infra._primitives._hold import LockStatus
from etcd_infra.errors import LockLostError, SessionLostError
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra
from tests.helpers.watches import FaultyWatches

KEYS = Keys(NAMESPACE)


def line(etcd, name="job"):
    """List the keys in the line at this very moment, oldest first."""
    within = KeyRange.prefix(KEYS.lock_line(name))
    found = [kv for kv in etcd.store.snapshot().kvs if kv.key in within]
    return sorted(found, key=lambda kv: kv.create_revision)


async def test_holder_that_goes_while_the_look_is_answered_is_not_missed(etcd, autojump_clock):
    """A release after a look was read and before its answer came wakes the waiter."""
    slow = FaultyBackend(etcd.node("two"))
    async with open_infra(etcd.node("one")) as one, open_infra(slow, seed=2) as two:
        hold = await one.lock("job").acquire()
        slow.only = lambda verb, _: verb == "range"
        slow.delay_next_answer(1)

        async def let_go() -> None:
            await trio.sleep(0.5)
            await hold.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_go)
            with trio.fail_after(2):
                async with two.lock("job") as mine:
                    assert 1 == slow.struck
                    assert mine.token > hold.token


async def test_nobody_is_granted_because_the_generation_moved(etcd, autojump_clock):
    """Two joins at once with a stale generation both join anew, and both wait behind their owners."""
    async with open_infra(etcd.node("one")) as one, open_infra(etcd.node("two"), seed=2) as two:
        granted = []

        async def join(name: str) -> None:
            with trio.move_on_after(1):
                granted.append(await one.lock(name).acquire())

        async with two.lock("a"), two.lock("b"):
            key = one.session.own_key.key
            await etcd.delete(KeyRange.one(key))
            await etcd.put(key, b"{}", lease=one.session.lease.id)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(join, "a")
                nursery.start_soon(join, "b")
                await trio.sleep(0.5)
                assert 2 == len(line(etcd, "a"))
                assert 2 == len(line(etcd, "b"))
        assert [] == granted


async def test_token_is_the_create_revision_when_others_wrote_meanwhile(etcd, autojump_clock):
    """The join's answer is lost and the store moves on: the token is the key's create revision all the same."""
    faulty = FaultyBackend(etcd.node("one"))

    async def write() -> None:
        await trio.sleep(0.002)
        for _ in range(3):
            await etcd.put(b"other", b"")

    async with open_infra(faulty) as infra, trio.open_nursery() as nursery:
        faulty.lose_next_answer()
        nursery.start_soon(write)
        hold = await infra.lock("job").acquire()
        (mine,) = line(etcd)
        assert mine.create_revision + 3 == etcd.store.revision
        assert mine.create_revision == hold.token
        assert (await etcd.txn(Txn(hold.fence.proof))).succeeded


async def test_place_is_left_though_another_task_moved_the_generation(etcd, autojump_clock):
    """Two joins without an answer are given up one after the other: no key of either is left."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra:

        async def give_up(name: str, seconds: float) -> None:
            with trio.move_on_after(seconds):
                await infra.lock(name).acquire()

        before = infra.session.own_key.generation
        faulty.lose_next_answer()
        faulty.lose_next_answer()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up, "a", 0.001)
            nursery.start_soon(give_up, "b", 0.002)
        assert 2 == faulty.struck
        assert before < infra.session.own_key.generation
        assert [] == line(etcd, "a") + line(etcd, "b")


async def test_rewritten_session_key_stays_on_its_lease(etcd, autojump_clock):
    """A leave that had to move the generation leaves the session key on the lease, and closing removes it."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra:
        session = infra.session
        before = session.own_key.generation
        faulty.lose_next_answer()
        async with infra.lock("job"):
            pass
        found = await etcd.get(session.own_key.key)
        assert session.lease.id == found.lease
        assert before < found.mod_revision
        assert found.mod_revision == session.own_key.generation
    assert await etcd.get(session.own_key.key) is None


async def test_full_store_lets_go_of_a_join_without_an_answer(etcd, autojump_clock):
    """While the store is full, a lock whose join had lost an answer is released, and its key is gone."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra:
        faulty.lose_next_answer()
        hold = await infra.lock("job").acquire()
        etcd.store.full = True
        await hold.release()
        assert [] == line(etcd)
        assert LockStatus.RELEASED is hold.status
        etcd.store.full = False
        async with infra.lock("job"):
            assert 1 == len(line(etcd))


async def test_moved_generation_is_known_at_once(etcd, autojump_clock):
    """After a leave that moved the generation the next lock costs one round trip as ever."""
    faulty = FaultyBackend(etcd.node("one"))
    recording = RecordingBackend(faulty)
    async with open_infra(recording, ttl=60) as infra:
        faulty.lose_next_answer()
        async with infra.lock("job"):
            pass
        recording.calls.clear()
        hold = await infra.lock("job").acquire()
        assert ["txn"] == recording.verbs()
        await hold.release()
        assert ["txn"] * 2 == recording.verbs()


async def test_refused_copies_cost_no_generation(etcd, autojump_clock):
    """Joins that never reached a server, for 6 s, leave nothing to outdate: the generation stays."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra, trio.open_nursery() as nursery:
        before = infra.session.own_key.generation
        for _ in range(100):
            faulty.refuse_next()

        async def recover() -> None:
            await trio.sleep(6)
            faulty.forget_faults()

        nursery.start_soon(recover)
        hold = await infra.lock("job").acquire()
        assert 6 <= trio.current_time()
        await hold.release()
        assert before == infra.session.own_key.generation


async def test_waiter_of_the_same_process_needs_no_event(etcd, autojump_clock):
    """Someone in the middle gives up while the watch is deaf: who stood behind is next all the same."""
    watches = FaultyWatches(etcd.node("one"))
    async with open_infra(watches, ttl=60) as infra:
        hold = await infra.lock("job").acquire()
        middle = trio.CancelScope()
        granted = trio.Event()

        async def give_up() -> None:
            with middle:
                await infra.lock("job").acquire()

        async def wait() -> None:
            async with infra.lock("job"):
                granted.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            await trio.sleep(0.1)
            nursery.start_soon(wait)
            await trio.sleep(1)
            watches.deaf = True
            middle.cancel()
            await trio.sleep(1)
            await hold.release()
            with trio.fail_after(0.1):
                await granted.wait()


async def test_place_that_somebody_made_anew_is_not_mine(etcd, autojump_clock):
    """A waiter's key is deleted and created again by other hands: LockLostError, and the holder keeps the lock."""
    async with open_infra(etcd.node("one")) as one, open_infra(etcd.node("two"), seed=2) as two:
        hold = await one.lock("job").acquire()

        async def meddle() -> None:
            await trio.sleep(1)
            place = line(etcd)[1]
            await etcd.delete(KeyRange.one(place.key))
            await etcd.put(place.key, b"", lease=place.lease)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(meddle)
            with trio.fail_after(2), pytest.raises(LockLostError, match="was deleted"):
                await two.lock("job").acquire()
        two.session.check()
        hold.check()
        await hold.release()


async def test_attempt_that_was_made_anew_behind_others_holds_nothing(etcd, autojump_clock):
    """An attempt's answer is lost, and its key made anew behind another's: None, and only the other is in line."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        other = KEYS.lock_line("job") + b"other-1"

        async def meddle() -> None:
            await trio.sleep(0.002)
            (place,) = line(etcd)
            await etcd.delete(KeyRange.one(place.key))
            await etcd.put(other, b"")
            await etcd.put(place.key, place.value, lease=place.lease)

        faulty.lose_next_answer()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(meddle)
            async with infra.lock("job").attempt() as hold:
                assert None is hold
                assert [other] == [kv.key for kv in line(etcd)]


async def test_own_lease_that_ends_before_the_join_loses_the_lock_only(etcd, autojump_clock):
    """The lock's own lease is revoked between its grant and the join: LockLostError, and the session lives."""
    slow = FaultyBackend(etcd.node("one"))
    async with open_infra(slow) as infra:
        session = infra.session
        slow.only = lambda verb, _: verb == "txn"
        slow.delay_next(0.5)

        async def revoke() -> None:
            await trio.sleep(0.1)
            (own,) = set(await etcd.lease_list()) - {session.lease.id}
            await etcd.lease_revoke(own)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(revoke)
            with pytest.raises(LockLostError, match="does not exist any more"):
                await infra.lock("job", ttl=60).acquire()
        session.check()
        assert [] == line(etcd)
        assert (session.lease.id,) == await etcd.lease_list()


async def test_waiter_on_a_lost_session_stops_before_its_lease_can_end(etcd, autojump_clock):
    """A waiter that is partitioned raises SessionLostError while its lease is still alive in etcd."""
    node = etcd.node("two")
    async with open_infra(etcd.node("one"), ttl=60) as one, open_infra(node, seed=2, ttl=10) as two:
        lease = two.session.lease.id
        async with one.lock("job"), trio.open_nursery() as nursery:
            nursery.start_soon(cut_after, 1, node)
            with trio.fail_after(11), pytest.raises(SessionLostError):
                await two.lock("job").acquire()
            assert lease in await etcd.lease_list()
            node.heal()


async def cut_after(seconds, node):
    await trio.sleep(seconds)
    node.partition()


async def test_attempt_on_a_lost_session_raises(etcd, autojump_clock):
    """An attempt whose session is lost meanwhile raises, and does not run its body with None."""
    node = etcd.node("one")
    async with open_infra(node, ttl=10) as infra:
        node.partition()
        with trio.fail_after(11), pytest.raises(SessionLostError):
            async with infra.lock("job").attempt():
                pytest.fail("the body ran")
        node.heal()


async def test_join_on_a_session_lost_meanwhile_is_not_sent_again(etcd, autojump_clock):
    """The session is lost while a join waits to be sent again: SessionLostError, and nobody is in line."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra:
        session = infra.session
        faulty.lose_next_request()

        async def lose() -> None:
            await trio.sleep(0.002)
            session.lose(SessionLostError("on demand"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose)
            with pytest.raises(SessionLostError, match="on demand"):
                await infra.lock("job").acquire()
        await trio.sleep(5)
        assert [] == line(etcd)
