"""Watching state: values, not bytes; a key or a prefix; what does not decode."""

from __future__ import annotations

import pytest
import trio

from etcd_infra import CodecError, StateChange, StateSnapshot
from etcd_infra._etcd.model import KeyRange
from tests.conftest import open_infra
from tests.helpers.cancelling import cancelled_at


async def test_watch_of_a_key(infra, autojump_clock):
    """A snapshot of the one key, then each of its changes; a longer key is another key."""
    version = await infra.state.set("k", 1)
    async with infra.state.watch("k") as news:
        snapshot = await anext(news)
        assert {"k": await infra.state.get("k")} == snapshot.entries
        assert None is snapshot.missed_after
        assert snapshot.revision >= version
        await infra.state.set("k2", 5)
        version = await infra.state.set("k", 2)
        change = await anext(news)
        assert StateChange("k", await infra.state.get("k"), version) == change
        await infra.state.delete("k")
        gone = await anext(news)
        assert ("k", None) == (gone.key, gone.entry)
        assert gone.revision > version


async def test_watch_of_a_prefix(infra, autojump_clock):
    """A prefix shows every key under it, typed."""
    orders = infra.state.typed(list[int])
    await orders.set("order/1", [1])
    await infra.state.set("other", "x")
    async with orders.watch(prefix="order/") as news:
        assert ["order/1"] == list((await anext(news)).entries)
        await orders.set("order/2", [2])
        assert [2] == (await anext(news)).entry.value
    async with infra.state.watch(prefix="") as news:
        assert ["order/1", "order/2", "other"] == list((await anext(news)).entries)


async def test_absent_key(infra, autojump_clock):
    """The snapshot of an absent key is empty; its creation is a change."""
    async with infra.state.watch("k") as news:
        assert {} == (await anext(news)).entries
        await infra.state.set("k", None)
        assert None is (await anext(news)).entry.value


async def test_ttl_shows_as_a_deletion(infra, autojump_clock):
    """A key whose TTL is over is told as deleted."""
    async with infra.state.watch("k") as news:
        await anext(news)
        await infra.state.set("k", 1, ttl=5)
        assert (await anext(news)).entry.lease != 0
        with trio.fail_after(8):
            assert None is (await anext(news)).entry


async def test_update_after_compaction_is_an_update(etcd, autojump_clock):
    """After a compaction a changed key has its create revision still: it is not mistaken for a new one."""
    node = etcd.node("one")
    async with open_infra(node, ttl=60) as infra:
        created = await infra.state.set("k", 1)
        async with infra.state.watch("k") as news:
            told = (await anext(news)).revision
            node.partition()
            await etcd.put(b"other", b"")
            await etcd.put(b"test/state/k", b"2")
            await etcd.compact(etcd.store.revision)
            node.heal()
            snapshot = await anext(news)
            assert isinstance(snapshot, StateSnapshot)
            assert told == snapshot.missed_after
            assert (2, created) == (snapshot.entries["k"].value, snapshot.entries["k"].create_revision)


async def test_what_does_not_decode_is_told_and_passed(infra, etcd, autojump_clock):
    """A value that does not decode raises CodecError at its place; what comes after it comes."""
    numbers = infra.state.typed(int)
    await infra.state.set("k/bad", "x")
    await numbers.set("k/good", 1)
    async with numbers.watch(prefix="k/") as news:
        with pytest.raises(CodecError, match="k/bad"):
            await anext(news)
        assert ["k/good"] == list((await anext(news)).entries)
        await etcd.put(b"test/state/k/bad", b"{")
        await numbers.set("k/good", 2)
        with pytest.raises(CodecError, match="k/bad"):
            await anext(news)
        assert 2 == (await anext(news)).entry.value


async def test_calls_within_the_loop(infra, autojump_clock):
    """The consumer may call the library from its loop, and its exception surfaces."""
    await infra.state.set("k", 0)
    with pytest.raises(ZeroDivisionError):
        async with infra.state.watch("k") as news:
            async for item in news:
                if isinstance(item, StateChange) and item.entry.value == 3:
                    raise ZeroDivisionError
                await infra.counter("k").add()


async def test_one_blocked_consumer_blocks_nobody(infra, autojump_clock):
    """A consumer that does not take anything holds up neither writers nor other watches."""
    async with infra.state.watch("k") as blocked, infra.state.watch("k") as lively:
        await anext(lively)
        for number in range(2_000):
            await infra.state.set("k", number)
            assert number == (await anext(lively)).entry.value
        assert isinstance(await anext(blocked), StateSnapshot)
        assert 0 == (await anext(blocked)).entry.value


async def test_watch_outlives_the_session(etcd, autojump_clock):
    """A watch needs no session: it goes on while the lost one is replaced."""
    async with open_infra(etcd.node("one")) as infra:
        async with infra.state.watch("k") as news:
            await anext(news)
            await etcd.lease_revoke(infra.session.lease.id)
            await etcd.put(b"test/state/k", b"1")
            assert 1 == (await anext(news)).entry.value


async def test_cancelled_at_every_step(etcd, autojump_clock):
    """Opening and reading a watch, cancelled at any step, leaves no watch and no exception behind."""
    async with open_infra(etcd.node("one")) as infra:
        await infra.state.set("k", 1)
        step = 0

        async def look():
            async with infra.state.watch("k") as news:
                await anext(news)
                await infra.state.set("k", 2)
                await anext(news)

        while True:
            step += 1
            if not await cancelled_at(step, look):
                break
        assert step > 4
        await etcd.delete(KeyRange.one(b"test/state/k"))
        await look()
