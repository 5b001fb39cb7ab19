"""Sections E and H, as far as one member shows them: size limits, a full store, status."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trio

from etcd_infra._etcd.model import Compare, Range, Txn
from etcd_infra.errors import InvalidRequestError, LeaseNotFoundError, StorageFullError
from tests.contract.conftest import MEMORY, Target, over_network

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
async def full_world(target: Target, world: World) -> AsyncIterator[World]:
    """Give an etcd whose quota is used up, with one key `a`, and one key `b` on a lease."""
    if target == MEMORY:
        await prepare(world)
        world.store.full = True
        yield world
        return
    async with over_network(target, "--quota-backend-bytes=4194304") as opened:
        await prepare(opened)

        async def fill(n: int) -> None:
            with suppress(StorageFullError):
                await opened.put(f"fill-{n}", bytes(MIB))

        # At once, so that the file is beyond the quota before anybody looks, and not just below.
        async with trio.open_nursery() as nursery:
            for n in range(24):
                nursery.start_soon(fill, n)
        with pytest.raises(StorageFullError):
            for _ in range(24):
                await opened.put("fill", bytes(MIB))
        yield opened


async def prepare(world: World) -> None:
    """Write what the facts need before the store is full."""
    await world.put("a", b"1")
    await world.put("b", b"1", lease=await world.grant())


async def test_full_store(target, world):
    """S-H1: without space puts and grants are refused; reads, revokes, keep-alives and compactions work."""
    async with full_world(target, world) as full:
        await refuses_puts_and_grants(full)
        await lets_other_verbs_pass(full)
        if quota_looks_at_txns(full):
            await lets_txns_without_puts_pass(full)
        else:
            await refuses_every_txn(full)


def quota_looks_at_txns(full: World) -> bool:
    """Whether the quota lets Txns without puts pass (etcd PR #13435: from 3.4.20 and 3.5.7 on)."""
    return not (full.version[:2] == (3, 5) and full.version < (3, 5, 7))


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


async def lets_other_verbs_pass(full: World) -> None:
    """S-H1: ranges, keep-alives, revokes and compactions work, and status names the alarm."""
    assert b"1" == (await full.get("a")).value
    (lease,) = await full.backend.lease_list()
    assert 60 == (await full.backend.lease_keep_alive(lease)).ttl
    status = await full.backend.status()
    assert any("NOSPACE" in alarm for alarm in status.errors)
    before = await full.revision()
    assert before + 1 == await full.backend.lease_revoke(lease)
    assert await full.get("b") is None
    assert before + 1 == await full.backend.compact(before + 1)
    with pytest.raises(LeaseNotFoundError):
        await full.backend.lease_revoke(lease)


async def lets_txns_without_puts_pass(full: World) -> None:
    """S-H1: Txns that only delete or read work; the puts of nested Txns are overlooked."""
    before = await full.revision()
    assert before == (await full.apply(Range(full.all))).revision
    present = Compare.modified_at(full.key("a"), (await full.get("a")).mod_revision)
    assert before + 1 == (await full.backend.txn(Txn((present,), (full.deleting("a"),)))).revision
    assert await full.get("a") is None
    assert before + 2 == (await full.apply(Txn(success=(full.putting("nested"),)))).revision


async def refuses_every_txn(full: World) -> None:
    """S-H1: earlier servers refuse every Txn once the file is larger than the quota, reads included."""
    present = Compare.modified_at(full.key("a"), (await full.get("a")).mod_revision)
    for op in (full.deleting("a"), Range(full.all), Txn(success=(full.putting("nested"),))):
        with pytest.raises(StorageFullError):
            await full.backend.txn(Txn((present,), (op,)))
