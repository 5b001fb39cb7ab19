"""Sections E and H, as far as one member shows them: size limits, a full store, status."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from etcd_infra._etcd.model import Compare, Range, Txn
from etcd_infra.errors import InvalidRequestError, LeaseNotFoundError, StorageFullError
from tests.contract.conftest import MEMORY, over_network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.contract.world import World

MIB = 1024 * 1024


async def test_requests_up_to_the_limit_pass(world):
    """S-H5: a request of 1.4 MiB passes, in one value or in many."""
    await world.put("a", bytes(int(1.4 * MIB)))
    await world.apply(*(world.putting(f"{n}", bytes(MIB // 100)) for n in range(125)))
    assert int(1.4 * MIB) == len((await world.get("a")).value)


async def test_large_requests_are_refused(world):
    """S-H5: a request of 1.6 MiB is refused as too large, also if it is the other branch or many values."""
    too_large = "etcdserver: request is too large"
    part = bytes(int(0.4 * MIB))
    for txn in (
        Txn(success=(world.putting("a", bytes(int(1.6 * MIB))),)),
        Txn(success=tuple(world.putting(name, part) for name in "abcd")),
        Txn(success=(world.putting("a"),), failure=(world.putting("a", bytes(int(1.6 * MIB))),)),
    ):
        with pytest.raises(InvalidRequestError, match=too_large):
            await world.backend.txn(txn)
    assert [] == await world.names()


async def test_very_large_requests_are_refused_by_the_transport(world):
    """S-H5: a request of 2.2 MiB is refused by the transport; nothing is written."""
    with pytest.raises(InvalidRequestError, match="received message larger than max"):
        await world.put("a", bytes(int(2.2 * MIB)))
    assert [] == await world.names()


async def test_answers_may_be_large(world):
    """S-D9: an answer of many mebibytes is received, though requests are limited."""
    for n in range(6):
        await world.put(f"{n}", bytes(MIB))
    found = await world.backend.range(Range(world.all))
    assert 6 * MIB == sum(len(kv.value) for kv in found.kvs)


async def test_status_describes_the_member(world):
    """S-H4: a single member is its own leader, at the store's revision, without alarms."""
    status = await world.backend.status()
    assert (True, status.member) == (status.member > 0, status.leader)
    assert await world.revision() == status.revision
    assert (False, ()) == (status.is_learner, status.errors)
    assert len(status.version.split(".")) >= 3
    if world.store is None:
        assert world.version == tuple(int(part) for part in status.version.split("."))


# ── NOSPACE ─────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def full_world(target: str, world: World) -> AsyncIterator[World]:
    """Give an etcd whose quota is used up, with one key `a`, and one key `b` on a lease."""
    if target == MEMORY:
        await prepare(world)
        world.store.full = True
        yield world
        return
    async with over_network(target, "--quota-backend-bytes=16777216") as opened:
        await prepare(opened)
        with pytest.raises(StorageFullError):
            for n in range(40):
                await opened.put(f"fill-{n}", bytes(MIB))
        yield opened


async def prepare(world: World) -> None:
    """Write what the facts need before the store is full."""
    await world.put("a", b"1")
    await world.put("b", b"1", lease=await world.grant())


async def test_full_store(target, world):
    """S-H1: without space puts and grants are refused, and everything else works."""
    async with full_world(target, world) as full:
        await refuses_puts_and_grants(full)
        await still_works(full)


async def refuses_puts_and_grants(full: World) -> None:
    """S-H1: refused are puts, any Txn with a put of its own even in the branch not taken, and grants."""
    before = await full.revision()
    absent = Compare.absent(full.key("a"))
    for txn in (
        Txn(success=(full.putting("a"),)),
        Txn(success=(full.deleting("a"), full.putting("c"))),
        Txn(failure=(full.putting("c"),)),
        Txn((absent,), (full.putting("c"),), (full.deleting("a"),)),
    ):
        with pytest.raises(StorageFullError, match="etcdserver: mvcc: database space exceeded"):
            await full.backend.txn(txn)
    with pytest.raises(StorageFullError, match="etcdserver: mvcc: database space exceeded"):
        await full.backend.lease_grant(60)
    assert before == await full.revision()


async def still_works(full: World) -> None:
    """S-H1: reads, deletes, Txns without puts, keep-alives, revokes and compactions work."""
    assert b"1" == (await full.get("a")).value
    (lease,) = await full.backend.lease_list()
    assert 60 == (await full.backend.lease_keep_alive(lease)).ttl
    status = await full.backend.status()
    assert any("NOSPACE" in alarm for alarm in status.errors)
    before = await full.revision()
    present = Compare.modified_at(full.key("a"), (await full.get("a")).mod_revision)
    assert (await full.backend.txn(Txn((present,), (full.deleting("a"),)))).succeeded
    assert before + 2 == await full.backend.lease_revoke(lease)
    assert await full.get("a") is None
    assert await full.get("b") is None
    assert before + 2 == await full.backend.compact(before + 2)
    with pytest.raises(LeaseNotFoundError):
        await full.backend.lease_revoke(lease)


async def test_nested_put_in_a_full_store(target, world):
    """S-H1: the quota overlooks the puts of nested Txns."""
    async with full_world(target, world) as full:
        before = await full.revision()
        nested = Txn(success=(full.putting("nested"),))
        assert before + 1 == (await full.apply(nested)).revision
