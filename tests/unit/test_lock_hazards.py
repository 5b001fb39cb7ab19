"""Hazards that a review found: each was a bug once."""

from __future__ import annotations

import pytest
import trio

from etcd_infra import (
    AccessDeniedError,
    LockLostError,
    OutcomeUnknownError,
    Renewal,
    SessionLostError,
    StorageFullError,
    open_coordinator,
)
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange, Put, Txn
from etcd_infra._primitives._hold import LockStatus
from etcd_infra.testing import FaultyBackend, MemoryEtcd
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)


class Switched(FaultyBackend):
    """A node whose store can be exchanged under it, as by a restore."""

    async def around(self, verb, request, call):
        return await super().around(verb, request, call)

    def switch(self, etcd):
        self.inner = etcd.node("restored")


async def test_outer_cancellation_frees_the_lock_after_the_body(etcd, autojump_clock):
    """Cancelled from outside the coordinator, the body cleans up first; only then is the lock free."""
    order = []
    async with open_infra(etcd.node("two"), seed=2) as two, trio.open_nursery() as nursery:

        async def wait() -> None:
            await trio.sleep(0.5)
            async with two.lock("job"):
                order.append("next holder")

        nursery.start_soon(wait)
        with trio.move_on_after(1):
            async with open_infra(etcd.node("one"), seed=1) as one, one.lock("job") as hold:
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(20)
                        hold.check()
                        assert await one.lock("job").validate(hold.fence)
                        order.append("body ended")
    assert ["body ended", "next holder"] == order


async def test_restored_store_grants_nothing_twice(etcd, autojump_clock):
    """A join on a store that is behind our session is refused with a lost session, not granted as token 0."""
    switched = Switched(etcd.node("one"))
    for _ in range(20):
        await etcd.put(b"k", b"v")
    async with open_infra(switched, seed=1) as one:
        lease = one.session.lease.id
        restored = MemoryEtcd()
        await restored.lease_grant(30, lease=lease)
        await restored.put(one.session.own_key.key, b"{}", lease=lease)
        await restored.put(KEYS.lock_line("job") + b"foreign", b"")
        switched.switch(restored)
        with pytest.raises(SessionLostError):
            await one.lock("job").acquire()


async def test_restore_between_two_holds_is_noticed(etcd, autojump_clock):
    """Tokens never go back within a session: after a restore the next join ends it."""
    switched = Switched(etcd.node("one"))
    async with open_infra(switched, seed=1) as one:
        session = one.session
        for _ in range(20):
            async with one.lock("job") as hold:
                pass
        restored = MemoryEtcd()
        await restored.lease_grant(30, lease=session.lease.id)
        await restored.put(session.own_key.key, b"{}", lease=session.lease.id)
        session.own_key.generation = 2
        switched.switch(restored)
        with pytest.raises(SessionLostError, match=r"store"):
            async with one.lock("job") as again:
                assert again.token > hold.token
        session.lease.is_lost()
        assert "StoreResetError" == type(session.lease.error).__name__


@pytest.mark.parametrize("seed", range(60))
async def test_deadline_and_status_agree(etcd, autojump_clock, seed):
    """A body that is cut off by its deadline always leaves with the loss, whatever the rounding."""
    node = etcd.node("one")
    await trio.sleep(seed * 0.137)
    async with open_infra(node, seed=seed, ttl=7) as infra:
        await trio.sleep(0.1 * seed / 3)
        with pytest.raises(LockLostError):
            async with infra.lock("job") as hold:
                node.partition()
                await trio.sleep_forever()
        assert LockStatus.EXPIRED is hold.status


async def test_lock_of_a_closed_coordinator_says_so(etcd, autojump_clock):
    """Acquiring after the coordinator was closed raises, also for a task that waited between two sessions."""
    async with open_infra(etcd.node("one")) as infra:
        lock = infra.lock("job")
        async with trio.open_nursery() as nursery:

            async def wait_between() -> None:
                with pytest.raises(SessionLostError):
                    await lock.acquire()

            etcd.store.full = True
            await etcd.lease_revoke(infra.session.lease.id)
            await trio.sleep(10)
            nursery.start_soon(wait_between)
            await trio.sleep(1)
            infra._sessions._closed = True
            infra._sessions._opened.set()
        etcd.store.full = False
    with trio.fail_after(1), pytest.raises(SessionLostError, match="closed"):
        await lock.acquire()


async def test_task_that_outlives_its_coordinator_does_not_wait_for_ever(etcd, autojump_clock):
    """A waiter in line when the coordinator closes is told that the session is lost."""
    async with open_infra(etcd.node("two"), seed=2) as two, two.lock("job"), trio.open_nursery() as nursery:
        async with open_infra(etcd.node("one"), seed=1) as one:

            async def wait() -> None:
                with pytest.raises(SessionLostError):
                    await one.lock("job").acquire()

            nursery.start_soon(wait)
            await trio.sleep(1)


class Unwatchable(FaultyBackend):
    """A node whose user may not watch."""

    async def around(self, verb, request, call):
        if verb == "watch":
            raise AccessDeniedError("etcdserver: permission denied")
        return await super().around(verb, request, call)


async def test_refused_watch_is_told_to_waiters(etcd, autojump_clock):
    """A waiter that may not watch the line raises what etcd said, and leaves the line."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(Unwatchable(etcd), seed=2) as two:
        async with one.lock("job"):
            with trio.fail_after(5), pytest.raises(AccessDeniedError):
                await two.lock("job").acquire()
        assert () == (await one.lock("job").inspect()).queue


async def test_holder_without_a_watch_is_read_from_time_to_time(etcd, autojump_clock):
    """A holder that may not watch learns of its key's deletion within a second, by reading."""
    async with open_infra(Unwatchable(etcd)) as infra:
        with pytest.raises(LockLostError):
            async with infra.lock("job") as hold:
                await trio.sleep(5)
                began = trio.current_time()
                await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
                await trio.sleep_forever()
        assert trio.current_time() - began <= 1


async def test_slot_write_that_was_applied_is_not_called_undone(etcd, autojump_clock):
    """The first copy was applied, its answer lost, and the next copy is refused: the outcome is unknown."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        await infra.session.slots.write(Txn(success=(Put(b"k", b"0"),)))
        faulty.lose_next_answer()

        async def fill() -> None:
            while b"1" not in {kv.value for kv in etcd.store.snapshot().kvs}:
                await trio.sleep(0.001)
            etcd.store.full = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            with pytest.raises(OutcomeUnknownError) as caught:
                await infra.session.slots.write(Txn(success=(Put(b"k", b"1"),)))
        assert isinstance(caught.value.__cause__, StorageFullError)
        etcd.store.full = False
        assert b"1" == (await etcd.get(b"k")).value


async def test_own_lease_ends_with_the_coordinator(etcd, autojump_clock):
    """A lock with a long lease of its own, never released, is free once its coordinator is closed."""
    async with open_infra(etcd.node("one"), seed=1) as one:
        await one.lock("job", ttl=600).acquire()
    assert () == await etcd.lease_list()
    async with open_infra(etcd.node("two"), seed=2) as two, two.lock("job").attempt() as hold:
        assert hold is not None


async def test_short_outage_of_reads_keeps_the_place_in_line(etcd, autojump_clock):
    """A waiter that can not look for ten seconds is in line still, and is granted afterwards."""

    class Blind(FaultyBackend):
        blind = False

        async def around(self, verb, request, call):
            if self.blind and verb == "range":
                self.refuse_next()
                self.only = lambda *_: True
            return await super().around(verb, request, call)

    blind = Blind(etcd.node("two"))
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(blind, seed=2) as two:
        first = await one.lock("job").acquire()
        blind.blind = True
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with two.lock("job") as hold:
                    assert hold.token > first.token

            nursery.start_soon(wait)
            await trio.sleep(10)
            blind.blind = False
            await first.release()


async def test_own_lease_taken_after_an_outage_has_its_full_time(etcd, autojump_clock):
    """A grant that succeeds after unanswered copies is dated from its own sending."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra:
        for _ in range(40):
            faulty.lose_next_request()
        faulty.only = lambda verb, _: verb == "lease_grant"
        began = trio.current_time()
        hold = await infra.lock("job", ttl=5).acquire()
        assert trio.current_time() - began > 5
        assert 4.5 == pytest.approx(hold.remaining(), abs=0.1)
        await hold.release()


@pytest.mark.parametrize("renewal", Renewal)
async def test_own_lease_that_ends_before_the_join_is_answered_grants_nothing(renewal, etcd, autojump_clock):
    """A join whose answer comes after the lock's own lease is lost raises, and leaves nothing."""
    joins = FaultyBackend(etcd.node("one"))
    renewals = FaultyBackend(joins)
    joins.only = lambda verb, request: verb == "txn" and any(isinstance(op, Put) for op in request.success)
    renewals.only = lambda verb, _: verb == "lease_keep_alive"
    async with open_infra(renewals, ttl=60) as infra:
        await infra.backend.put(b"warm", b"up")
        for _ in range(100):
            renewals.lose_next_request()
        joins.delay_next_answer(4)
        with pytest.raises(LockLostError, match="its own lease ended while it was being acquired"):
            await infra.lock("job", ttl=3, renewal=renewal).acquire()
        assert infra.lock("job").status is None
        assert [] == [kv for kv in etcd.store.snapshot().kvs if b"lock/" in kv.key]
        renewals.forget_faults()
        async with infra.lock("job"):
            pass


async def test_nested_locks_are_cleaned_up_together(etcd, autojump_clock):
    """Cancelled without a way to etcd, three nested locks and their coordinator take 2.5 s, not 8."""
    node = etcd.node("one")
    with trio.move_on_after(1):
        async with open_infra(node, ttl=60) as infra, infra.lock("a"), infra.lock("b"), infra.lock("c"):
            node.partition()
            try:
                await trio.sleep_forever()
            finally:
                began = trio.current_time()
    assert trio.current_time() - began <= 2.5


async def test_clean_up_is_not_longer_than_the_lease(etcd, autojump_clock):
    """With 0.3 s of the lease left, giving up takes no longer than that."""
    node = etcd.node("one")
    async with open_infra(node, ttl=4) as infra:
        hold = await infra.lock("job").acquire()
        node.partition()
        while hold.remaining() > 0.3:
            await trio.sleep(0.05)
        began = trio.current_time()
        await hold.release()
        assert trio.current_time() - began <= 0.35


async def test_waiters_own_lease_that_dies_is_the_locks_loss(etcd, autojump_clock):
    """A waiter with a lease of its own that is revoked raises LockLostError: the session lives."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        async with one.lock("job"), trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(LockLostError):
                    await two.lock("job", ttl=30).acquire()

            nursery.start_soon(wait)
            await trio.sleep(1)
            (own,) = set(await etcd.lease_list()) - {one.session.lease.id, two.session.lease.id}
            await etcd.lease_revoke(own)
        two.session.check()


async def test_lock_object_entered_again_after_a_loss(etcd, autojump_clock):
    """Inside the block of a lost hold the same `Lock` may be entered again; both blocks end properly."""
    async with open_infra(etcd.node("one")) as infra:
        lock = infra.lock("job")
        with pytest.raises(LockLostError):
            async with lock as hold:
                with trio.CancelScope(shield=True):
                    await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
                    await trio.sleep(1)
                    async with lock as again:
                        assert again.token > hold.token
                    assert LockStatus.RELEASED is again.status


async def test_failing_observer_harms_nobody(etcd, autojump_clock, caplog):
    """What an observer raises is logged, and changes nothing."""

    def observe(call):
        raise ZeroDivisionError

    async with open_infra(etcd, observer=observe) as infra:
        async with infra.lock("job"):
            await trio.sleep(20)
    assert "the observer failed" in caplog.text


async def test_unknown_options_are_refused_in_memory_too():
    """A misspelt option of `memory://` is a TypeError, as over the network."""
    with pytest.raises(TypeError, match="cal_timeout"):
        async with open_coordinator("memory://", cal_timeout=3):
            pytest.fail("opened")


async def test_fence_of_another_lock_is_no_answer(etcd, autojump_clock):
    """Asking lock "b" about a fence of "a" is a mistake of the caller, not a yes."""
    async with open_infra(etcd) as infra, infra.lock("a") as hold:
        with pytest.raises(ValueError, match="'b'"):
            await infra.lock("b").validate(hold.fence)
        with pytest.raises(ValueError, match="'b'"):
            async with infra.lock("b").fenced(hold.fence):
                pytest.fail("entered")


async def test_lost_delete_event_delays_a_waiter_but_not_for_ever(etcd, autojump_clock):
    """A DELETE that the server never tells is found by looking again within half a minute."""

    class Deaf(FaultyBackend):
        def watch(self, range_, /, **options):
            return super().watch(KeyRange.one(b"elsewhere"), **options)

    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(Deaf(etcd.node("two")), seed=2) as two:
        first = await one.lock("job").acquire()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with trio.fail_after(40):
                    async with two.lock("job"):
                        pass

            nursery.start_soon(wait)
            await trio.sleep(1)
            await first.release()
