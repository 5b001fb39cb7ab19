"""`transact`: what a function sees, what is refused, and what becomes of it."""

from __future__ import annotations

import random
from functools import partial

import pytest
import trio

from etcd_infra import (
    CodecError,
    FencedError,
    Increment,
    InvalidRequestError,
    Isolation,
    NotHeldError,
    Set,
)
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import open_infra
from tests.helpers.cancelling import cancelled_at

FAULTS = ["lose_next_answer", "lose_next_request", "refuse_next", "late"]
READ_VALIDATED = [Isolation.SERIALIZABLE_SNAPSHOT, Isolation.SERIALIZABLE, Isolation.REPEATABLE_READS]
ONE_SNAPSHOT = READ_VALIDATED[:2]


def strike(faulty, fault):
    if fault == "late":
        faulty.apply_next_late(4)
    else:
        getattr(faulty, fault)()


def once(action):
    """Make something that happens on the first call only."""
    left = [action]

    async def do():
        while left:
            await left.pop()()

    return do


async def test_function_reads_and_writes_at_one_revision(infra, etcd):
    """What a function wrote is applied at one revision; its return value comes back."""
    await infra.execute([Set("a", 10), Set("b", 20)])

    async def transfer(tx):
        a, b = await tx.get("a"), await tx.get("b", type=int)
        tx.set("a", a - 3)
        tx.set("b", b + 3)
        tx.set("log", [a, b])
        return a + b

    before = etcd.store.revision
    assert 30 == await infra.transact(transfer)
    assert before + 1 == etcd.store.revision
    assert [7, 23, [10, 20]] == [(await infra.state.get(key)).value for key in ("a", "b", "log")]


async def test_own_writes_are_read_also_inside_ranges(infra):
    """A run sees its own sets and deletes at once, by key and by prefix; nobody else does before the commit."""
    await infra.execute([Set("p/a", 1), Set("p/b", 2), Set("q", 9)])

    async def function(tx):
        tx.set("p/c", 3)
        tx.delete("p/a")
        tx.set("p/b", 22)
        assert None is await tx.get("p/a")
        assert 22 == await tx.get("p/b")
        assert {"p/b": 22, "p/c": 3} == await tx.list("p/")
        assert 2 == (await infra.state.get("p/b")).value
        assert 9 == await tx.get("q")
        assert None is await tx.get("absent")
        return await tx.list("p/")

    assert {"p/b": 22, "p/c": 3} == await infra.transact(function)


@pytest.mark.parametrize("isolation", READ_VALIDATED)
async def test_write_skew_is_refused(infra, isolation):
    """Two doctors on call: each leaves because the other stays; one of them finds out, at every level but one."""
    await infra.execute([Set("alice", 1), Set("bob", 1)])

    async def leave(tx, who, meet):
        on_call = await tx.get("alice") + await tx.get("bob")
        await meet()
        if on_call == 2:
            tx.set(who, 0)

    async def bob():
        await infra.transact(partial(leave, who="bob", meet=trio.lowlevel.checkpoint), isolation)

    await infra.transact(partial(leave, who="alice", meet=once(bob)), isolation)
    assert 1 == (await infra.state.get("alice")).value + (await infra.state.get("bob")).value


async def test_write_skew_passes_at_read_committed(infra):
    """READ_COMMITTED compares nothing: both doctors leave."""
    await infra.execute([Set("alice", 1), Set("bob", 1)])

    async def leave(tx, who, meet):
        on_call = await tx.get("alice") + await tx.get("bob")
        await meet()
        if on_call == 2:
            tx.set(who, 0)

    level = Isolation.READ_COMMITTED

    async def bob():
        await infra.transact(partial(leave, who="bob", meet=trio.lowlevel.checkpoint), level)

    await infra.transact(partial(leave, who="alice", meet=once(bob)), level)
    assert 0 == (await infra.state.get("alice")).value + (await infra.state.get("bob")).value


@pytest.mark.parametrize(
    ("isolation", "runs"),
    [
        (Isolation.SERIALIZABLE_SNAPSHOT, 2),
        (Isolation.SERIALIZABLE, 1),
        (Isolation.REPEATABLE_READS, 1),
        (Isolation.READ_COMMITTED, 1),
    ],
)
async def test_blind_write_conflicts_are_told_apart_at_snapshot_level(infra, isolation, runs):
    """A key that is written without being read changes meanwhile: only SERIALIZABLE_SNAPSHOT runs again."""
    await infra.execute([Set("read", 1), Set("blind", 1)])
    disturb = once(lambda: infra.state.set("blind", 2))
    count = 0

    async def function(tx):
        nonlocal count
        count += 1
        await tx.get("read")
        await disturb()
        tx.set("blind", 3)

    await infra.transact(function, isolation)
    assert runs == count
    assert 3 == (await infra.state.get("blind")).value


@pytest.mark.parametrize("isolation", READ_VALIDATED)
@pytest.mark.parametrize("how", ["insert", "delete", "change"])
async def test_no_phantoms(infra, isolation, how):
    """A sum over a range is computed again when a key of it is inserted, deleted or changed meanwhile."""
    await infra.execute([Set("p/a", 1), Set("p/b", 2)])
    changes = {
        "insert": lambda: infra.state.set("p/c", 4),
        "delete": lambda: infra.state.delete("p/b"),
        "change": lambda: infra.state.set("p/b", 5),
    }
    disturb = once(changes[how])
    runs = 0

    async def total(tx):
        nonlocal runs
        runs += 1
        found = sum((await tx.list("p/")).values())
        await disturb()
        tx.set("sum", found)

    await infra.transact(total, isolation)
    assert 2 == runs
    assert {"insert": 7, "delete": 1, "change": 6}[how] == (await infra.state.get("sum")).value


@pytest.mark.parametrize("isolation", ONE_SNAPSHOT)
async def test_every_run_sees_one_snapshot(infra, isolation):
    """X + y is constant in every attempt, also in those that come to nothing."""
    await infra.execute([Set("x", 50), Set("y", 50)])
    disturb = once(lambda: infra.execute([Increment("x", 5), Increment("y", -5)]))
    sums = []

    async def function(tx):
        x = await tx.get("x")
        await disturb()
        sums.append(x + await tx.get("y"))
        sums.append(sum((await tx.list("")).values()))
        tx.set("z", 0)

    await infra.transact(function, isolation)
    assert [100] * 4 == sums


async def test_repeatable_reads_may_see_two_moments_but_never_commits_them(infra):
    """Below SERIALIZABLE a run may see x from before and y from after; it is refused and run again."""
    await infra.execute([Set("x", 50), Set("y", 50)])
    disturb = once(lambda: infra.execute([Increment("x", 5), Increment("y", -5)]))
    sums = []

    async def function(tx):
        x = await tx.get("x")
        await disturb()
        sums.append(x + await tx.get("y"))
        assert x == await tx.get("x")
        tx.set("z", 0)

    await infra.transact(function, Isolation.REPEATABLE_READS)
    assert [95, 100] == sums


@pytest.mark.parametrize("isolation", READ_VALIDATED)
async def test_read_only_runs_are_validated(infra, etcd, isolation):
    """A run that writes nothing is run again if what it read changes before its end; it leaves no trace."""
    await infra.execute([Set("a", 1)])
    disturb = once(lambda: infra.state.set("a", 2))

    async def function(tx):
        found = await tx.get("a")
        await disturb()
        return found

    assert 2 == await infra.transact(function, isolation)
    before = etcd.store.revision
    assert 2 == await infra.transact(function, isolation)
    assert before == etcd.store.revision


async def test_acknowledged_write_is_seen(infra, etcd, autojump_clock):
    """What another process was told to be written, a read-only transaction sees."""
    async with open_infra(etcd.node("two"), seed=2) as two:
        for number in range(20):
            await two.state.set("a", number)
            assert number == await infra.transact(lambda tx: tx.get("a"))


async def test_exceptions_of_the_function_pass_through(infra, etcd):
    """The function raises: one call, its exception unchanged, nothing written."""
    calls = 0

    async def function(tx):
        nonlocal calls
        calls += 1
        tx.set("a", await tx.get("a") or 1)
        raise error

    for error in (ValueError("mine"), KeyboardInterrupt("mine"), NotHeldError("mine")):
        before, calls = etcd.store.revision, 0
        with pytest.raises(type(error)) as caught:
            await infra.transact(function)
        assert error is caught.value
        assert 1 == calls
        assert before == etcd.store.revision


async def wait_for_ever(tx):
    await trio.sleep_forever()


async def test_cancellation_passes_through(infra, etcd, autojump_clock):
    """The caller's scope ends a function that waits, and a run that conflicts for ever."""
    with trio.move_on_after(1) as scope:
        await infra.transact(wait_for_ever)
    assert scope.cancelled_caught
    runs = 0

    async def disturbed(tx):
        nonlocal runs
        runs += 1
        await tx.get("a")
        await infra.state.set("a", runs)
        tx.set("a", "never")

    with trio.move_on_after(60) as scope:
        await infra.transact(disturbed)
    assert scope.cancelled_caught
    assert 60 < runs < 400
    assert "never" != (await infra.state.get("a")).value


async def test_repeated_run_reads_everything_at_once(etcd, autojump_clock):
    """The first run costs a round trip per key and one to commit; a repeated one fetches all keys together."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra, open_infra(etcd.node("two"), seed=2) as two:
        await infra.execute([Set("a", 1), Set("b", 1), Set("c", 1)])
        disturb = once(lambda: two.state.set("c", 2))

        async def function(tx):
            total = await tx.get("a") + await tx.get("b") + await tx.get("c")
            await disturb()
            tx.set("sum", total)

        recording.calls.clear()
        await infra.transact(function)
        assert ["range", "range", "range", "txn", "txn", "txn"] == recording.verbs()


async def test_parallel_reads_are_of_one_snapshot(infra):
    """Reads of several tasks of one run share the snapshot."""
    await infra.execute([Set(f"k{number}", 1) for number in range(10)])

    async def function(tx):
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(tx.get, f"k{number}")
        return sum([await tx.get(f"k{number}") for number in range(10)])

    assert 10 == await infra.transact(function)


@pytest.mark.parametrize("isolation", ONE_SNAPSHOT)
async def test_compacted_snapshot_begins_anew(infra, etcd, isolation):
    """The snapshot is compacted between two reads: the function runs again, and sees one newer snapshot."""
    await infra.execute([Set("x", 50), Set("y", 50)])

    async def compact():
        await infra.execute([Increment("x", 5), Increment("y", -5)])
        await etcd.compact(etcd.store.revision)

    disturb = once(compact)
    runs = 0

    async def function(tx):
        nonlocal runs
        runs += 1
        async with trio.open_nursery():
            x = await tx.get("x")
            await disturb()
            return x, await tx.get("y")

    assert (55, 45) == await infra.transact(function, isolation)
    assert 2 == runs


async def test_finished_run_can_not_be_used(infra):
    """After its end a run refuses everything."""
    runs = []

    async def function(tx):
        runs.append(tx)

    await infra.transact(function)
    (tx,) = runs
    for use in (lambda: tx.set("a", 1), lambda: tx.delete("a")):
        with pytest.raises(NotHeldError):
            use()
    for use in (partial(tx.get, "a"), partial(tx.list, "a"), tx.retry):
        with pytest.raises(NotHeldError):
            await use()


async def test_unreadable_value_names_key_and_version(infra):
    """A value of another type is a CodecError with key and version."""
    version = await infra.state.set("a", "text")
    with pytest.raises(CodecError) as caught:
        await infra.transact(lambda tx: tx.get("a", type=int))
    assert ("a", version) == (caught.value.key, caught.value.version)


async def test_bytes_are_raw(infra):
    """Bytes are stored and read as they are."""

    async def function(tx):
        tx.set("raw", b"\xff")
        return await tx.get("raw", type=bytes)

    assert b"\xff" == await infra.transact(function)
    assert b"\xff" == await infra.transact(lambda tx: tx.get("raw", type=bytes))


async def test_bad_input(infra, etcd):
    """Unknown levels, empty keys, NaN and what guards nothing are refused, and nothing runs."""

    async def never(tx):
        raise AssertionError

    with pytest.raises(ValueError, match="'strong'"):
        await infra.transact(never, "strong")
    with pytest.raises(TypeError, match="fence"):
        await infra.transact(never, fence="mine")

    async def function(tx, use):
        use(tx)

    for use, error in [
        (lambda tx: tx.set("", 1), ValueError),
        (lambda tx: tx.set("a", float("nan")), ValueError),
        (lambda tx: tx.set("a", object()), TypeError),
        (lambda tx: tx.delete(7), TypeError),
    ]:
        with pytest.raises(error):
            await infra.transact(partial(function, use=use))


@pytest.mark.parametrize("writes", [False, True])
async def test_dead_fence(infra, writes):
    """A fence that is dead at the commit is a FencedError, also for a run that wrote nothing."""
    async with infra.lock("job") as hold:
        fence = hold.fence
        assert None is await infra.transact(lambda tx: tx.get("a"), fence=fence)

    async def function(tx):
        if writes:
            tx.set("a", 1)

    with pytest.raises(FencedError):
        await infra.transact(function, fence=fence)
    assert None is await infra.state.get("a")


async def test_large_reads_are_refused_before_anything_is_sent(etcd, autojump_clock):
    """100 keys in a range can be read and written; 101 are refused, and so are too many keys."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        await infra.execute([Set(f"p/{number:03}", number) for number in range(101)])

        async def total(tx):
            tx.set("sum", sum((await tx.list("p/")).values()))

        with pytest.raises(InvalidRequestError, match="more than 100 keys"):
            await infra.transact(total)
        await infra.state.delete("p/100")
        await infra.transact(total)
        assert 4950 == (await infra.state.get("sum")).value

        async def many(tx, count):
            for number in range(count):
                await tx.get(f"absent-{number}")
            tx.set("sum", 0)

        await infra.transact(partial(many, count=109))
        recording.calls.clear()
        with pytest.raises(InvalidRequestError, match="over the budget"):
            await infra.transact(partial(many, count=110))
        assert {"range"} == set(recording.verbs())


async def test_retry_waits_for_a_change_of_what_was_read(etcd, autojump_clock):
    """A run that gives up waits without any call until a key or range that it has read changes."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording, ttl=3600) as infra:
        for change in ("flag", "p/x"):
            await infra.state.delete("flag")
            await infra.state.delete("p/x")
            runs = 0

            async def function(tx):
                nonlocal runs
                runs += 1
                if await tx.get("flag") is None and not await tx.list("p/"):
                    await tx.retry()
                return runs

            async def act(change=change) -> None:
                await trio.sleep(100)
                recording.calls.clear()
                await infra.state.set("unrelated", 1)
                await trio.sleep(100)
                assert 1 == len([verb for verb in recording.verbs() if verb in {"txn", "range"}])
                await infra.state.set(change, True)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(act)
                began = trio.current_time()
                assert 2 == await infra.transact(function)
                assert 200 <= trio.current_time() - began < 201


async def test_retry_sees_what_happened_before_the_watch(infra, etcd):
    """A change between the snapshot and the watch is not missed, nor one whose history is compacted."""
    for compacts in (False, True):
        await infra.state.delete("flag")

        async def change(compacts=compacts):
            await infra.state.set("flag", 1)
            await infra.state.set("other", 1)
            if compacts:
                await etcd.compact(etcd.store.revision)

        disturb = once(change)

        async def function(tx, disturb=disturb):
            if await tx.get("flag") is None:
                await disturb()
                await tx.retry()
            return "seen"

        with trio.fail_after(1):
            assert "seen" == await infra.transact(function)


async def test_retry_of_nothing_is_a_mistake(infra):
    """A run that has read nothing can not wait for a change; nor can one inside a shielded scope."""
    with pytest.raises(RuntimeError, match="nothing was"):
        await infra.transact(lambda tx: tx.retry())

    async def shielded(tx):
        await tx.get("a")
        with trio.CancelScope(shield=True):
            await tx.retry()

    with pytest.raises(RuntimeError, match="shielded"):
        await infra.transact(shielded)


async def increment(tx):
    tx.set("n", (await tx.get("n") or 0) + 1)


@pytest.mark.parametrize("strikes", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
async def test_lost_messages_apply_once(etcd, autojump_clock, fault, strikes):
    """Whatever is lost at the commit: it is applied exactly once, and the function is not run for it again."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        for number in range(1, 4):
            for _ in range(strikes):
                strike(faulty, fault)
            await infra.transact(increment)
            await trio.sleep(10)
            assert number == (await infra.state.get("n")).value


@pytest.mark.parametrize("fault", ["none", *FAULTS])
async def test_cancelled_at_every_step(autojump_clock, fault):
    """Cancelled at any step under any fault: applied at most once, and not after the next one is done."""
    step = 0
    while True:
        step += 1
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        async with open_infra(faulty) as infra:
            if fault != "none":
                strike(faulty, fault)
            reached = await cancelled_at(step, partial(infra.transact, increment))
            faulty.forget_faults()
            await infra.state.set("other", 1)
            await trio.sleep(1)
            settled = await infra.state.get("n")
            assert settled is None or 1 == settled.value
            await trio.sleep(10)
            assert settled == await infra.state.get("n")
        if not reached:
            break
    assert step > 4


async def test_contended_increments_are_exact(autojump_clock):
    """4 processes with random faults, 15 increments each: the sum is exact."""
    etcd = MemoryEtcd()

    async def work(number: int) -> None:
        faulty = FaultyBackend(etcd.node(f"n{number}"), random.Random(number))
        async with open_infra(faulty, seed=number, ttl=120) as infra:
            for _ in range(15):
                await infra.transact(increment)
            faulty.stop()

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(work, number)
    assert b"60" == (await etcd.get(b"test/state/n")).value
