"""What holds for everything that is taken, held, lost and given back: locks, multi-locks, RWLocks, semaphores."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra import ConflictError, LockLostError, LockStatus, NotHeldError
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange, Put, Txn
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra
from tests.helpers.cancelling import cancelled_at

KEYS = Keys(NAMESPACE)
LATE_SECONDS = 3.0

KINDS = {
    "lock": lambda infra: infra.lock("job"),
    "reading": lambda infra: infra.rwlock("job").read,
    "writing": lambda infra: infra.rwlock("job").write,
    "multi-lock of one": lambda infra: infra.multi_lock("job"),
    "multi-lock": lambda infra: infra.multi_lock("job", "other", "third"),
    "semaphore of one": lambda infra: infra.semaphore("job", 1),
    "semaphore of two": lambda infra: infra.semaphore("job", 2),
}
# What a second one of the kind may hold beside the first.
TOGETHER = {"reading", "semaphore of two"}
FAULTS = {
    "answered": lambda _: None,
    "refused": lambda backend: backend.refuse_next(),
    "request lost": lambda backend: backend.lose_next_request(),
    "answer lost": lambda backend: backend.lose_next_answer(),
    "applied late": lambda backend: backend.apply_next_late(LATE_SECONDS),
    "slow": lambda backend: backend.delay_next(1.0),
}
# How many places one of the kind has in all.
PLACES = {"multi-lock": 3}
every_kind = pytest.mark.parametrize("kind", KINDS)


def places(etcd):
    """List all places in all lines at this very moment."""
    prefixes = (KEYS.locks, KEYS.rwlocks, KEYS.semaphore_queue("job"), KEYS.semaphore_holders("job"))
    return [kv for kv in etcd.store.snapshot().kvs if kv.key.startswith(prefixes)]


@every_kind
async def test_held_for_the_length_of_the_body(kind, etcd, infra, autojump_clock):
    """One place on the session's lease inside the body, none after it; the status follows."""
    async with KINDS[kind](infra) as hold:
        mine = places(etcd)
        assert PLACES.get(kind, 1) == len(mine)
        assert {(infra.session.lease.id, hold.token)} == {(kv.lease, kv.create_revision) for kv in mine}
        assert LockStatus.ACQUIRED is hold.status
        assert 0 < hold.remaining() <= 30
        await hold.extend()
    assert [] == places(etcd)
    assert LockStatus.RELEASED is hold.status
    with pytest.raises(NotHeldError):
        hold.check()


@every_kind
async def test_tokens_grow_and_fences_end(kind, etcd, infra, autojump_clock):
    """A later hold has a larger token; the fence of an earlier one is refused by etcd."""
    async with KINDS[kind](infra) as first:
        assert (await etcd.txn(Txn(first.fence.proof, (Put(b"data"),)))).succeeded
    async with KINDS[kind](infra) as second:
        assert second.token > first.token
        assert not (await etcd.txn(Txn(first.fence.proof, (Put(b"data"),)))).succeeded
        assert (await etcd.txn(Txn(second.fence.proof, (Put(b"data"),)))).succeeded


@every_kind
async def test_same_task_twice_is_an_error(kind, infra, autojump_clock):
    """It would wait for itself, or might."""
    async with KINDS[kind](infra):
        with pytest.raises(RuntimeError, match="already"):
            await KINDS[kind](infra).acquire()


@every_kind
async def test_excludes_whom_it_must(kind, etcd, infra, autojump_clock):
    """A second one waits until the first is gone, or holds it together with the first."""
    async with open_infra(etcd.node("two"), seed=2) as two:
        async with KINDS[kind](infra):
            async with KINDS[kind](two).attempt() as refused:
                assert (refused is not None) is (kind in TOGETHER)
            with trio.move_on_after(5) as patience:
                async with KINDS[kind](two):
                    pass
            assert patience.cancelled_caught is (kind not in TOGETHER)
            assert PLACES.get(kind, 1) == len(places(etcd))
        with trio.fail_after(1):
            async with KINDS[kind](two):
                pass


@every_kind
@pytest.mark.parametrize("how", ["key deleted", "lease revoked", "partition"])
async def test_loss_cancels_the_body(kind, how, etcd, autojump_clock):
    """Whatever takes it away cancels the body within the time that the lease allows, and leaving says so."""
    node = etcd.node("one")
    async with open_infra(node, ttl=10) as infra:
        with pytest.raises(LockLostError), trio.fail_after(12):
            async with KINDS[kind](infra) as hold:
                await trio.sleep(1)
                if how == "key deleted":
                    await etcd.delete(KeyRange.one(hold.fence.proof[0].range.key))
                elif how == "lease revoked":
                    await etcd.lease_revoke(infra.session.lease.id)
                else:
                    node.partition()
                await trio.sleep_forever()
        assert (LockStatus.FENCED if how == "key deleted" else LockStatus.EXPIRED) is hold.status
        node.heal()


@every_kind
async def test_waiter_whose_lease_dies_is_never_granted(kind, etcd, infra, autojump_clock):
    """Its place went with its lease; whoever waited behind it gets through."""
    if kind in TOGETHER:
        holders = (
            [infra.semaphore("job", 2), infra.semaphore("job", 2)]
            if "two" in kind
            else [infra.rwlock("job").write]
        )
    else:
        holders = [KINDS[kind](infra)]
    granted = []

    async def wait(other, name) -> None:
        try:
            async with KINDS[kind](other):
                granted.append(name)
        except Exception as error:  # noqa: BLE001
            granted.append(type(error).__name__)

    async def hold_one(lock, task_status) -> None:
        async with lock:
            task_status.started()
            await trio.sleep(20)

    async with (
        open_infra(etcd.node("two"), seed=2) as two,
        open_infra(etcd.node("three"), seed=3) as three,
        trio.open_nursery() as nursery,
    ):
        for lock in holders:
            await nursery.start(hold_one, lock)
        nursery.start_soon(wait, two, "dead")
        await trio.sleep(1)
        nursery.start_soon(wait, three, "alive")
        await trio.sleep(1)
        assert [] == granted
        await etcd.lease_revoke(two.session.lease.id)
        await trio.sleep(40)
    assert ["SessionLostError", "alive"] == granted
    assert [] == places(etcd)


@every_kind
@pytest.mark.parametrize("contended", [False, True], ids=["free", "contended"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["block", "attempt"])
async def test_nothing_is_left(kind, way, fault, contended, etcd, autojump_clock):
    """Cancelled at any step, under any fault: no place is left, none comes back, and it can be taken."""
    faulty = FaultyBackend(etcd.node("one"))
    steps = 0

    async def operate(infra) -> None:
        if way == "block":
            async with KINDS[kind](infra):
                await trio.sleep(0.5)
        else:
            async with KINDS[kind](infra).attempt():
                await trio.sleep(0.5)

    async with (
        open_infra(faulty, ttl=60) as one,
        open_infra(etcd.node("two"), seed=2, ttl=60) as two,
    ):
        # Three holders: more than any of the kinds lets in.
        in_the_way = (
            [two.rwlock("job").write] if kind == "reading" else [KINDS[kind](two)] * (2 if "two" in kind else 1)
        )
        while True:
            steps += 1
            async with trio.open_nursery() as nursery:
                for lock in in_the_way if contended else ():
                    await nursery.start(hold_for_two_seconds, lock)
                FAULTS[fault](faulty)
                reached = await cancelled_at(steps, lambda: operate(one))
                faulty.forget_faults()
            await check_nothing_is_left(etcd, one, KINDS[kind](two))
            if not reached:
                break
    assert steps > 3


async def hold_for_two_seconds(lock, task_status):
    async with lock:
        task_status.started()
        await trio.sleep(2)


async def check_nothing_is_left(etcd, infra, other):
    session = infra.session
    await trio.sleep(2.1)
    assert [] == places(etcd)
    with trio.fail_after(0.1):
        async with other.attempt() as hold:
            assert hold is not None
    quiet_since = etcd.store.revision
    await trio.sleep(LATE_SECONDS + 1)
    later = etcd.store.history.between(quiet_since + 1, etcd.store.revision)
    assert [] == [event.key for commit in later for event in commit.events if b"session" not in event.key]
    assert session is infra.session
    assert not session.owners
    assert {session.own_key.key, session.own_key.key + b"/op/0"} == session.janitor.known_keys


@every_kind
async def test_no_two_have_one_token(kind, etcd, autojump_clock):
    """Fifteen tasks of one process ask at once: each hold has a token of its own, also where all hold it together."""
    async with open_infra(etcd.node("one")) as infra, trio.open_nursery() as nursery:
        tokens = []

        async def take() -> None:
            async with KINDS[kind](infra) as hold:
                tokens.append(hold.token)
                await trio.sleep(1)

        for _ in range(15):
            nursery.start_soon(take)
        with trio.fail_after(30):
            while len(tokens) < 15:
                await trio.sleep(1)
    assert 15 == len(set(tokens))


# ── multi-locks ─────────────────────────────────────────────────────────────────────────────────


async def test_multi_lock_is_in_the_lines_of_its_locks(etcd, infra, autojump_clock):
    """It waits for each lock's owner, and keeps each lock's waiters away; one deleted key loses it all."""
    async with open_infra(etcd.node("two"), seed=2) as two:
        with trio.move_on_after(5) as patience:
            async with infra.lock("b"), two.multi_lock("a", "b", "c"):
                pytest.fail("it has what another one holds")
        assert patience.cancelled_caught
        with pytest.raises(LockLostError):
            async with two.multi_lock("a", "b", "c") as hold:
                for name in "abc":
                    async with infra.lock(name).attempt() as refused:
                        assert refused is None
                await etcd.delete(KeyRange.prefix(KEYS.lock_line("b")))
                await trio.sleep_forever()
        assert LockStatus.FENCED is hold.status
        assert [] == places(etcd)
        assert not (await etcd.txn(Txn(hold.fence.proof))).succeeded


@pytest.mark.parametrize("name", ["a", "b", "c"])
async def test_multi_lock_that_waits_and_loses_a_key_is_told(name, etcd, infra, autojump_clock):
    """Whichever of its keys goes while another lock is waited for: told within a second, and nothing is left."""
    async with infra.lock("b"), open_infra(etcd.node("two"), seed=2) as two, trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(LockLostError, match="was deleted"):
                await two.multi_lock("a", "b", "c").acquire()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait)
        await trio.sleep(5)
        (key,) = [
            kv.key for kv in places(etcd) if kv.lease == two.session.lease.id and f"/{name}/" in kv.key.decode()
        ]
        await etcd.delete(KeyRange.one(key))
        await trio.sleep(1)
        pytest.fail("it waits on")
    assert [] == places(etcd)


async def test_multi_lock_is_granted_only_if_all_keys_are_seen(etcd, infra, autojump_clock):
    """A key of a lock that it had come to already goes right before the last turn comes: lost, not granted."""
    holder = await infra.lock("b").acquire()
    async with open_infra(etcd.node("two"), seed=2) as two, trio.open_nursery() as nursery:

        async def release() -> None:
            await trio.sleep(0.1)
            await etcd.delete(KeyRange.prefix(KEYS.lock_line("a")))
            await holder.release()

        nursery.start_soon(release)
        with pytest.raises(LockLostError):
            await two.multi_lock("a", "b").acquire()
    assert [] == places(etcd)


async def test_multi_lock_whose_first_key_goes_before_the_answer_is_lost(etcd, autojump_clock):
    """The join's answer is lost, and one of its keys is deleted before it is repeated: told, and nothing is left."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra, trio.open_nursery() as nursery:

        async def delete_first() -> None:
            while not places(etcd):
                await trio.sleep(0.001)
            await etcd.delete(KeyRange.prefix(KEYS.lock_line("a")))

        nursery.start_soon(delete_first)
        faulty.lose_next_answer()
        with pytest.raises(LockLostError), trio.fail_after(5):
            await infra.multi_lock("a", "b").acquire()
        assert [] == places(etcd)


async def test_multi_locks_never_wait_in_a_ring(etcd, autojump_clock):
    """Thirty tasks of two processes take random sets of five locks, in any order: all get through."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        draws = random.Random(1)
        done = []

        async def work(infra, names) -> None:
            async with infra.multi_lock(*names) as hold:
                await trio.sleep(0.1)
                assert (await etcd.txn(Txn(hold.fence.proof))).succeeded
            done.append(hold.token)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(30):
                    names = draws.sample("abcde", draws.randint(1, 4))
                    nursery.start_soon(work, (one, two)[number % 2], names)
        assert 30 == len(done)
        # Nobody stands beside another one in line, also when transactions travel together.
        created = [
            (event.key.rpartition(b"/")[0], event.kv.create_revision)
            for commit in etcd.store.history.between(1, etcd.store.revision)
            for event in commit.events
            if event.key.startswith(KEYS.locks) and not event.is_delete
        ]
        assert len(created) == len(set(created))


async def test_multi_lock_round_trips(etcd, autojump_clock):
    """Two to take what is free, however many; one for each to give back."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        async with infra.multi_lock(*[f"lock-{number}" for number in range(63)]):
            assert ["txn", "txn"] == recording.verbs()
        assert len(recording.calls) <= 2 + 63
        assert [] == places(etcd)


@pytest.mark.parametrize("names", [(), ("a", "a"), tuple(f"lock-{number}" for number in range(64))])
async def test_bad_names_are_refused(infra, names, autojump_clock):
    """A multi-lock takes one to 63 distinct names."""
    with pytest.raises(ValueError, match="distinct names"):
        infra.multi_lock(*names)


# ── read-write locks ────────────────────────────────────────────────────────────────────────────


async def test_writer_is_not_starved(etcd, infra, autojump_clock):
    """Readers come and go without a gap; a writer that has joined is passed by none that joins later."""
    order = []

    async def read(number) -> None:
        async with infra.rwlock("job").read:
            order.append(f"read {number}")
            await trio.sleep(1)

    async def write() -> None:
        async with infra.rwlock("job").write:
            order.append("write")

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(read, number)
            await trio.sleep(0.3)
            if number == 4:
                nursery.start_soon(write)
                await trio.sleep(0.1)
                async with infra.rwlock("job").read.attempt() as refused:
                    assert refused is None
    assert [*[f"read {number}" for number in range(5)], "write"] == order[:6]
    assert 11 == len(order)


async def test_readers_behind_a_writer_are_let_in_together(etcd, infra, autojump_clock):
    """One writer goes, and all readers behind it hold the lock at the same moment; the next writer waits for all."""
    reading = [0, 0]
    log = []

    async def read() -> None:
        async with infra.rwlock("job").read:
            reading[0] += 1
            reading[1] = max(reading)
            await trio.sleep(1)
            reading[0] -= 1

    async def write(name) -> None:
        async with infra.rwlock("job").write:
            log.append((name, reading[0]))
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, "first")
        await trio.sleep(0.1)
        for _ in range(5):
            nursery.start_soon(read)
        await trio.sleep(0.1)
        nursery.start_soon(write, "second")
    assert 5 == reading[1]
    assert [("first", 0), ("second", 0)] == log


async def test_writer_waits_for_every_reader(etcd, infra, autojump_clock):
    """The reader directly ahead goes first: the writer, of the same process, still waits for the other one."""
    wrote = []

    async def write() -> None:
        async with infra.rwlock("job").write:
            wrote.append(trio.current_time())

    async def read(seconds, task_status) -> None:
        async with infra.rwlock("job").read:
            task_status.started()
            await trio.sleep(seconds)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(read, 5)
        await nursery.start(read, 1)
        nursery.start_soon(write)
    assert 5 <= wrote[0] - began < 5.1


# ── semaphores ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("permits", [1, 2, 5])
async def test_never_more_holders_than_permits(permits, etcd, autojump_clock):
    """Twenty tasks of two processes: at every revision at most so many hold a permit, and all get through."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        done = []

        async def work(infra, number) -> None:
            async with infra.semaphore("job", permits):
                await trio.sleep(1)
            done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(work, (one, two)[number % 2], number)
        assert 20 == len(done)
        holders = KeyRange.prefix(KEYS.semaphore_holders("job"))
        held, most = set(), 0
        for commit in etcd.store.history.between(1, etcd.store.revision):
            for event in commit.events:
                if event.key in holders:
                    (held.discard if event.is_delete else held.add)(event.key)
            most = max(most, len(held))
        assert permits == most


async def test_other_number_of_permits_is_a_conflict(etcd, infra, autojump_clock):
    """While it is in use the number is compared; when it is idle it may change."""
    async with infra.semaphore("job", 2):
        async with open_infra(etcd.node("two"), seed=2) as two:
            with pytest.raises(ConflictError, match="2 permits"):
                async with two.semaphore("job", 3).attempt():
                    pytest.fail("it was taken")
            with pytest.raises(ConflictError, match="2 permits"):
                await two.semaphore("job", 3).acquire()
    async with infra.semaphore("job", 3):
        assert b"3" == (await etcd.get(KEYS.semaphore_permits("job"))).value


async def attempt_interrupted(etcd, meanwhile):
    """Attempt to take one of two permits, with something happening between the look and the join."""
    faulty = FaultyBackend(etcd.node("slow"))
    async with open_infra(faulty, seed=3) as infra, trio.open_nursery() as nursery:
        faulty.only = lambda _, request: isinstance(request, Txn) and not request.is_read_only
        faulty.delay_next(1.0)

        async def happen() -> None:
            await trio.sleep(0.5)
            await meanwhile()

        nursery.start_soon(happen)
        async with infra.semaphore("job", 2).attempt() as hold:
            stored = await etcd.get(KEYS.semaphore_permits("job"))
            return hold is not None, stored.value


async def test_holder_that_comes_after_the_count_is_counted(etcd, infra, autojump_clock):
    """One permit is left at the look and none at the join: the attempt is refused."""
    async with infra.semaphore("job", 2), open_infra(etcd.node("two"), seed=2) as two:
        taken, _ = await attempt_interrupted(etcd, two.semaphore("job", 2).acquire)
        assert not taken


async def test_number_that_changes_after_the_look_is_written_anew(etcd, infra, autojump_clock):
    """Somebody uses the idle semaphore with another number, and goes: what is stored is the number in use."""

    async def use_with_three() -> None:
        async with infra.semaphore("job", 3):
            pass

    async with infra.semaphore("job", 2):
        pass
    assert (True, b"2") == await attempt_interrupted(etcd, use_with_three)


async def test_attempt_does_not_pass_who_comes_to_the_queue(etcd, infra, autojump_clock):
    """Somebody comes to the queue between the look and the join: the attempt is refused."""

    async def stand() -> None:
        await etcd.put(KEYS.semaphore_queue("job") + b"stranger", b"")

    async with infra.semaphore("job", 2):
        taken, _ = await attempt_interrupted(etcd, stand)
        assert not taken


async def test_one_release_wakes_one_of_a_thousand(etcd, autojump_clock):
    """A thousand wait for two permits: a release costs the head of the queue two requests, and the others one look."""
    recording = RecordingBackend(etcd.node("many"))
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(recording, seed=2, ttl=60) as many:
        granted = []

        async def wait() -> None:
            async with many.semaphore("job", 2):
                granted.append(1)
                await trio.sleep(100)

        async with trio.open_nursery() as nursery:
            first = await one.semaphore("job", 2).acquire()
            nursery.start_soon(wait)
            await trio.sleep(1)
            for _ in range(1000):
                nursery.start_soon(wait)
            await trio.sleep(5)
            assert 1 == len(granted)
            recording.calls.clear()
            await first.release()
            await trio.sleep(0.2)
            assert 2 == len(granted)
            assert len(recording.calls) <= 4
            nursery.cancel_scope.cancel()
        assert [] == places(etcd)


async def test_inspect_of_a_read_write_lock(etcd, infra, autojump_clock):
    """Who reads, who writes, and who waits for what, by node."""
    async with open_infra(etcd.node("two"), seed=2) as two, trio.open_nursery() as nursery:
        async with infra.rwlock("job").read:
            nursery.start_soon(two.rwlock("job").write.acquire)
            await trio.sleep(1)
            nursery.start_soon(infra.rwlock("job").read.acquire)
            await trio.sleep(1)
            info = await infra.rwlock("job").inspect()
            assert (None, ("node-1",)) == (info.writer, info.readers)
            assert ("node-2 to write", "node-1 to read") == info.queue
        await trio.sleep(1)
        info = await infra.rwlock("job").inspect()
        assert ("node-2", (), ("node-1 to read",)) == (info.writer, info.readers, info.queue)
        nursery.cancel_scope.cancel()


async def test_inspect_of_a_semaphore(etcd, infra, autojump_clock):
    """Permits, holders and the queue, by node."""
    async with infra.semaphore("job", 1), trio.open_nursery() as nursery:
        async with open_infra(etcd.node("two"), seed=2) as two:
            nursery.start_soon(two.semaphore("job", 1).acquire)
            await trio.sleep(1)
            info = await infra.semaphore("job", 1).inspect()
            assert (1, ("node-1",), ("node-2",)) == (info.permits, info.holders, info.queue)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("permits", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), ("2", TypeError)]
)
async def test_bad_permits_are_refused(infra, permits, error, autojump_clock):
    """A number of permits is a positive int."""
    with pytest.raises(error, match=str(permits)):
        infra.semaphore("job", permits)
