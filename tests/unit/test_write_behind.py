"""Write-behind: own writes at once, in order, coalesced, bounded, never silently lost."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra import Entry, FencedError, OutcomeUnknownError, StorageFullError
from etcd_infra._primitives.write_behind import MAX_BATCHES, MAX_KEYS
from etcd_infra.testing import FaultRates, FaultyBackend, MemoryEtcd
from tests.conftest import open_infra
from tests.helpers.cancelling import cancelled_at

STATE = b"test/state/"


def commits(etcd):
    """List what each revision did to state keys."""
    return [
        {event.key.removeprefix(STATE): None if event.is_delete else event.kv.value for event in changed}
        for commit in etcd.store.history.between(2, etcd.store.revision)
        if (changed := [event for event in commit.events if event.key.startswith(STATE)])
    ]


async def test_own_writes_are_readable_at_once(etcd, autojump_clock):
    """A write can be read before it is in etcd, with version 0; afterwards with its true version."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        await infra.state.set("gone", 1)
        async with infra.open_write_behind() as behind:
            faulty.delay_next(5)
            value = [1]
            await behind.set("k", value)
            value.append(2)
            await behind.delete("gone")
            assert Entry("k", [1], 0) == await behind.get("k")
            assert {1} == (await behind.get("k", type=set[int])).value
            assert None is await behind.get("gone")
            assert None is await infra.state.get("k")
            await behind.flush()
            assert await infra.state.get("k") == await behind.get("k")
            assert None is await infra.state.get("gone")
            assert None is await behind.get("absent")


async def test_writes_are_coalesced_per_key(etcd, autojump_clock):
    """1,000 writes of one key during one round trip are two Txns."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra, infra.open_write_behind() as behind:
        faulty.delay_next(5)
        for number in range(1000):
            await behind.set("k", number)
        await behind.flush()
        assert 2 == len(commits(etcd))
        assert 999 == (await infra.state.get("k")).value


async def test_etcd_shows_a_prefix_of_what_was_written(autojump_clock):
    """At every revision etcd is as these writes had left it at some moment, in 50 seeds of random faults."""
    for seed in range(50):
        draws = random.Random(seed)
        etcd = MemoryEtcd()
        rates = FaultRates(lost_request=0.1, lost_answer=0.1, late=0.1, delay=0.3, duplicate=0.1, latest=5.0)
        faulty = FaultyBackend(etcd.node("one"), random.Random(seed), rates)
        moments, now = [{}], {}
        async with open_infra(faulty, seed=seed, ttl=60) as infra, infra.open_write_behind() as behind:
            for number in range(100):
                key = f"k{draws.randrange(40)}"
                if draws.random() < 0.2:
                    now = {name: value for name, value in now.items() if name != key}
                    await behind.delete(key)
                else:
                    now = now | {key: number}
                    await behind.set(key, number)
                moments.append(now)
                if draws.random() < 0.1:
                    await trio.sleep(draws.random())
            await behind.flush()
            faulty.stop()
        seen, place = {}, 0
        for commit in commits(etcd):
            for key, value in commit.items():
                seen.pop(key.decode(), None)
                if value is not None:
                    seen[key.decode()] = int(value)
            while moments[place] != seen:
                place += 1
                assert place < len(moments), (seed, seen)
        assert now == seen, seed


async def test_back_pressure(etcd, autojump_clock):
    """When etcd does not keep up, writers wait; waiting can be cancelled, and then nothing is written."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra, infra.open_write_behind() as behind:
        faulty.delay_next(20)
        written = 0
        with trio.move_on_after(10):
            while True:
                await behind.set(f"k{written}", written)
                written += 1
        assert (MAX_BATCHES - 1) * MAX_KEYS <= written <= MAX_BATCHES * MAX_KEYS + 1
        await behind.flush()
        assert None is await infra.state.get(f"k{written}")
        assert written == len([entry async for entry in infra.state.list("k")])


async def test_large_values_travel_alone(etcd, autojump_clock):
    """Batches stay below etcd's limit for requests."""
    async with open_infra(etcd.node("one")) as infra, infra.open_write_behind() as behind:
        for number in range(20):
            await behind.set(f"k{number}", b"x" * 400_000)
        await behind.flush()
        assert 20 == len(commits(etcd))


async def test_error_is_raised_by_the_next_call_and_on_leaving(etcd, autojump_clock):
    """A refusal by etcd ends the write-behind: every later call raises it, and so does leaving."""
    async with open_infra(etcd.node("one")) as infra:
        with pytest.raises(StorageFullError) as caught:
            async with infra.open_write_behind() as behind:
                etcd.store.full = True
                await behind.set("k", 1)
                await trio.sleep(1)
                for call in (
                    lambda: behind.set("k", 2),
                    lambda: behind.delete("k"),
                    lambda: behind.get("k"),
                    behind.flush,
                ):
                    with pytest.raises(StorageFullError):
                        await call()
        assert "1 writes are lost" in "".join(caught.value.__notes__)
        etcd.store.full = False
        assert [] == commits(etcd)


async def test_error_on_leaving_only(etcd, autojump_clock):
    """An error of the last writes comes out of the block; the body's own exception wins and carries it."""
    async with open_infra(etcd.node("one")) as infra:
        etcd.store.full = True
        with pytest.raises(StorageFullError):
            async with infra.open_write_behind() as behind:
                await behind.set("k", 1)
        with pytest.raises(ZeroDivisionError) as caught:
            async with infra.open_write_behind() as behind:
                await behind.set("k", 1)
                raise ZeroDivisionError
        assert "writes were lost" in "".join(caught.value.__notes__)
        etcd.store.full = False


async def test_leaving_flushes(etcd, autojump_clock):
    """What was written is in etcd after the block, also after an exception or a cancellation of the body."""
    async with open_infra(etcd.node("one")) as infra:
        async with infra.open_write_behind() as behind:
            await behind.set("clean", 1)
        with pytest.raises(ZeroDivisionError):
            async with infra.open_write_behind() as behind:
                await behind.set("raised", 1)
                raise ZeroDivisionError
        with trio.CancelScope() as scope:
            async with infra.open_write_behind() as behind:
                await behind.set("cancelled", 1)
                scope.cancel()
        assert {"clean", "raised", "cancelled"} == {entry.key async for entry in infra.state.list("")}
        with pytest.raises(trio.ClosedResourceError):
            await behind.set("k", 1)
        with pytest.raises(trio.ClosedResourceError):
            await behind.get("k")


async def test_leaving_is_bounded(etcd, autojump_clock):
    """With etcd out of reach leaving takes two seconds, and says which keys are in doubt."""
    node = etcd.node("one")
    async with open_infra(node) as infra:
        began = trio.current_time()
        with pytest.raises(OutcomeUnknownError) as caught:
            async with infra.open_write_behind() as behind:
                node.partition()
                await behind.set("a", 1)
                await behind.set("b", 1)
                began = trio.current_time()
        assert trio.current_time() - began <= 2.1
        assert {STATE + b"a", STATE + b"b"} == set(caught.value.keys)
        node.heal()


async def test_fenced_write_behind(etcd, autojump_clock):
    """Under a fence nothing is written once that is dead."""
    async with open_infra(etcd.node("one")) as infra:
        hold = await infra.lock("job").acquire()
        with pytest.raises(FencedError):
            async with infra.open_write_behind(fence=hold.fence) as behind:
                await behind.set("k", 1)
                await behind.flush()
                await hold.release()
                await behind.set("k", 2)
        assert [{b"k": b"1"}] == commits(etcd)
        with pytest.raises(TypeError):
            async with infra.open_write_behind(fence=hold):
                pass


@pytest.mark.parametrize(
    ("key", "value", "error"), [("", 1, ValueError), (7, 1, TypeError), ("k", {1j}, TypeError)]
)
async def test_bad_arguments(infra, etcd, autojump_clock, key, value, error):
    """Bad keys and values are refused by the call itself, not later; the write-behind goes on."""
    async with infra.open_write_behind() as behind:
        with pytest.raises(error):
            await behind.set(key, value)
        await behind.set("good", 1)
    assert [{b"good": b"1"}] == commits(etcd)


@pytest.mark.parametrize("fault", ["none", "lose_next_answer", "lose_next_request", "refuse_next"])
async def test_cancelled_at_every_step(autojump_clock, fault):
    """Cancelled at any step, what was accepted is written on leaving, in order, and nothing twice."""
    step = 0
    while True:
        step += 1
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        accepted = []
        async with open_infra(faulty) as infra:

            async def work(infra=infra, accepted=accepted):
                async with infra.open_write_behind() as behind:
                    for number in range(3):
                        await behind.set("k", number)
                        accepted.append(number)
                    await behind.flush()

            if fault != "none":
                getattr(faulty, fault)()
            reached = await cancelled_at(step, work)
            faulty.forget_faults()
            await trio.sleep(5)
            values = [int(commit[b"k"]) for commit in commits(etcd)]
            assert sorted(set(values)) == values
            assert values[-1:] == accepted[-1:]
        if not reached:
            break
    assert step > 4
