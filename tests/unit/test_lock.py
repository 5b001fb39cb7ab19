"""What a lock promises, on the in-memory etcd."""

from __future__ import annotations

import pickle

import pytest
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import DeleteRange, KeyRange, Put, Range, Txn
from etcd_infra._primitives._hold import LockStatus
from etcd_infra._primitives._lock_like import Renewal
from etcd_infra._primitives.lock_info import LockInfo
from etcd_infra.errors import FencedError, LockLostError, NotHeldError, SessionLostError
from etcd_infra.testing import RecordingBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)


async def places(etcd, name="job"):
    """List the keys in a lock's line, oldest first."""
    kvs = (await etcd.range(Range(KeyRange.prefix(KEYS.lock_line(name))))).kvs
    return sorted(kvs, key=lambda kv: kv.create_revision)


async def write_fenced(etcd, fence, value=b"x"):
    """Write a key under the fence's proof; return whether etcd let it through."""
    return (await etcd.txn(Txn(fence.proof, (Put(b"data", value),)))).succeeded


async def test_free_lock_costs_one_round_trip_each_way(etcd, autojump_clock):
    """Taking a free lock is one Txn, and so is giving it back."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        hold = await infra.lock("job").acquire()
        assert ["txn"] == recording.verbs()
        await hold.release()
        assert ["txn", "txn"] == recording.verbs()


async def test_contended_lock_costs_two_round_trips_and_one_per_predecessor(etcd, autojump_clock):
    """A waiter joins, looks, and looks again for each predecessor that it saw go."""
    recording = RecordingBackend(etcd.node("two"))
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(recording, seed=2) as two:
        first = await one.lock("job").acquire()
        recording.calls.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold_for, two.lock("job"), 0.0)
            await trio.testing.wait_all_tasks_blocked()
            assert ["txn", "watch", "range"] == recording.verbs()
            await first.release()
        assert ["txn", "watch", "range", "range", "txn"] == recording.verbs()


async def test_process_that_watches_already_needs_no_look_after_the_join(etcd, autojump_clock):
    """While the line's watch is open, the join's own answer says whom to wait for."""
    recording = RecordingBackend(etcd.node("two"))
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(recording, seed=2) as two:
        first = await one.lock("job").acquire()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold_for, two.lock("job"), 0.0)
            await trio.testing.wait_all_tasks_blocked()
            recording.calls.clear()
            nursery.start_soon(hold_for, two.lock("job"), 0.0)
            await trio.testing.wait_all_tasks_blocked()
            assert ["txn"] == recording.verbs()
            await first.release()
        # The first one looks, leaves and grants the second one its turn, which leaves.
        assert ["txn", "range", "txn", "txn"] == recording.verbs()


async def hold_for(lock, seconds, log=None, name=None):
    """Take the lock, note the token, hold it for a while."""
    async with lock as hold:
        if log is not None:
            log.append((name, hold.token))
        await trio.sleep(seconds)


async def test_first_come_first_served_with_growing_tokens(infra, autojump_clock):
    """Waiters are served in the order of joining, and each token is larger than the one before."""
    log: list[tuple[int, int]] = []
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(hold_for, infra.lock("job"), 1.0, log, number)
            await trio.testing.wait_all_tasks_blocked()
    assert list(range(10)) == [name for name, _ in log]
    tokens = [token for _, token in log]
    assert sorted(set(tokens)) == tokens


async def test_two_tasks_with_one_lock_object_exclude_each_other(infra, autojump_clock):
    """One `Lock` object shared by tasks admits one at a time; a release frees its own hold only."""
    lock = infra.lock("job")
    inside = 0

    async def work() -> None:
        nonlocal inside
        async with lock:
            inside += 1
            assert inside == 1
            await trio.sleep(0.5)
            inside -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(work)
    assert inside == 0


async def test_names_that_begin_alike_do_not_meet(infra, autojump_clock):
    """Locks "job", "job2", "job/1" and "job%2F1" are four locks."""
    with trio.fail_after(1):
        async with infra.lock("job"), infra.lock("job2"), infra.lock("job/1"), infra.lock("job%2F1"):
            held = await infra.inspect("locks")
    assert ["job", "job%2F1", "job/1", "job2"] == sorted(info.name for info in held)


@pytest.mark.parametrize("way", ["enter", "acquire", "attempt"])
async def test_same_task_twice_is_an_error(infra, way, autojump_clock):
    """A task that holds a lock can not wait for it: RuntimeError at once, and the first hold stays."""
    async with infra.lock("job") as hold:
        lock = infra.lock("job")
        with pytest.raises(RuntimeError, match="already"):
            if way == "enter":
                async with lock:
                    pass
            elif way == "acquire":
                await lock.acquire()
            else:
                async with lock.attempt():
                    pass
        hold.check()
    async with infra.lock("job"):
        pass


async def test_attempt_takes_a_free_lock_and_refuses_a_held_one(etcd, autojump_clock):
    """`attempt` is one round trip and never waits: a hold, or None."""
    recording = RecordingBackend(etcd.node("two"))
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(recording, seed=2) as two:
        async with one.lock("job").attempt() as mine:
            assert mine is not None
            recording.calls.clear()
            async with two.lock("job").attempt() as other:
                assert other is None
            assert ["txn"] == recording.verbs()
            assert 1 == len(await places(etcd))
        async with two.lock("job").attempt() as other:
            assert other is not None
    assert [] == await places(etcd)


async def test_deleted_key_cancels_the_body_within_a_second(etcd, infra, autojump_clock):
    """An operator deletes the key of a held lock: the body is cancelled, leaving raises, status FENCED."""
    began = trio.current_time()
    with pytest.raises(LockLostError, match="deleted"):
        async with infra.lock("job") as hold:
            await trio.sleep(5)
            began = trio.current_time()
            await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
            await trio.sleep_forever()
    assert trio.current_time() - began <= 1
    assert hold.status is LockStatus.FENCED
    assert not await write_fenced(etcd, hold.fence)
    with pytest.raises(LockLostError):
        hold.check()


async def test_deletion_right_after_acquiring_is_noticed(etcd, infra, autojump_clock):
    """A key that is deleted before its watch began is missed by no one: the first read shows it."""
    began = trio.current_time()
    with pytest.raises(LockLostError):
        async with infra.lock("job") as hold:
            await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
            await trio.sleep_forever()
    assert trio.current_time() - began <= 1


async def test_deletion_during_a_short_hold_is_found_at_release(etcd, infra, autojump_clock):
    """A hold too short to be watched learns of its loss when it lets go."""
    with pytest.raises(LockLostError):
        async with infra.lock("job") as hold:
            await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
    assert hold.status is LockStatus.FENCED


async def test_revoked_lease_expires_the_hold(etcd, infra, autojump_clock):
    """The session's lease is revoked under a hold: EXPIRED, and a new session serves the next one."""
    session = infra.session
    with pytest.raises(LockLostError, match="lease"):
        async with infra.lock("job") as hold:
            await trio.sleep(1)
            await etcd.lease_revoke(session.lease.id)
            await trio.sleep_forever()
    assert hold.status is LockStatus.EXPIRED
    async with infra.lock("job") as again:
        assert again.token > hold.token
    assert infra.session is not session


async def test_partitioned_holder_stops_before_its_lease_can_end(etcd, autojump_clock):
    """A holder that can not renew is cancelled while its key still exists; then the next one is granted."""
    node = etcd.node("one")
    async with open_infra(node, seed=1, ttl=10) as one, open_infra(etcd.node("two"), seed=2) as two:
        order = []

        async def holder() -> None:
            with pytest.raises(LockLostError):
                async with one.lock("job"):
                    node.partition()
                    try:
                        await trio.sleep_forever()
                    finally:
                        order.append(("stopped", len(await_free(etcd))))
            node.heal()

        async def waiter() -> None:
            await trio.sleep(1)
            async with two.lock("job"):
                order.append(("granted", 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(holder)
            nursery.start_soon(waiter)
    assert [("stopped", 2), ("granted", 1)] == order


def await_free(etcd):
    """Read the line without a checkpoint: what is there at this very moment."""
    line = KeyRange.prefix(KEYS.lock_line("job"))
    return [kv for kv in etcd.store.snapshot().kvs if kv.key in line]


async def test_hold_after_a_long_pause_is_lost_at_the_first_look(etcd, autojump_clock):
    """After a pause beyond the TTL `status`, `remaining` and `check` tell the truth without any await."""
    boot = [0.0]
    async with open_infra(etcd.node("one"), ttl=10, boot_clock=lambda: boot[0]) as infra:
        hold = await infra.lock("job").acquire()
        assert hold.remaining() == pytest.approx(9.0, abs=0.1)
        boot[0] += 60
        assert hold.status is LockStatus.EXPIRED
        assert hold.remaining() == 0
        with pytest.raises(LockLostError):
            hold.check()
        boot[0] -= 60
        assert hold.status is LockStatus.EXPIRED, "a lost hold is never revived"
        with pytest.raises(LockLostError):
            await hold.release()


async def test_suspended_machine_loses_the_lock_within_a_second_of_waking(etcd, autojump_clock):
    """The boot-time clock jumps while the monotonic one stands still: the body is cancelled soon after."""
    boot = [0.0]
    async with open_infra(etcd.node("one"), ttl=30, boot_clock=lambda: boot[0] + trio.current_time()) as infra:
        with pytest.raises(LockLostError):
            async with infra.lock("job"):
                await trio.sleep(0.3)
                boot[0] += 60
                woke = trio.current_time()
                await trio.sleep_forever()
        assert trio.current_time() - woke <= 1.1


async def test_waiter_whose_lease_dies_is_told_and_not_granted(etcd, autojump_clock):
    """A waiter's lease is revoked while the holder stays: the wait ends within a second, with a loss."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        async with one.lock("job") as hold:
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    with pytest.raises(SessionLostError):
                        async with two.lock("job"):
                            pytest.fail("granted without a key")

                nursery.start_soon(wait)
                await trio.sleep(1)
                began = trio.current_time()
                await etcd.lease_revoke(two.session.lease.id)
            assert trio.current_time() - began <= 1
            hold.check()


async def test_waiter_whose_key_is_deleted_is_told(etcd, autojump_clock):
    """An operator deletes a waiter's key under a living lease: LockLostError within a second."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        async with one.lock("job"), trio.open_nursery() as nursery:
            lock = two.lock("job")

            async def wait() -> None:
                with pytest.raises(LockLostError):
                    await lock.acquire()

            nursery.start_soon(wait)
            await trio.sleep(1)
            await etcd.delete(KeyRange.one((await places(etcd))[1].key))
        assert lock.status is LockStatus.FAILED


async def test_waiter_that_gives_up_hands_nothing_on(infra, etcd, autojump_clock):
    """The middle one of three leaves the line: the last keeps waiting for the first."""
    granted = []
    async with trio.open_nursery() as nursery:
        first = await infra.lock("job").acquire()
        middle = trio.CancelScope()

        async def give_up() -> None:
            with middle:
                async with infra.lock("job"):
                    granted.append("middle")

        nursery.start_soon(give_up)
        await trio.sleep(0.1)
        nursery.start_soon(hold_for, infra.lock("job"), 0, granted, "last")
        await trio.sleep(0.1)
        middle.cancel()
        await trio.sleep(5)
        assert [] == granted
        assert 2 == len(await places(etcd))
        await first.release()
    assert ["last"] == [name for name, _ in granted]


async def test_one_release_wakes_one_waiter(etcd, autojump_clock):
    """With ten waiters in line, a release makes exactly one of them look again."""
    recording = RecordingBackend(etcd.node("many"))
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(recording, seed=2) as many:
        first = await one.lock("job").acquire()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(hold_for, many.lock("job"), 1000)
            await trio.sleep(1)
            recording.calls.clear()
            await first.release()
            await trio.sleep(0.1)
            assert ["range"] == recording.verbs()
            nursery.cancel_scope.cancel()


async def test_body_exception_leaves_bare_and_carries_the_loss(etcd, infra, autojump_clock):
    """The body's own exception wins over the loss, ungrouped, with the loss as a note."""
    with pytest.raises(ZeroDivisionError) as caught:
        async with infra.lock("job") as hold:
            await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
            try:
                await trio.sleep_forever()
            finally:
                1 / 0  # noqa: B018
    assert any("lost" in note for note in caught.value.__notes__)


async def test_body_exception_leaves_bare_and_the_lock_is_free(etcd, infra, autojump_clock):
    """An exception in the body releases the lock and passes unchanged."""
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with infra.lock("job"):
            raise error
    assert error is caught.value
    assert [] == await places(etcd)


async def test_release_twice_is_the_callers_mistake(infra, autojump_clock):
    """Releasing a released hold raises NotHeldError, and so does every use of it."""
    hold = await infra.lock("job").acquire()
    await hold.release()
    assert hold.status is LockStatus.RELEASED
    for use in (hold.release, hold.extend):
        with pytest.raises(NotHeldError):
            await use()
    with pytest.raises(NotHeldError):
        hold.check()


async def test_late_release_spares_the_next_acquisition(etcd, infra, autojump_clock):
    """A release that is repeated after the lock was taken again by the same session changes nothing."""
    hold = await infra.lock("job").acquire()
    proof = hold.fence.proof
    await hold.release()
    async with infra.lock("job") as again:
        stale = Txn(proof, (Put(b"data", b"stale"),))
        assert not (await etcd.txn(stale)).succeeded
        again.check()
        assert 1 == len(await places(etcd))


async def test_fenced_write_passes_only_while_held(etcd, infra, autojump_clock):
    """The proof of a hold is true while it lasts, and never again afterwards."""
    async with infra.lock("job") as hold:
        assert await write_fenced(etcd, hold.fence)
    assert not await write_fenced(etcd, hold.fence)
    async with infra.lock("job"):
        assert not await write_fenced(etcd, hold.fence)


@pytest.mark.parametrize("fence", [7, "7", None])
async def test_what_is_no_fence_is_refused(infra, autojump_clock, fence):
    """A token alone is no fence: it says nothing of whose it is, and proves nothing."""
    with pytest.raises(TypeError, match=repr(fence)):
        await infra.lock("job").validate(fence)
    with pytest.raises(TypeError, match=repr(fence)):
        async with infra.lock("job").fenced(fence):
            pass


async def test_fence_is_a_plain_value(infra, autojump_clock):
    """A fence survives pickling, and shows resource, token and epoch as JSON."""
    async with infra.lock("job") as hold:
        assert hold.fence == pickle.loads(pickle.dumps(hold.fence))
        assert f'{{"epoch":"{hold.fence.epoch}","resource":"job","token":{hold.token}}}' == hold.fence.to_json()
        assert 32 == len(hold.fence.epoch)


async def test_validate_and_current_token_ask_etcd(etcd, infra, autojump_clock):
    """`validate` is true for the owner's fence only; `current_token` names the owner's token or None."""
    lock = infra.lock("job")
    assert await lock.current_token() is None
    async with lock as hold:
        assert await lock.validate(hold.fence)
        assert hold.token == await lock.current_token()
    assert not await lock.validate(hold.fence)
    async with lock as again:
        assert not await lock.validate(hold.fence)
        assert again.token == await lock.current_token()


async def test_fenced_scope_ends_with_the_fence(infra, autojump_clock):
    """`fenced` runs its body while the fence is current, cancels it afterwards, and refuses a stale one."""
    lock = infra.lock("job")
    hold = await lock.acquire()
    async with lock.fenced(hold.fence):
        await trio.sleep(1)
    async with trio.open_nursery() as nursery:

        async def other_task() -> None:
            with pytest.raises(LockLostError):
                async with lock.fenced(hold.fence):
                    await trio.sleep_forever()

        nursery.start_soon(other_task)
        await trio.sleep(1)
        await hold.release()
    with pytest.raises(FencedError):
        async with lock.fenced(hold.fence):
            pytest.fail("entered with a stale fence")


async def test_inspect_names_holder_and_queue(etcd, infra, autojump_clock):
    """`inspect` tells who holds the lock with which token, who waits in order, and what is left."""
    async with open_infra(etcd.node("two"), seed=2) as two, open_infra(etcd.node("three"), seed=3) as three:
        assert LockInfo("job") == await infra.lock("job").inspect()
        async with infra.lock("job") as hold, trio.open_nursery() as nursery:
            for waiting in (two, three):
                nursery.start_soon(hold_for, waiting.lock("job"), 0)
                await trio.sleep(0.1)
            info = await two.lock("job").inspect()
            nursery.cancel_scope.cancel()
    assert ("job", "node-1", hold.token, ("node-2", "node-3")) == (
        info.name,
        info.holder,
        info.token,
        info.queue,
    )
    assert 28 <= info.ttl <= 30
    assert info.acquired_at is not None


# ── leases of their own ─────────────────────────────────────────────────────────────────────────


async def test_ttl_gives_the_lock_a_lease_of_its_own(etcd, infra, autojump_clock):
    """With `ttl=` the key hangs on a lease of that TTL, which is kept alive and revoked at release."""
    async with infra.lock("job", ttl=5) as hold:
        key = (await places(etcd))[0]
        assert key.lease != infra.session.lease.id
        assert hold.remaining() <= 4.5
        await trio.sleep(60)
        hold.check()
    assert [infra.session.lease.id] == list(await etcd.lease_list())


async def test_manual_renewal_expires_unless_extended(etcd, infra, autojump_clock):
    """A MANUAL hold ends with its TTL; `extend` gives it the full TTL again, and never revives it."""
    with pytest.raises(LockLostError):
        async with infra.lock("job", ttl=10, renewal=Renewal.MANUAL) as hold:
            await trio.sleep(8)
            assert await hold.extend() == pytest.approx(9, abs=0.1)
            began = trio.current_time()
            await trio.sleep_forever()
    assert trio.current_time() - began == pytest.approx(9, abs=0.1)
    assert hold.status is LockStatus.EXPIRED
    with pytest.raises(LockLostError):
        await hold.extend()


async def test_manual_lock_that_waited_has_its_full_time(etcd, infra, autojump_clock):
    """A MANUAL lock is kept in line while it waits, and starts with its full TTL."""
    first = await infra.lock("job").acquire()
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            async with infra.lock("job", ttl=5, renewal=Renewal.MANUAL) as hold:
                assert hold.remaining() == pytest.approx(4.5, abs=0.1)

        nursery.start_soon(wait)
        await trio.sleep(30)
        await first.release()


async def test_extend_notices_a_deleted_key(etcd, infra, autojump_clock):
    """Renewing the lease of a key that was deleted does not bring the lock back."""
    hold = await infra.lock("job").acquire()
    await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
    with pytest.raises(LockLostError):
        await hold.extend()


async def test_renewal_failure_is_reported_once_per_outage(etcd, autojump_clock):
    """`on_renewal_failure` hears of an overdue renewal once, and what it raises harms nobody."""
    node = etcd.node("one")
    told = []

    def report(hold, error) -> None:
        told.append((hold.token, error))
        msg = "the callback's own"
        raise RuntimeError(msg)

    async with open_infra(node, ttl=30) as infra, infra.lock("job", on_renewal_failure=report) as hold:
        for outage in (1, 2):
            node.partition()
            await trio.sleep(12)
            node.heal()
            await trio.sleep(12)
            assert outage == len(told)
        assert {hold.token} == {token for token, _ in told}
        hold.check()


async def test_coordinator_counts_what_its_locks_did(infra, autojump_clock):
    """Acquisitions, releases and conflicts are counted once each."""
    async with infra.lock("job"), infra.lock("other"):
        async with trio.open_nursery() as nursery:

            async def refused() -> None:
                async with infra.lock("job").attempt() as hold:
                    assert hold is None

            nursery.start_soon(refused)
    metrics = infra.metrics()
    assert (2, 2, 1) == tuple(metrics[f"lock_{what}"] for what in ("acquisitions", "releases", "conflicts"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": ""}, ValueError),
        ({"name": "x" * 513}, ValueError),
        ({"name": "\ud800"}, ValueError),
        ({"name": b"job"}, TypeError),
        ({"name": None}, TypeError),
        ({"name": "job", "ttl": 0}, ValueError),
        ({"name": "job", "ttl": -1}, ValueError),
        ({"name": "job", "ttl": 9_000_000_001}, ValueError),
        ({"name": "job", "ttl": True}, TypeError),
        ({"name": "job", "ttl": 30.0}, TypeError),
        ({"name": "job", "ttl": "30"}, TypeError),
        ({"name": "job", "renewal": "sometimes"}, ValueError),
    ],
)
async def test_bad_input_is_refused_before_anything_is_sent(etcd, infra, options, error, autojump_clock):
    """Each bad argument is refused at the call that made the mistake, and etcd sees nothing of it."""
    before = await etcd.get(b"\0")
    with pytest.raises(error):
        infra.lock(**options)
    assert before == await etcd.get(b"\0")


async def test_thousand_locks_share_one_lease_one_watch_one_renewal(etcd, autojump_clock):
    """1,000 held locks cost one lease, one watch, and one renewal per fifth of the TTL."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording, ttl=30) as infra:
        holds = []
        async with trio.open_nursery() as nursery:

            async def take(number: int) -> None:
                holds.append(await infra.lock(f"job-{number}").acquire())

            for number in range(1000):
                nursery.start_soon(take, number)
        await trio.sleep(5)
        recording.calls.clear()
        await trio.sleep(60)
        verbs = recording.verbs()
        assert 10 == verbs.count("lease_keep_alive")
        assert 0 == verbs.count("watch")
        assert 1 == len(await etcd.lease_list())
        for hold in holds:
            hold.check()


async def test_lost_hold_does_not_keep_its_task_from_acquiring(etcd, infra, autojump_clock):
    """After a loss the same task may acquire again, whether or not it released the lost hold."""
    hold = await infra.lock("job").acquire()
    await trio.sleep(1)
    await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
    await trio.sleep(1)
    with pytest.raises(LockLostError):
        hold.check()
    again = await infra.lock("job").acquire()
    with pytest.raises(LockLostError):
        await hold.release()
    again.check()
    with pytest.raises(RuntimeError):
        await infra.lock("job").acquire()
    await again.release()


async def test_own_lease_that_dies_is_expired_not_fenced(etcd, infra, autojump_clock):
    """A lock whose own lease is revoked is EXPIRED; the session and its other locks stay."""
    async with infra.lock("other") as other:
        with pytest.raises(LockLostError):
            async with infra.lock("job", ttl=30) as hold:
                await trio.sleep(1)
                await etcd.lease_revoke((await places(etcd))[0].lease)
                await trio.sleep_forever()
        assert LockStatus.EXPIRED is hold.status
        other.check()


async def test_blocked_loop_is_warned_of(etcd, caplog):
    """A loop that was blocked for more than a third of the TTL says so in the log."""
    clock = trio.testing.MockClock(rate=0.0)

    async def main() -> None:
        async with open_infra(etcd, ttl=30):
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(15)
            await trio.testing.wait_all_tasks_blocked()

    await trio.to_thread.run_sync(lambda: trio.run(main, clock=clock))
    assert "blocked" in caplog.text


async def test_next_in_line_of_the_same_process_needs_no_look(etcd, autojump_clock):
    """A release grants the next waiter of the same process by its own answer: no round trip in between."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        first = await infra.lock("job").acquire()
        log: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(hold_for, infra.lock("job"), 0.01, log, number)
                await trio.sleep(0.1)
            recording.calls.clear()
            await first.release()
        assert ["txn"] * 4 == recording.verbs()
    assert [0, 1, 2] == [number for number, _ in log]


async def test_next_in_line_whose_key_is_gone_inherits_nothing(etcd, infra, autojump_clock):
    """An operator deletes the next waiter's key: the release that comes first to tell grants it nothing."""
    first = await infra.lock("job").acquire()
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(LockLostError):
                await infra.lock("job").acquire()

        nursery.start_soon(wait)
        await trio.sleep(0.1)
        (_, waiting) = await places(etcd)
        # Applied at once, so that the waiter has not heard of it when the release is sent.
        etcd.store.txn(Txn(success=(DeleteRange(KeyRange.one(waiting.key)),)), trio.current_time())
        await first.release()
    assert [] == await places(etcd)


async def test_waiters_of_two_processes_take_turns(etcd, autojump_clock):
    """With the line mixed from two processes, the order of joining is kept and nobody is skipped."""
    log: list[tuple[int, int]] = []
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        async with trio.open_nursery() as nursery:
            for number in range(12):
                infra = (one, two)[number % 3 % 2]
                nursery.start_soon(hold_for, infra.lock("job"), 0.5, log, number)
                await trio.sleep(0.05)
    assert list(range(12)) == [number for number, _ in log]
    assert sorted(token for _, token in log) == [token for _, token in log]
