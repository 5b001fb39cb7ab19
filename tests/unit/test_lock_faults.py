"""Locks whose requests and answers get lost, are late, or meet a full store."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange, Put, Txn
from etcd_infra._primitives._hold import LockStatus
from etcd_infra.errors import LockLostError, StorageFullError
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)
LINE = KeyRange.prefix(KEYS.lock_line("job"))


def line(etcd):
    """List the keys in the line at this very moment."""
    return [kv for kv in etcd.store.snapshot().kvs if kv.key in LINE]


async def test_lost_answer_of_a_join_is_found_again(etcd, autojump_clock):
    """The join was applied and its answer lost: acquiring succeeds with the first copy's create revision."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        faulty.lose_next_answer()
        with trio.fail_after(1):
            async with infra.lock("job") as hold:
                (mine,) = line(etcd)
                assert hold.token == mine.create_revision
                assert (await etcd.txn(Txn(hold.fence.proof, (Put(b"data"),)))).succeeded


async def test_lost_answer_of_a_release_is_no_loss(etcd, autojump_clock):
    """A release that was applied without an answer is repeated, and is RELEASED, not FENCED."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        async with infra.lock("job") as hold:
            faulty.lose_next_answer()
        assert hold.status is LockStatus.RELEASED
        assert [] == line(etcd)


@pytest.mark.parametrize("way", ["acquire", "attempt", "give up"])
async def test_no_late_copy_of_a_join_comes_back(way, autojump_clock):
    """In 1,000 runs with late copies of the join, no key appears after the lock was let go of."""
    runs = 1000 // 3 + 1
    for seed in range(runs):
        await one_late_run(way, seed)


async def one_late_run(way: str, seed: int) -> None:
    draws = random.Random(seed)
    etcd = MemoryEtcd()
    faulty = FaultyBackend(etcd.node("one"))
    async with (
        open_infra(faulty, seed=seed, ttl=60) as one,
        open_infra(etcd.node("two"), seed=-seed - 1) as two,
    ):
        session = one.session
        for _ in range(draws.randint(1, 3)):
            faulty.apply_next_late(draws.uniform(0, 4))
        busy = await two.lock("job").acquire() if way == "attempt" else None
        with trio.move_on_after(draws.uniform(0, 3) if way == "give up" else 60):
            if way == "attempt":
                async with one.lock("job").attempt() as hold:
                    assert hold is None or hold.token
            else:
                await (await one.lock("job").acquire()).release()
        done_at = etcd.store.revision
        if busy is not None:
            await busy.release()
        if way == "give up":
            await trio.sleep(2.1)
            done_at = etcd.store.revision
        await trio.sleep(6)
        own = b"%x-" % session.lease.id
        for commit in etcd.store.history.between(done_at + 1, etcd.store.revision):
            for event in commit.events:
                assert event.is_delete or not (event.key in LINE and own in event.key), (way, seed, event)
        assert session is one.session
        with trio.fail_after(0.1):
            async with two.lock("job"):
                pass


async def test_refused_attempt_never_wins_later(etcd, autojump_clock):
    """An attempt whose first copy is late is refused only after that copy is dead."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as one, open_infra(etcd.node("two"), seed=2) as two:
        busy = await two.lock("job").acquire()
        faulty.apply_next_late(5)
        async with one.lock("job").attempt() as hold:
            assert hold is None
        await busy.release()
        await trio.sleep(10)
        assert [] == line(etcd)


async def test_thousand_failed_tries_leave_no_lease(etcd, autojump_clock):
    """1,000 refused attempts with leases of their own leave as many leases as before."""
    async with open_infra(etcd.node("one")) as one, open_infra(etcd.node("two"), seed=2) as two:
        async with two.lock("job"):
            for _ in range(1000):
                async with one.lock("job", ttl=10).attempt() as hold:
                    assert hold is None
        assert 2 == len(await etcd.lease_list())


async def test_full_store_still_lets_go(etcd, autojump_clock):
    """With NOSPACE a lock can be released and given up, and acquiring says StorageFullError."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra:
        hold = await infra.lock("job").acquire()
        faulty.apply_next_late(3)
        with trio.move_on_after(0.01):
            await infra.lock("other").acquire()
        etcd.store.full = True
        await hold.release()
        assert hold.status is LockStatus.RELEASED
        with pytest.raises(StorageFullError):
            await infra.lock("job").acquire()
        await trio.sleep(3)
        etcd.store.full = False
        await trio.sleep(10)
        assert [] == [kv for kv in etcd.store.snapshot().kvs if kv.key.startswith(KEYS.locks)]
        async with infra.lock("job"), infra.lock("other"):
            infra.session.check()


async def test_cancelled_acquire_returns_soon_when_etcd_is_unreachable(etcd, autojump_clock):
    """Cancelled while etcd is away, acquiring and releasing return within 2.5 seconds."""
    node = etcd.node("one")
    async with open_infra(node, ttl=60) as infra:
        hold = await infra.lock("held").acquire()
        node.partition()
        began = trio.current_time()
        with trio.move_on_after(1):
            await infra.lock("job").acquire()
        assert trio.current_time() - began <= 3.5
        began = trio.current_time()
        await hold.release()
        assert trio.current_time() - began <= 2.5
        node.heal()
        await trio.sleep(12)
        assert [] == [kv for kv in etcd.store.snapshot().kvs if kv.key.startswith(KEYS.locks)]


async def test_predecessor_that_goes_between_two_calls_is_not_missed(etcd, autojump_clock):
    """The holder releases just while the waiter looks: the waiter is granted at once all the same."""
    for pause in range(12):
        slow = FaultyBackend(etcd.node("slow"))
        slow.only = lambda verb, _: verb in {"range", "watch"}
        async with open_infra(etcd.node("one"), seed=1) as one, open_infra(slow, seed=2) as two:
            hold = await one.lock("job").acquire()
            slow.delay_next(0.5)
            slow.delay_next(0.5)

            async def let_go(hold=hold, pause=pause) -> None:
                await trio.sleep(pause * 0.1)
                await hold.release()

            with trio.fail_after(3):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(let_go)
                    async with two.lock("job") as mine:
                        assert mine.token > hold.token


async def test_waiter_behind_a_broken_watch_reads_again(etcd, autojump_clock):
    """The holder goes while the waiter's watch is down: the re-created watch makes it look."""
    node = etcd.node("two")
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(node, seed=2, ttl=60) as two:
        hold = await one.lock("job").acquire()
        granted = trio.Event()

        async def wait() -> None:
            async with two.lock("job"):
                granted.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(1)
            node.partition()
            await hold.release()
            await trio.sleep(1)
            assert not granted.is_set()
            node.heal()
            with trio.fail_after(2):
                await granted.wait()


async def test_crashed_holder_is_overtaken_when_its_lease_ends(etcd, autojump_clock):
    """A lock whose owner died is granted when the owner's lease runs out, not before."""
    node = etcd.node("one")
    async with open_infra(etcd.node("two"), seed=2) as two, trio.open_nursery() as nursery:
        ready = trio.Event()

        async def doomed() -> None:
            async with open_infra(node, seed=1, ttl=10) as one:
                await one.lock("job").acquire()
                ready.set()
                await trio.sleep_forever()

        nursery.start_soon(doomed)
        await ready.wait()
        node.crash()
        began = trio.current_time()
        async with two.lock("job"):
            assert 9 <= trio.current_time() - began <= 11.5
        nursery.cancel_scope.cancel()


def test_blocked_loop_sees_the_loss_at_its_first_checkpoint():
    """A task that blocks the loop beyond the TTL is cancelled at its next checkpoint, before any renewal."""
    clock = trio.testing.MockClock(rate=0.0)

    async def main() -> None:
        async with open_infra(MemoryEtcd(), ttl=10) as infra:
            with pytest.raises(LockLostError):
                async with infra.lock("job"):
                    clock.jump(60)
                    await trio.lowlevel.checkpoint()
                    pytest.fail("the body went on")

    trio.run(main, clock=clock)


async def test_holder_outlives_a_member_that_hangs(etcd, autojump_clock):
    """One member does not answer renewals for 7 s: with a TTL of 4 s the session lives on through another."""

    class Members(FaultyBackend):
        calls = 0

        async def around(self, verb, request, call):
            if verb == "lease_keep_alive":
                self.calls += 1
                if self.calls % 2 and trio.current_time() < hang_until:
                    await trio.sleep(7)
            return await super().around(verb, request, call)

    hang_until = trio.current_time() + 60
    members = Members(etcd.node("one"))
    async with open_infra(members, ttl=4) as infra, infra.lock("job") as hold:
        await trio.sleep(50)
        hold.check()


async def test_recorded_wait_sends_nothing(etcd, autojump_clock):
    """While it waits, a waiter sends nothing but renewals and the janitor's looks."""
    recording = RecordingBackend(etcd.node("two"))
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(recording, seed=2) as two:
        hold = await one.lock("job").acquire()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with two.lock("job"):
                    pass

            nursery.start_soon(wait)
            await trio.sleep(1)
            recording.calls.clear()
            await trio.sleep(60)
            assert {"lease_keep_alive", "lease_time_to_live", "range"} == set(recording.verbs())
            # Ten renewals, six rounds of the janitor, and a look each half minute.
            assert len(recording.verbs()) <= 10 + 2 * 6 + 2
            await hold.release()
