"""Counters: every add exactly once, combined within a process, exact between processes."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra import CodecError, OutcomeUnknownError, SessionLostError, StorageFullError
from etcd_infra._etcd.model import KeyRange
from etcd_infra._policy.pace import REST_SECONDS, TURN
from etcd_infra.testing import FaultRates, FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import open_infra
from tests.helpers.cancelling import CancelAtStep

KEY = b"test/state/n"
FAULTS = ["lose_next_answer", "lose_next_request", "refuse_next", "late"]


def values(etcd, key=KEY):
    """List the numbers that the counter ever was."""
    commits = etcd.store.history.between(2, etcd.store.revision)
    return [int(e.kv.value) for commit in commits for e in commit.events if e.key == key and not e.is_delete]


def strike(faulty, fault):
    if fault == "late":
        faulty.apply_next_late(3)
    else:
        getattr(faulty, fault)()


async def test_counter_is_the_state_key_of_its_name(infra, etcd, autojump_clock):
    """Counter and state see one number, stored as decimal text; absent is 0."""
    counter = infra.counter("n")
    assert 0 == await counter.get()
    assert 1 == await counter.add()
    assert 6 == await counter.add(5)
    assert -4 == await counter.subtract(10)
    assert -5 == await counter.subtract()
    assert b"-5" == (await etcd.get(KEY)).value
    assert -5 == (await infra.state.get("n", type=int)).value
    await infra.state.set("n", 40)
    assert 42 == await counter.add(2)
    await infra.state.delete("n")
    assert 1 == await counter.add()
    await counter.reset()
    assert 0 == await counter.get()
    await counter.reset(9)
    assert 9 == await infra.counter("n").get()


async def test_counter_has_no_bounds(infra, autojump_clock):
    """Numbers beyond 64 bits are exact."""
    counter = infra.counter("n")
    assert 2**63 == await counter.add(2**63)
    assert 2**63 + 2**64 == await counter.add(2**64)
    assert 2**63 == await counter.subtract(2**64)


@pytest.mark.parametrize("number", [True, 1.0, "1", None])
async def test_bad_numbers(infra, etcd, autojump_clock, number):
    """What is no int is refused before anything is sent."""
    before = etcd.store.revision
    counter = infra.counter("n")
    for attempt in (counter.add, counter.subtract, counter.reset):
        with pytest.raises(TypeError, match="must be an int"):
            await attempt(number)
    with pytest.raises(ValueError, match="4300"):
        await counter.add(10**5000)
    assert before == etcd.store.revision


@pytest.mark.parametrize("stored", [b"1.5", b'"1"', b"true", b"", b"{}"])
async def test_what_is_no_integer_is_not_counted(infra, etcd, autojump_clock, stored):
    """A value that is no integer is a CodecError and stays as it is; `reset` replaces it."""
    await infra.state.set("n", stored)
    counter = infra.counter("n")
    with pytest.raises(CodecError):
        await counter.get()
    for _ in range(2):
        with pytest.raises(CodecError, match="'n'"):
            await counter.add()
    assert stored == (await etcd.get(KEY)).value
    await counter.reset(1)
    assert 2 == await counter.add()


# ── combining ───────────────────────────────────────────────────────────────────────────────────


async def test_adds_are_combined(etcd, autojump_clock):
    """100 adds at once are a handful of writes; each caller gets its own result, in the order of asking."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        results = []

        async def add(number):
            results.append((number, await infra.counter("n").add()))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(add, number)
        assert list(range(1, 101)) == sorted(result for _, result in results)
        assert len(recording.calls) <= 3


async def test_results_are_those_of_one_by_one(etcd, autojump_clock):
    """Adds of different sizes in one batch: results are the running sums in the order of asking."""
    deltas = [1, 5, -3, 0, 10]
    results = {}
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:

        async def add(index):
            results[index] = await infra.counter("n").add(deltas[index])

        faulty.delay_next(5)
        async with trio.open_nursery() as nursery:
            for index in range(5):
                nursery.start_soon(add, index)
                await trio.sleep(0.1)
        assert {0: 1, 1: 6, 2: 3, 3: 3, 4: 13} == results
        assert [1, 13] == values(etcd)


async def test_one_batch_is_in_flight(etcd, autojump_clock):
    """While a batch is under way nothing else is sent for that counter; another counter does not wait."""
    faulty = FaultyBackend(etcd.node("one"))
    recording = RecordingBackend(faulty)
    async with open_infra(recording) as infra:
        recording.calls.clear()
        faulty.delay_next(5)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(infra.counter("n").add)
                await trio.sleep(0.1)
            assert ["txn"] == recording.verbs()
            assert 1 == await infra.counter("other").add()
        assert 10 == await infra.counter("n").get()
        assert 2 == len(set(values(etcd)))


async def test_reset_closes_a_batch(etcd, autojump_clock):
    """Adds before a reset, the reset, and adds after it are separate writes, in that order."""
    results = {}
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        counter = infra.counter("n")

        async def run(operation, number):
            results[number] = await operation(number)

        wishes = [(counter.add, 1), (counter.add, 2), (counter.reset, 100), (counter.add, 3), (counter.add, 4)]
        faulty.delay_next(5)
        async with trio.open_nursery() as nursery:
            for wish in wishes:
                nursery.start_soon(run, *wish)
                await trio.sleep(0.1)
        assert [1, 3, 100, 107] == values(etcd)
        assert {1: 1, 2: 3, 100: None, 3: 103, 4: 107} == results


async def test_cancelled_add_does_not_disturb_its_batch(etcd, autojump_clock):
    """One caller of a batch in flight is cancelled: the others get their results, and its add counts."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        counter = infra.counter("n")
        await counter.add()
        results = []

        async def add():
            results.append(await counter.add())

        async with trio.open_nursery() as nursery:
            faulty.delay_next(3)
            nursery.start_soon(counter.add)  # alone in flight
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(add)
            with trio.move_on_after(1):
                await counter.add(1000)  # waits, unsent: withdrawn
            await trio.sleep(2.5)
            faulty.delay_next(3)
            nursery.start_soon(add)
            await trio.sleep(0.1)
            with trio.move_on_after(1):
                await counter.add(1000)
        assert 4 == await counter.get()
        assert [3, 4] == sorted(results)


async def test_cancelled_add_in_flight_counts(etcd, autojump_clock):
    """An add that was sent and is then cancelled counts, once."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        counter = infra.counter("n")
        await counter.add()
        faulty.delay_next(2)
        with trio.move_on_after(1):
            await counter.add(10)
        assert 12 == await counter.add()


async def test_add_is_withdrawn_after_a_definite_refusal(etcd, autojump_clock):
    """A cancelled add whose batch was refused, as somebody else wrote, does not count."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        counter = infra.counter("n")
        await counter.add()
        await etcd.put(KEY, b"100")
        faulty.delay_next(2)
        with trio.move_on_after(1):
            await counter.add(10)
        await trio.sleep(5)
        assert 100 == await counter.get()
        assert 101 == await counter.add()


async def test_add_that_is_cancelled_while_its_process_rests_is_withdrawn(infra, etcd, autojump_clock):
    """Others write, too, and the turn is over: an add that is cancelled before it was sent does not count."""
    counter = infra.counter("n")
    await counter.add()
    await etcd.put(KEY, b"100")
    for _ in range(TURN):
        await counter.add()
    with trio.move_on_after(REST_SECONDS / 10) as impatient:
        await counter.add()
    assert impatient.cancelled_caught
    await trio.sleep(1)
    assert 100 + TURN == await counter.get()
    assert 101 + TURN == await counter.add()


async def test_error_reaches_every_caller_of_the_batch(etcd, autojump_clock):
    """A refusal by etcd is raised by each caller of the batch, as an exception of its own."""
    async with open_infra(etcd.node("one")) as infra:
        await infra.counter("n").add()
        etcd.store.full = True
        errors = []

        async def add():
            with pytest.raises(StorageFullError) as caught:
                await infra.counter("n").add()
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(add)
        assert 5 == len(set(map(id, errors)))
        etcd.store.full = False
        assert 2 == await infra.counter("n").add()


async def test_closing_leaves_nobody_waiting(etcd, autojump_clock):
    """The coordinator is closed while adds wait: in flight is unknown, waiting is SessionLostError."""
    faulty = FaultyBackend(etcd.node("one"))
    errors = []
    async with trio.open_nursery() as nursery:
        async with open_infra(faulty) as infra:
            counter = infra.counter("n")
            await counter.add()

            async def add():
                with pytest.raises((OutcomeUnknownError, SessionLostError)) as caught:
                    await counter.add()
                errors.append(type(caught.value))

            faulty.delay_next(100)
            nursery.start_soon(add)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(add)
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(SessionLostError):
            await counter.add()
    assert {OutcomeUnknownError, SessionLostError} == set(errors)


async def test_add_survives_the_loss_of_the_session(etcd, autojump_clock):
    """An add during an outage that costs the session is applied once under the next, or is unknown."""
    node = etcd.node("one")
    async with open_infra(node, ttl=10) as infra:
        counter = infra.counter("n")
        await counter.add()
        node.partition()

        async def heal():
            await trio.sleep(30)
            node.heal()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(heal)
            try:
                result = await counter.add()
            except OutcomeUnknownError:
                result = None
        assert await counter.get() in ({2} if result else {1, 2})


async def test_deleted_counter_starts_anew(infra, etcd, autojump_clock):
    """A counter that somebody deleted counts from 0; its known value is not trusted."""
    counter = infra.counter("n")
    await counter.add(7)
    await etcd.delete(KeyRange.one(KEY))
    assert 1 == await counter.add()


# ── faults ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strikes", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
async def test_unavailable_does_not_mean_again(etcd, autojump_clock, fault, strikes):
    """Whatever is lost, and whatever comes late, one add grows the value by exactly one."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        counter = infra.counter("n")
        await counter.add(10)
        for _ in range(strikes):
            strike(faulty, fault)
        assert 11 == await counter.add()
        await etcd.put(KEY, b"50")
        await trio.sleep(5)
        assert 51 == await counter.add()
        assert [10, 11, 50, 51] == values(etcd)


class CancelAtAnyStep(CancelAtStep):
    """Counts the steps of all tasks: the batch runs in the background."""

    def before_task_step(self, task):
        super().before_task_step(self._task)


async def cancelled_at_any(step, operation):
    instrument = CancelAtAnyStep(step)
    trio.lowlevel.add_instrument(instrument)
    try:
        with instrument.scope:
            await operation()
    finally:
        trio.lowlevel.remove_instrument(instrument)
    return instrument.reached


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("fault", ["none", *FAULTS])
async def test_cancelled_at_every_step(autojump_clock, fault, others):
    """An add cancelled at any step of any task, under any fault, counts once or not at all; others do."""
    step = 0
    while True:
        step += 1
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        async with open_infra(faulty) as infra, trio.open_nursery() as nursery:
            counter = infra.counter("n")
            await counter.add()
            if fault != "none":
                strike(faulty, fault)
            for _ in range(others):
                nursery.start_soon(counter.add, 1)
            reached = await cancelled_at_any(step, lambda counter=counter: counter.add(10))
            result = await counter.add(100)
            assert result in ({101 + others, 111 + others} if reached else {111 + others})
            await trio.sleep(10)
            assert result == await counter.get()
        if not reached:
            break
    assert step > 3


async def test_exact_under_contention_and_faults(autojump_clock):
    """20 tasks on three nodes, random faults, 60 seeds: the sum is exact, and results of adds are unique."""
    for seed in range(60):
        await one_contended_run(seed)


async def one_contended_run(seed):
    etcd = MemoryEtcd()
    draws = random.Random(seed)
    rates = FaultRates(lost_answer=0.08, lost_request=0.08, late=0.08, duplicate=0.05, delay=0.1)
    results, unknown, cancelled = [], 0, 0
    nodes = [FaultyBackend(etcd.node(str(n)), random.Random(seed * 10 + n), rates) for n in range(3)]
    async with (
        open_infra(nodes[0], seed=seed * 3 + 1) as one,
        open_infra(nodes[1], seed=seed * 3 + 2) as two,
        open_infra(nodes[2], seed=seed * 3 + 3) as three,
    ):

        async def work(infra, patience):
            nonlocal unknown, cancelled
            for _ in range(3):
                with trio.move_on_after(patience()) as scope:
                    try:
                        results.append(await infra.counter("n").add())
                    except OutcomeUnknownError:
                        unknown += 1
                cancelled += scope.cancelled_caught

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(work, (one, two, three)[number % 3], lambda: draws.choice([0.05, 1, 60, 60]))
        for node in nodes:
            node.stop()
        await trio.sleep(15)
        final = await one.counter("n").get()
    assert len(results) == len(set(results)), seed
    assert len(results) <= final <= len(results) + unknown + cancelled, seed
    seen = values(etcd)
    assert seen == sorted(set(seen)), seed
    assert len(results) + unknown + cancelled == 60
