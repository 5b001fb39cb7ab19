"""Section A, first half: what makes a revision, and what a key's numbers mean."""

from __future__ import annotations

import pytest

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, KeyValue, Put, Range, Txn
from etcd_infra.errors import CompactedError, FutureRevisionError, InvalidRequestError, LeaseNotFoundError
from tests.contract.world import World, receive_events


async def test_empty_store_is_at_revision_1(fresh):
    """S-A1: an empty store's header revision is 1."""
    assert 1 == await fresh.revision()
    assert 1 == (await fresh.backend.status()).revision


async def test_first_write_answers_2(fresh):
    """S-A1: the first write answers revision 2."""
    assert 2 == await fresh.put("a")
    assert 2 == (await fresh.get("a")).create_revision


async def test_each_changing_request_is_one_revision(world):
    """S-A2: the revision grows by exactly 1 per request that changes something, however many keys."""
    lease = await world.grant()
    steps = (
        (world.putting("a"),),
        (world.putting("a"), world.putting("b"), world.putting("c")),
        (world.putting("d", lease=lease), world.putting("e", lease=lease)),
        (world.deleting("a"), world.putting("f")),
        (DeleteRange(world.span("b", "d")),),
        (Txn(success=(world.putting("g"), world.putting("h"))), world.putting("i")),
    )
    for ops in steps:
        before = await world.revision()
        assert before + 1 == (await world.apply(*ops)).revision, ops
        assert before + 1 == await world.revision(), ops
    assert before + 2 == await world.backend.lease_revoke(lease)
    assert before + 2 == await world.revision()


async def test_what_changes_nothing_makes_no_revision(world):
    """S-A2: reads, empty branches, deletes of nothing, leases and compactions make no revision."""
    before = await world.put("a")
    absent = Compare.absent(world.key("a"))
    txns = (
        Txn(),
        Txn(success=(Range(world.all),)),
        Txn((absent,), (world.putting("b"),)),
        Txn(success=(world.deleting("missing"),)),
        Txn(success=(DeleteRange(world.span("x", "z")),)),
        Txn(success=(Txn((absent,), (world.putting("b"),)),)),
    )
    for txn in txns:
        assert before == (await world.backend.txn(txn)).revision, txn
    granted = await world.backend.lease_grant(60)
    assert before == granted.revision
    assert before == (await world.backend.lease_keep_alive(granted.lease)).revision
    assert before == (await world.backend.lease_time_to_live(granted.lease)).revision
    assert before == await world.backend.lease_revoke(granted.lease)
    assert before == await world.backend.compact(before)
    assert before == await world.revision()


async def test_rejected_request_makes_no_revision(world):
    """S-A2: a request that is rejected makes no revision and leaves no trace."""
    before = await world.put("a")
    with pytest.raises(LeaseNotFoundError):
        await world.apply(world.putting("b"), world.putting("c", lease=0x7EAD))
    with pytest.raises(InvalidRequestError):
        await world.apply(world.putting("b"), world.putting("b"))
    assert before == await world.revision()
    assert [b"a"] == await world.names()


async def test_same_value_again_is_a_change(world):
    """S-A3: writing the same value again moves mod revision and version, and sends an event."""
    first = await world.put("a", b"same")
    async with world.backend.watch(world.all, start_revision=first + 1) as stream:
        second = await world.put("a", b"same")
        (event,) = await receive_events(stream, 1)
    assert first + 1 == second
    assert KeyValue(world.key("a"), b"same", first, second, 2) == await world.get("a") == event.kv


async def test_creation_sets_create_mod_and_version(world):
    """S-A4: creation sets create revision = mod revision = this revision, and version 1."""
    created = await world.put("a", b"x")
    assert KeyValue(world.key("a"), b"x", created, created, 1) == await world.get("a")


async def test_each_put_adds_one_to_the_version(world):
    """S-A4: each further put moves the mod revision and adds 1 to the version, and keeps the create revision."""
    created = await world.put("a")
    for version in (2, 3, 4):
        modified = await world.put("a")
        assert KeyValue(world.key("a"), b"v", created, modified, version) == await world.get("a")


async def test_recreated_key_starts_again(world):
    """S-A4: a deleted key is gone, and re-created it starts at version 1 with a new create revision."""
    await world.put("a")
    await world.put("a")
    deleted = await world.backend.delete(world.one("a"))
    assert await world.get("a") is None
    created = await world.put("a")
    assert deleted + 1 == created
    assert KeyValue(world.key("a"), b"v", created, created, 1) == await world.get("a")


async def test_keys_of_one_txn_share_its_revision(world):
    """S-A5: all keys that one Txn writes share one mod revision and, if created, one create revision."""
    old = await world.put("a")
    revision = (await world.apply(*(world.putting(name) for name in "abc"))).revision
    numbers = [
        (kv.create_revision, kv.mod_revision) for kv in (await world.backend.range(Range(world.all))).kvs
    ]
    assert [(old, revision), (revision, revision), (revision, revision)] == numbers


async def test_read_sees_every_acknowledged_write(world):
    """S-A6: a linearizable read's header revision is at least every revision acknowledged before it."""
    for _ in range(10):
        written = await world.put("a")
        found = await world.backend.range(Range(world.one("a")))
        assert written == found.kvs[0].mod_revision
        assert written <= found.revision


async def test_serializable_read_answers_the_same_on_one_member(world):
    """S-A7: a serializable read is answered by the member itself, in the same form."""
    await world.put("a")
    wanted = await world.backend.range(Range(world.all))
    assert wanted == await world.backend.range(Range(world.all, serializable=True))
    assert wanted.kvs[0] == await world.get("a", serializable=True)


async def test_header_is_the_stores_revision(world):
    """S-A9: a range's revision is the store's at the answer, neither the key's nor the one asked for."""
    first = await world.put("a")
    last = await world.put("b")
    for request in (Range(world.one("a")), Range(world.all, revision=first), Range(world.one("missing"))):
        assert last == (await world.backend.range(request)).revision, request


# ── old revisions and compaction ────────────────────────────────────────────────────────────────


async def history(world: World) -> list[int]:
    """Write a, b; change a; delete b; write c. Return the five revisions."""
    return [
        await world.put("a", b"1"),
        await world.put("b", b"1"),
        await world.put("a", b"2"),
        await world.backend.delete(world.one("b")),
        await world.put("c", b"1"),
    ]


async def test_old_revision_shows_the_past(world):
    """S-A8: a read at revision r shows exactly the state after r."""
    wanted = (
        {b"a": b"1"},
        {b"a": b"1", b"b": b"1"},
        {b"a": b"2", b"b": b"1"},
        {b"a": b"2"},
        {b"a": b"2", b"c": b"1"},
    )
    for revision, state in zip(await history(world), wanted, strict=True):
        found = await world.backend.range(Range(world.all, revision=revision))
        assert state == {kv.key.removeprefix(world.prefix): kv.value for kv in found.kvs}, revision
        assert len(state) == found.count


async def test_old_revision_shows_old_metadata(world):
    """S-A8: a key read at an old revision has the numbers that it had then."""
    first, *_ = await history(world)
    assert KeyValue(world.key("a"), b"1", first, first, 1) == await world.get("a", revision=first)


async def test_future_revision_is_refused(world):
    """S-A8: a read at a revision that is not reached is refused."""
    last = await world.put("a")
    with pytest.raises(FutureRevisionError, match="required revision is a future revision"):
        await world.get("a", revision=last + 1)
    with pytest.raises(FutureRevisionError):
        await world.get("a", revision=last + 1, serializable=True)


async def test_compacted_revision_is_refused(world):
    """S-A8: a read below the compaction revision is refused; at it, it is answered."""
    revisions = await history(world)
    await world.backend.compact(revisions[2])
    for revision in revisions[:2]:
        with pytest.raises(CompactedError, match="required revision has been compacted"):
            await world.get("a", revision=revision)
    for revision in revisions[2:]:
        assert b"2" == (await world.get("a", revision=revision)).value


async def test_compaction_keeps_the_present(world):
    """S-A14: compaction removes no key and changes no key's numbers."""
    revisions = await history(world)
    before = await world.backend.range(Range(world.all))
    await world.backend.compact(revisions[-1])
    assert before == await world.backend.range(Range(world.all))


async def test_compaction_keeps_the_state_at_its_revision(world):
    """S-A8: what was deleted after the compaction revision can still be read at it."""
    revisions = await history(world)
    await world.backend.compact(revisions[2])
    assert b"1" == (await world.get("b", revision=revisions[2])).value
    assert await world.get("b", revision=revisions[3]) is None


async def test_revision_of_zero_or_less_is_the_present(world):
    """S-A8: a read at revision 0 or below is a read of the present."""
    revisions = await history(world)
    await world.backend.compact(revisions[2])
    for revision in (0, -1, -7):
        assert b"2" == (await world.get("a", revision=revision)).value


async def test_compaction_answers_the_stores_revision(world):
    """S-A14: compaction answers the store's revision, not the one compacted."""
    revisions = await history(world)
    assert revisions[-1] == await world.backend.compact(revisions[1])


async def test_compaction_of_the_future_is_refused(world):
    """S-A14: a revision that is not reached can not be compacted."""
    last = await world.put("a")
    with pytest.raises(FutureRevisionError, match="required revision is a future revision"):
        await world.backend.compact(last + 1)


async def test_compaction_twice_is_told_so(world):
    """S-A14: compacting the same revision again, or a lower one, or 0, is a compacted error."""
    last = await world.put("a")
    await world.backend.compact(last)
    for revision in (last, last - 1, 0):
        with pytest.raises(CompactedError, match="required revision has been compacted"):
            await world.backend.compact(revision)


async def test_revision_0_can_be_compacted_once(fresh):
    """S-A14: in a store that was never compacted revision 0 is accepted once, a lower one never."""
    await fresh.put("a")
    with pytest.raises(CompactedError):
        await fresh.backend.compact(-1)
    assert 2 == await fresh.backend.compact(0)
    with pytest.raises(CompactedError):
        await fresh.backend.compact(0)
    assert b"v" == (await fresh.get("a", revision=2)).value


# ── keys and values ─────────────────────────────────────────────────────────────────────────────


async def test_keys_and_values_are_any_bytes(world):
    """S-A15: a key and a value may hold any bytes."""
    for blob in (b"\0", b"\xff", b"\xff\xff", b"a\0b", b"a/b c\n", bytes(range(256)), "ä€".encode()):
        await world.put(blob, blob)
        found = await world.get(blob)
        assert (world.key(blob), blob) == (found.key, found.value)


async def test_keys_are_ordered_by_bytes(world):
    """S-A15: keys are ordered as byte strings, unsigned."""
    names = [b"", b"\0", b"\0\0", b"A", b"a", b"a\0", b"ab", b"b", b"\x7f", b"\x80", b"\xff", b"\xff\0"]
    for name in reversed(names):
        await world.put(name)
    assert names == await world.names()


async def test_empty_value_is_not_absence(world):
    """S-A15: the empty value is a value, and differs from absence."""
    await world.put("a", b"")
    assert b"" == (await world.get("a")).value
    assert await world.get("b") is None


async def test_ignore_value_keeps_the_value(world):
    """S-A16: a put that ignores the value keeps the stored one, and is a change."""
    await world.put("a", b"kept")
    lease = await world.grant()
    modified = await world.put("a", b"", ignore_value=True, lease=lease)
    found = await world.get("a")
    assert (b"kept", modified, 2, lease) == (found.value, found.mod_revision, found.version, found.lease)


async def test_ignore_lease_keeps_the_lease(world):
    """S-A16: a put that ignores the lease keeps the key on it."""
    lease = await world.grant()
    await world.put("a", b"1", lease=lease)
    await world.put("a", b"2", ignore_lease=True)
    found = await world.get("a")
    assert (b"2", lease) == (found.value, found.lease)
    await world.backend.lease_revoke(lease)
    assert await world.get("a") is None


async def test_ignoring_needs_a_key(world):
    """S-A16: ignoring value or lease of a missing key is refused."""
    for put in (Put(world.key("a"), ignore_value=True), Put(world.key("a"), b"v", ignore_lease=True)):
        with pytest.raises(InvalidRequestError, match="etcdserver: key not found"):
            await world.apply(put)


async def test_ignoring_what_is_given_is_refused(world):
    """S-A16: a put can not both give and ignore a value, or a lease."""
    await world.put("a")
    lease = await world.grant()
    with pytest.raises(InvalidRequestError, match="etcdserver: value is provided"):
        await world.apply(Put(world.key("a"), b"v", ignore_value=True))
    with pytest.raises(InvalidRequestError, match="etcdserver: lease is provided"):
        await world.apply(Put(world.key("a"), b"v", lease=lease, ignore_lease=True))


async def test_empty_key_is_refused(world):
    """S-A13: an empty key is refused in reads, puts, deletes and compares, in either branch."""
    nothing = KeyRange(b"", b"\0")
    requests = (
        Txn(success=(Put(b"", b"v"),)),
        Txn(success=(DeleteRange(nothing),)),
        Txn(success=(Range(nothing),)),
        Txn((Compare.absent(b""),)),
        Txn(failure=(Put(b"", b"v"),)),
        Txn(failure=(Txn(failure=(Put(b""),)),)),
    )
    for request in requests:
        with pytest.raises(InvalidRequestError, match="etcdserver: key is not provided"):
            await world.backend.txn(request)
    with pytest.raises(InvalidRequestError, match="etcdserver: key is not provided"):
        await world.backend.range(Range(nothing))
