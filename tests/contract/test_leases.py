"""Section C: leases, and what hangs on them."""

from __future__ import annotations

import secrets

import pytest
import trio

from etcd_infra._etcd.model import (
    DeleteRange,
    Event,
    KeyRange,
    LeaseGrant,
    LeaseRenewal,
    LeaseTimeToLive,
    Put,
    Txn,
)
from etcd_infra.errors import InvalidRequestError, LeaseExistsError, LeaseNotFoundError
from tests.contract.world import World, receive, receive_events

MISSING = 0x7EAD


async def wait_gone(world: World, name: str, patience: float = 12.0) -> float:
    """Wait until a key is deleted; return the time of the event."""
    async with world.backend.watch(world.one(name)) as stream:
        with trio.fail_after(patience):
            while await world.get(name) is not None:
                await receive(stream, patience)
    return trio.current_time()


async def attached(world: World, lease: int) -> set[bytes]:
    """Return the keys on a lease."""
    found = await world.backend.lease_time_to_live(lease, keys=True)
    return {key.removeprefix(world.prefix) for key in found.keys}


async def test_short_ttl_is_raised(world):
    """S-C1: a TTL below the server's minimum (2 s by default), also 0 or a negative one, is raised to it."""
    for ttl in (1, 0, -5):
        assert 2 == (await world.backend.lease_grant(ttl)).ttl, ttl


async def test_longer_ttl_is_granted(world):
    """S-C1: a TTL of the minimum or more is granted as it is, up to 9,000,000,000."""
    for ttl in (2, 3, 60, 9_000_000_000):
        granted = await world.backend.lease_grant(ttl)
        assert LeaseGrant(granted.lease, ttl, await world.revision()) == granted


async def test_too_large_ttl_is_refused(world):
    """S-C1: a TTL above 9,000,000,000 is refused."""
    with pytest.raises(InvalidRequestError, match="etcdserver: too large lease TTL"):
        await world.backend.lease_grant(9_000_000_001)


async def test_ttl_must_be_an_int(world):
    """S-C1: what is no whole number of seconds is refused before it is sent, never rounded down."""
    for ttl in (2.5, 30.0, True, "5"):
        with pytest.raises(TypeError):
            await world.backend.lease_grant(ttl)


async def test_server_chooses_a_positive_id(world):
    """S-C2: for id 0 the server chooses a positive one, another one each time."""
    leases = [await world.grant() for _ in range(5)]
    assert 5 == len(set(leases))
    assert all(0 < lease < 2**63 for lease in leases)


async def test_client_chooses_an_id(world):
    """S-C2: a lease has the id that the client chose, and a second grant of it says that it exists."""
    lease = secrets.randbits(62) + 1
    assert lease == (await world.backend.lease_grant(60, lease=lease)).lease
    for ttl in (60, 5):
        with pytest.raises(LeaseExistsError, match="etcdserver: lease already exists"):
            await world.backend.lease_grant(ttl, lease=lease)
    assert 60 == (await world.backend.lease_time_to_live(lease)).granted_ttl


async def test_revoked_id_can_be_granted_again(world):
    """S-C2: the id of a revoked lease is free, and the new lease has none of its keys."""
    lease = secrets.randbits(62) + 1
    await world.backend.lease_grant(60, lease=lease)
    await world.put("a", lease=lease)
    await world.backend.lease_revoke(lease)
    await world.backend.lease_grant(30, lease=lease)
    assert set() == await attached(world, lease)
    assert 30 == (await world.backend.lease_time_to_live(lease)).granted_ttl


async def test_negative_id_is_refused(world):
    """S-C2: a negative id, which etcd would take, is refused before it is sent."""
    with pytest.raises(ValueError):
        await world.backend.lease_grant(60, lease=-1)


async def test_keep_alive_of_a_missing_lease_answers_0(world):
    """S-C3: a keep-alive of a missing lease is no error: it answers TTL 0."""
    assert LeaseRenewal(MISSING, 0, await world.revision()) == await world.backend.lease_keep_alive(MISSING)


async def test_time_to_live_of_a_missing_lease_answers_minus_1(world):
    """S-C3: the time to live of a missing lease is no error: it answers -1."""
    wanted = LeaseTimeToLive(MISSING, -1, revision=await world.revision())
    assert wanted == await world.backend.lease_time_to_live(MISSING, keys=True)


async def test_revoke_of_a_missing_lease_is_refused(world):
    """S-C3: revoking a missing lease, also one that was revoked before, is refused."""
    lease = await world.grant()
    await world.backend.lease_revoke(lease)
    for missing in (MISSING, lease):
        with pytest.raises(LeaseNotFoundError, match="etcdserver: requested lease not found"):
            await world.backend.lease_revoke(missing)


async def test_put_on_a_missing_lease_is_refused(world):
    """S-C3: a put on a missing lease is refused."""
    with pytest.raises(LeaseNotFoundError, match="etcdserver: requested lease not found"):
        await world.put("a", lease=MISSING)
    assert await world.get("a") is None


async def test_keep_alive_answers_the_granted_ttl(world):
    """S-C4: a keep-alive answers the lease's full granted TTL."""
    for ttl, granted in ((1, 2), (7, 7)):
        lease = await world.grant(ttl)
        assert LeaseRenewal(lease, granted, await world.revision()) == await world.backend.lease_keep_alive(
            lease
        )


async def test_time_to_live_counts_down_and_keep_alive_restores(world):
    """S-C4: what is left of a lease goes down with time, in whole seconds rounded down, up to a keep-alive."""
    lease = await world.grant(30)
    await trio.sleep(1.2)
    left = await world.backend.lease_time_to_live(lease)
    assert LeaseTimeToLive(lease, 28, 30, (), await world.revision()) == left
    await world.backend.lease_keep_alive(lease)
    assert (await world.backend.lease_time_to_live(lease)).ttl in {29, 30}


async def test_lease_ends_after_its_ttl_and_not_before(world):
    """S-C6: a key lives at least as long as its lease's TTL and goes soon after it; the lease is gone then."""
    began = trio.current_time()
    lease = await world.grant(2)
    await world.put("a", lease=lease)
    took = await wait_gone(world, "a") - began
    assert 2.0 <= took <= 5.0
    assert -1 == (await world.backend.lease_time_to_live(lease)).ttl
    assert 0 == (await world.backend.lease_keep_alive(lease)).ttl
    assert lease not in await world.backend.lease_list()


async def test_keep_alive_postpones_the_end(world):
    """S-C4: each keep-alive gives the lease its full time again."""
    lease = await world.grant(2)
    await world.put("a", lease=lease)
    for _ in range(2):
        await trio.sleep(1.5)
        await world.backend.lease_keep_alive(lease)
        renewed = trio.current_time()
    assert await world.get("a") is not None
    assert 1.9 <= await wait_gone(world, "a") - renewed <= 5.0


async def test_expiry_is_one_revision_in_key_order(world):
    """S-C8: an expiring lease deletes all of its keys in one revision, with events in key order."""
    lease = await world.grant(2)
    put = (await world.apply(*(world.putting(name, lease=lease) for name in ("c", "a", "b")))).revision
    async with world.backend.watch(world.all, start_revision=put + 1) as stream:
        batch = await receive(stream)
    assert put + 1 == batch.revision
    wanted = tuple(Event.deleted(world.key(name), mod_revision=put + 1) for name in "abc")
    assert wanted == batch.events


async def test_revoke_is_one_revision_in_key_order(world):
    """S-C8: a revoke deletes all keys of the lease in one revision, with events in key order."""
    lease = await world.grant()
    for name in ("c", "a", "b"):
        put = await world.put(name, lease=lease)
    async with world.backend.watch(world.all, start_revision=put + 1) as stream:
        assert put + 1 == await world.backend.lease_revoke(lease)
        batch = await receive(stream)
    assert tuple(Event.deleted(world.key(name), mod_revision=put + 1) for name in "abc") == batch.events
    assert [] == await world.names()


async def test_revoke_without_keys_is_silent(world):
    """S-C9: revoking a lease without keys changes no revision and sends no event."""
    before = await world.put("a")
    async with world.backend.watch(KeyRange.everything(), start_revision=before + 1) as stream:
        assert before == await world.backend.lease_revoke(await world.grant())
        assert before + 1 == await world.put("b")
        (event,) = await receive_events(stream, 1)
    assert world.key("b") == event.key


async def test_put_without_lease_detaches(world):
    """S-C10: a put without a lease takes the key off the lease that it had."""
    lease = await world.grant()
    await world.put("a", lease=lease)
    await world.put("b", lease=lease)
    await world.put("a")
    assert {b"b"} == await attached(world, lease)
    assert 0 == (await world.get("a")).lease
    await world.backend.lease_revoke(lease)
    assert [b"a"] == await world.names()


async def test_key_has_one_lease(world):
    """S-C10: a put with another lease moves the key to it."""
    first, second = await world.grant(), await world.grant()
    await world.put("a", lease=first)
    await world.put("a", lease=second)
    assert (set(), {b"a"}) == (await attached(world, first), await attached(world, second))
    await world.backend.lease_revoke(first)
    assert second == (await world.get("a")).lease


async def test_put_with_the_same_lease_keeps_it(world):
    """S-C10: a put that names the key's lease again leaves it there."""
    lease = await world.grant()
    await world.put("a", b"1", lease=lease)
    await world.put("a", b"2", lease=lease)
    assert {b"a"} == await attached(world, lease)


async def test_deleted_key_leaves_its_lease(world):
    """S-C10: a deleted key is off its lease, and re-created without one it stays off."""
    lease = await world.grant()
    await world.put("a", lease=lease)
    await world.put("b", lease=lease)
    await world.apply(DeleteRange(world.one("a")))
    assert {b"b"} == await attached(world, lease)
    await world.put("a")
    await world.backend.lease_revoke(lease)
    assert [b"a"] == await world.names()


async def test_time_to_live_names_keys_only_if_asked(world):
    """S-C10: the keys of a lease are named only if they were asked for."""
    lease = await world.grant()
    await world.put("a", lease=lease)
    assert () == (await world.backend.lease_time_to_live(lease)).keys
    assert (world.key("a"),) == (await world.backend.lease_time_to_live(lease, keys=True)).keys


async def test_rejected_txn_attaches_nothing(world):
    """S-B9: a Txn that is rejected attaches no key to a lease that exists."""
    lease = await world.grant()
    with pytest.raises(LeaseNotFoundError):
        await world.apply(world.putting("a", lease=lease), Put(world.key("b"), b"v", lease=MISSING))
    assert set() == await attached(world, lease)


async def test_lease_of_the_other_branch_gets_nothing(world):
    """S-B3: a put of the branch not taken is not attached."""
    lease = await world.grant()
    await world.backend.txn(Txn(failure=(world.putting("a", lease=lease),)))
    assert set() == await attached(world, lease)


async def test_lease_list_names_all(world):
    """S-C3: the list of leases has every lease that lives, and no other."""
    kept, gone = await world.grant(), await world.grant()
    await world.backend.lease_revoke(gone)
    listed = await world.backend.lease_list()
    assert (True, False) == (kept in listed, gone in listed)


async def test_key_outlives_compaction_and_goes_with_its_lease(world):
    """S-C8: compaction does not take a key off its lease."""
    lease = await world.grant()
    put = await world.put("a", lease=lease)
    await world.backend.compact(put)
    assert {b"a"} == await attached(world, lease)
    await world.backend.lease_revoke(lease)
    assert await world.get("a") is None
