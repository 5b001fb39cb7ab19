"""State and counters on real servers: each shape of Txn, TTLs, cut connections, the command line."""

from __future__ import annotations

import json
import sys
from contextlib import asynccontextmanager

import pytest
import trio

from etcd_infra import (
    DELETE,
    ConflictError,
    Consistency,
    FencedError,
    StateChange,
    StateSnapshot,
    open_coordinator,
)
from etcd_infra.abc import KeyRange
from etcd_infra.testing import EtcdServer, FaultyBackend, find_etcd, open_proxy
from tests.helpers.etcds import every_etcd

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]


@asynccontextmanager
async def coordinator_on(program):
    async with EtcdServer(program) as server:
        with trio.fail_after(60):
            async with open_coordinator(server.endpoint, namespace="ns") as infra:
                yield infra


@every_etcd()
async def test_every_shape_of_write(program):
    """Each operation does on a real etcd what it does in memory."""
    async with coordinator_on(program) as infra:
        state = infra.state
        first = await state.set("k", {"b": 1, "a": 2})
        assert first == (await infra.backend.get(b"ns/state/k")).mod_revision
        entry = await state.update("k", lambda value: value | {"c": 3})
        assert entry == await state.get("k")
        assert not (await state.compare_and_swap("k", 0, expected_version=first)).swapped
        assert (await state.compare_and_swap("k", 1, expected_version=entry.version)).swapped
        assert (await state.compare_and_swap("k", 2, expected_value=1)).swapped
        assert not (await state.compare_and_swap("k", 3, expected_value=1)).swapped
        assert 2 == (await state.get_or_set("k", lambda: 9)).value
        assert 9 == (await state.get_or_set("new", lambda: 9)).value
        with pytest.raises(ConflictError):
            await state.delete("k", expected_version=first)
        assert None is await state.update("k", lambda _: DELETE)
        assert False is await state.delete("k")
        assert True is await state.delete("new")
        await state.set("k", 5)
        assert 5 == (await state.get("k", consistency=Consistency.SERIALIZABLE)).value


@every_etcd()
async def test_fenced_writes(program):
    """A living fence lets every shape of write pass, a dead one none."""
    async with coordinator_on(program) as infra:
        async with infra.lock("job") as hold:
            fence = hold.fence
            await infra.state.set("k", 1, fence=fence)
            await infra.state.update("k", lambda value: value + 1, fence=fence)
            await infra.state.set("t", 1, ttl=60, fence=fence)
            assert await infra.state.delete("t", fence=fence)
        for write in (
            lambda: infra.state.set("k", 9, fence=fence),
            lambda: infra.state.set("k", 9, ttl=60, fence=fence),
            lambda: infra.state.update("k", lambda _: 9, fence=fence),
            lambda: infra.state.compare_and_swap("k", 9, expected_value=2, fence=fence),
            lambda: infra.state.delete("k", fence=fence),
        ):
            with pytest.raises(FencedError):
                await write()
        assert 2 == (await infra.state.get("k")).value


@every_etcd()
async def test_many_keys(program):
    """5,000 keys are written behind in order, read in two round trips and listed in pages."""
    async with coordinator_on(program) as infra:
        async with infra.open_write_behind() as behind:
            for number in range(5000):
                await behind.set(f"k/{number:04}", number)
            await behind.flush()
            await behind.delete("k/0000")
        found = await infra.state.get_many([f"k/{number:04}" for number in range(5000)])
        assert [None, *range(1, 5000)] == [entry and entry.value for entry in found.values()]
        assert list(range(1, 5000)) == [entry.value async for entry in infra.state.list("k/")]


@every_etcd()
async def test_ttl(program):
    """A TTL ends a key; updates and adds keep it; its lease goes when the key is replaced."""
    async with coordinator_on(program) as infra:
        leases = set(await infra.backend.lease_list())
        await infra.state.set("k", 1, ttl=3)
        lease = (await infra.state.get("k")).lease
        assert lease == (await infra.state.update("k", lambda value: value + 1)).lease
        assert 3 == await infra.counter("k").add()
        await infra.counter("k").reset(7)
        assert lease == (await infra.state.get("k")).lease
        async with infra.state.watch("k") as news:
            assert ["k"] == list((await anext(news)).entries)
            assert None is (await anext(news)).entry
        await infra.state.set("k", 1, ttl=60)
        await infra.state.set("k", 2)
        while leases != set(await infra.backend.lease_list()):
            await trio.sleep(0.05)
        assert 2 == (await infra.state.get("k")).value


@every_etcd()
async def test_lost_answers(program):
    """Answers and requests that get lost on the way to a real etcd change nothing about exactly once."""
    async with coordinator_on(program) as infra:
        faulty = FaultyBackend(infra.backend)
        async with open_coordinator(faulty, namespace="ns") as other:
            counter = other.counter("n")
            for number in range(1, 25):
                (faulty.lose_next_answer, faulty.lose_next_request, lambda: faulty.apply_next_late(0.2))[
                    number % 3
                ]()
                assert number == await counter.add()
            faulty.lose_next_answer()
            assert True is await other.state.delete("n")
            faulty.lose_next_answer()
            version = await other.state.set("n", 1)
            assert version == (await infra.state.get("n")).version


@every_etcd()
async def test_contended_counter(program):
    """Three coordinators with 20 tasks each: the sum is exact and no result comes twice."""
    async with EtcdServer(program) as server, trio.open_nursery() as nursery:
        results = []

        async def work():
            async with open_coordinator(server.endpoint, namespace="ns") as infra, trio.open_nursery() as inner:

                async def add():
                    for _ in range(5):
                        number = await infra.counter("n").add()
                        results.append(number)

                for _ in range(20):
                    inner.start_soon(add)

        with trio.fail_after(60):
            for _ in range(3):
                nursery.start_soon(work)
            while len(results) < 300:
                await trio.sleep(0.05)
        assert list(range(1, 301)) == sorted(results)


@every_etcd()
async def test_watch_through_a_cut_connection(program):
    """A watch goes on over a cut connection without a gap; after a compaction meanwhile it says so."""
    async with EtcdServer(program) as server, open_proxy(server.endpoint) as proxy:
        async with (
            open_coordinator(server.endpoint, namespace="ns") as writer,
            open_coordinator(proxy.endpoint, namespace="ns", ttl=60, call_timeout=1.0) as reader,
        ):
            with trio.fail_after(60):
                async with reader.state.watch(prefix="k/") as news:
                    assert {} == (await anext(news)).entries
                    for cut in range(3):
                        await writer.state.set("k/1", (cut, "before"))
                        proxy.reset()
                        for number in range(20):
                            await writer.state.set("k/1", (cut, number))
                        seen = [(await anext(news)).entry.value[1] for _ in range(21)]
                        assert ["before", *range(20)] == seen
                    told = (await writer.state.get("k/1")).version
                    proxy.refuse()
                    await writer.state.delete("k/1")
                    version = await writer.state.set("k/2", "x")
                    await writer.state.set("other", "y")
                    await writer.backend.compact(version + 1)
                    proxy.heal()
                    resync = await anext(news)
                    assert isinstance(resync, StateSnapshot)
                    assert (told, ["k/2"]) == (resync.missed_after, list(resync.entries))
                    await writer.state.delete("k/2")
                    change = await anext(news)
                    assert isinstance(change, StateChange)
                    assert ("k/2", None) == (change.key, change.entry)


@every_etcd()
async def test_inspect_state(program):
    """`etcd-infra inspect state` lists keys as a table and as JSON, all or those with a prefix."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        version = await infra.state.set("order/1", {"paid": True})
        await infra.state.set("session/1", "x", ttl=60)
        await infra.backend.delete(KeyRange.one(b"nothing"))

        async def inspect(*arguments):
            command = [sys.executable, "-m", "etcd_infra", "inspect", "state", *arguments]
            options = ["--namespace", "ns", "--endpoints", server.endpoint]
            return (await trio.run_process([*command, *options], capture_stdout=True)).stdout.decode()

        (order,) = json.loads(await inspect("order/", "-o", "json"))
        assert {
            "key": "order/1",
            "version": version,
            "lease": None,
            "ttl": None,
            "size_bytes": 13,
            "preview": '{"paid":true}',
        } == order
        table = await inspect()
        assert "session/1" in table
        assert "order/1" in table
