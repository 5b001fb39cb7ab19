"""State: versions, conditions, fences, TTLs, lists, and what each call costs."""

from __future__ import annotations

import pytest
import trio

from etcd_infra import (
    DELETE,
    CompactedError,
    ConflictError,
    Consistency,
    Entry,
    Fence,
    FencedError,
    FutureRevisionError,
    InvalidRequestError,
    SessionLostError,
    StorageFullError,
    UnavailableError,
)
from etcd_infra._etcd.model import KeyRange, Range, RangeResult
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import open_infra

KEY = b"test/state/k"


# ── reading and writing ─────────────────────────────────────────────────────────────────────────


async def test_set_and_get(infra, etcd, autojump_clock):
    """A value comes back with its version, which is the key's mod revision."""
    first = await infra.state.set("k", {"b": 1, "a": 2})
    version = await infra.state.set("k", [1])
    assert Entry("k", [1], version, first, 0) == await infra.state.get("k")
    assert version == (await etcd.get(KEY)).mod_revision > first
    assert b"[1]" == (await etcd.get(KEY)).value
    assert None is await infra.state.get("other")


async def test_typed_view(infra, autojump_clock):
    """A typed view decodes into its type; `type=` wins for one call."""
    numbers = infra.state.typed(list[int])
    await numbers.set("k", [1, 2])
    assert [1, 2] == (await numbers.get("k")).value
    assert {1, 2} == (await numbers.get("k", type=set[int])).value
    assert b"[1,2]" == (await numbers.get("k", type=bytes)).value


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("", ValueError),
        ("x" * 1025, ValueError),
        ("a\nb", ValueError),
        ("a\x00", ValueError),
        ("\ud800", ValueError),
        (b"k", TypeError),
        (None, TypeError),
        (7, TypeError),
    ],
)
async def test_bad_keys(infra, etcd, key, error, autojump_clock):
    """No operation takes an empty, over-long or unprintable key, or one that is no str; nothing is sent."""
    state = infra.state
    before = etcd.store.revision
    for attempt in (
        lambda: state.get(key),
        lambda: state.get_many([key]),
        lambda: state.set(key, 1),
        lambda: state.delete(key),
        lambda: state.update(key, lambda _: 1),
        lambda: state.get_or_set(key, lambda: 1),
        lambda: state.compare_and_swap(key, 1, expected_version=0),
    ):
        with pytest.raises(error):
            await attempt()
    with pytest.raises(error):
        infra.counter(key)
    if key != "":
        with pytest.raises(error):
            state.list(key)
    if key is not None:
        with pytest.raises(error):
            state.watch(key)
    assert before == etcd.store.revision


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"ttl": 0}, ValueError, "0"),
        ({"ttl": -5}, ValueError, "-5"),
        ({"ttl": True}, TypeError, "True"),
        ({"ttl": 30.0}, TypeError, "30.0"),
        ({"ttl": "30"}, TypeError, "30"),
        ({"ttl": 10**12}, ValueError, "1000000000000"),
        ({"fence": "token 7"}, TypeError, "token 7"),
        ({"fence": Fence("job", 7, "", ())}, ValueError, "no proof"),
    ],
)
async def test_bad_options_of_writes(infra, etcd, arguments, error, says, autojump_clock):
    """TTLs that are none, and fences that guard nothing, are refused with their value in the text."""
    before, leases = etcd.store.revision, await etcd.lease_list()
    with pytest.raises(error, match=says):
        await infra.state.set("k", 1, **arguments)
    with pytest.raises(error, match=says):
        await infra.state.compare_and_swap("k", 1, expected_version=0, **arguments)
    assert before == etcd.store.revision
    assert leases == await etcd.lease_list()


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        (lambda state: state.get("k", min_revision=-1), ValueError),
        (lambda state: state.get("k", min_revision=True), TypeError),
        (lambda state: state.get("k", consistency="eventual"), ValueError),
        (lambda state: state.get_many("abc"), TypeError),
        (lambda state: state.delete("k", expected_version=0), ValueError),
        (lambda state: state.delete("k", expected_version="1"), TypeError),
        (lambda state: state.compare_and_swap("k", 1), TypeError),
        (lambda state: state.compare_and_swap("k", 1, expected_version=1, expected_value=2), TypeError),
        (lambda state: state.compare_and_swap("k", 1, expected_version=-1), ValueError),
        (lambda state: state.compare_and_swap("k", 1, expected_version=1.0), TypeError),
    ],
)
async def test_bad_arguments(infra, etcd, attempt, error, autojump_clock):
    """Arguments that make no sense are refused before anything is sent."""
    before = etcd.store.revision
    with pytest.raises(error):
        await attempt(infra.state)
    assert before == etcd.store.revision


async def test_watch_takes_a_key_or_a_prefix(infra, autojump_clock):
    """Neither and both are refused."""
    with pytest.raises(TypeError):
        infra.state.watch()
    with pytest.raises(TypeError):
        infra.state.watch("k", prefix="k")


async def test_huge_value_is_refused(infra, etcd, autojump_clock):
    """A value over etcd's limit for requests is refused by etcd; nothing is written, and the next write works."""
    with pytest.raises(InvalidRequestError):
        await infra.state.set("k", "x" * 1_600_000)
    assert None is await etcd.get(KEY)
    assert await infra.state.set("k", "x" * 1_000_000)


@pytest.mark.parametrize("consistency", Consistency)
async def test_everything_is_a_checkpoint(infra, consistency, autojump_clock):
    """Every operation can be cancelled, also one that has nothing to do."""
    state = infra.state
    await state.set("k", 1)
    for attempt in (
        lambda: state.get("k", consistency=consistency),
        lambda: state.get_many([]),
        lambda: state.get_many(["k"]),
        lambda: state.set("k", 1),
        lambda: state.delete("absent"),
        lambda: state.update("k", lambda _: 1),
        lambda: state.update("absent", lambda _: DELETE),
        lambda: state.get_or_set("k", lambda: 1),
        lambda: state.compare_and_swap("k", 1, expected_value=2),
        lambda: anext(state.list("")),
        lambda: infra.counter("n").add(),
        lambda: infra.counter("n").get(),
    ):
        with trio.CancelScope() as scope:
            scope.cancel()
            await attempt()
        assert scope.cancelled_caught


async def test_round_trips(etcd, autojump_clock):
    """Each operation costs what its docstring says."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        state = infra.state
        counter = infra.counter("n")

        async def cost(awaitable):
            recording.calls.clear()
            await awaitable
            await trio.lowlevel.checkpoint()
            return recording.verbs()

        assert ["txn"] == await cost(state.set("k", 1))
        assert ["lease_grant", "txn"] == await cost(state.set("ttl", 1, ttl=30))
        assert ["range"] == await cost(state.get("k"))
        assert ["txn"] == await cost(state.get_many(["k", "x"]))
        assert ["txn"] == await cost(state.get_many(map(str, range(4096))))
        assert ["txn", "txn"] == await cost(state.get_many(map(str, range(4097))))
        assert ["range"] == await cost(state.get_or_set("k", lambda: 1))
        assert ["range", "txn"] == await cost(state.get_or_set("new", lambda: 1))
        assert ["range", "txn"] == await cost(state.update("k", lambda value: value + 1))
        assert ["txn"] == await cost(state.compare_and_swap("k", 1, expected_version=1))
        assert ["range", "txn"] == await cost(state.compare_and_swap("k", 1, expected_value=2))
        assert ["range"] == await cost(state.compare_and_swap("k", 1, expected_value=2))
        assert ["txn"] == await cost(state.delete("k"))
        assert ["txn"] == await cost(state.delete("k"))
        assert ["txn"] == await cost(counter.add())
        assert ["txn"] == await cost(counter.add())
        assert ["txn", "txn"] == await cost(infra.counter("new").add())
        assert ["range"] == await cost(counter.get())


async def test_operations_are_counted(infra, autojump_clock):
    """`state_operations` counts each operation on state and counters."""
    await infra.state.set("k", 1)
    await infra.state.get("k")
    await infra.counter("n").add()
    async with infra.open_write_behind() as behind:
        await behind.set("k", 2)
    assert 4 == infra.metrics()["state_operations"]


# ── versions and conditions ─────────────────────────────────────────────────────────────────────


async def test_delete_tells_whether_it_was_there(infra, autojump_clock):
    """True if the key was there, False if not."""
    await infra.state.set("k", 1)
    assert True is await infra.state.delete("k")
    assert False is await infra.state.delete("k")


async def test_delete_of_an_expected_version(infra, etcd, autojump_clock):
    """A changed key is a conflict that says its version; an absent one is False; the right one is deleted."""
    old = await infra.state.set("k", 1)
    new = await infra.state.set("k", 2)
    with pytest.raises(ConflictError, match=str(new)) as caught:
        await infra.state.delete("k", expected_version=old)
    assert ("k", new) == (caught.value.key, caught.value.version)
    assert (await etcd.get(KEY)) is not None
    assert True is await infra.state.delete("k", expected_version=new)
    assert False is await infra.state.delete("k", expected_version=new)


async def test_aba_by_version(infra, autojump_clock):
    """A key that was deleted and created anew as often as before is not mistaken for the old one."""
    first = await infra.state.set("k", "a")
    second = await infra.state.set("k", "b")
    await infra.state.delete("k")
    await infra.state.set("k", "a")
    now = await infra.state.set("k", "b")
    for old in (first, second):
        result = await infra.state.compare_and_swap("k", "c", expected_version=old)
        assert (False, now, "b") == (result.swapped, result.version, result.current_value)


async def test_aba_by_value_is_what_a_value_compare_means(infra, autojump_clock):
    """A value compare does not notice that the value was another one in between: that is documented."""
    await infra.state.set("k", "idle")
    await infra.state.set("k", "busy")
    await infra.state.set("k", "idle")
    assert (await infra.state.compare_and_swap("k", "taken", expected_value="idle")).swapped


async def test_absent_is_version_zero_and_not_an_empty_value(infra, autojump_clock):
    """Create-if-absent works on a missing key, and tells it from an empty value."""
    assert (await infra.state.compare_and_swap("k", b"", expected_version=0)).swapped
    result = await infra.state.typed(bytes).compare_and_swap("k", b"x", expected_version=0)
    assert (False, b"") == (result.swapped, result.current_value)
    result = await infra.state.compare_and_swap("absent", 1, expected_version=5)
    assert (False, 0, None) == (result.swapped, result.version, result.current_value)


async def test_value_compare_sees_through_formatting(infra, autojump_clock):
    """A value that somebody stored with spaces and another order of keys equals its canonical form."""
    await infra.backend.put(KEY, b'{ "b": 1,  "a": 2 }')
    assert (await infra.state.compare_and_swap("k", 1, expected_value={"a": 2, "b": 1})).swapped


class Meddling(Wrapping):
    """Runs `before_txn` before the next writing Txn."""

    before_txn = None

    async def around(self, verb, request, call):
        if verb == "txn" and not request.is_read_only and self.before_txn is not None:
            meddle, self.before_txn = self.before_txn, None
            await meddle()
        return await call()


async def test_value_compare_goes_on_while_the_value_is_the_same(etcd, autojump_clock):
    """The same value written in between is no reason to refuse a value compare; another value is."""
    backend = Meddling(etcd.node("one"))
    async with open_infra(backend) as infra:
        await infra.state.set("k", 1)
        backend.before_txn = lambda: etcd.put(KEY, b"1")
        assert (await infra.state.compare_and_swap("k", 2, expected_value=1)).swapped
        backend.before_txn = lambda: etcd.put(KEY, b"9")
        result = await infra.state.compare_and_swap("k", 3, expected_value=2)
        assert (False, 9) == (result.swapped, result.current_value)
        await infra.state.set("k", 2)
        backend.before_txn = lambda: etcd.delete(KeyRange.one(KEY))
        result = await infra.state.compare_and_swap("k", 3, expected_value=2)
        assert (False, 0) == (result.swapped, result.version)


async def test_get_or_set_races(etcd, autojump_clock):
    """Of 20 callers on two nodes one creates; all return the one entry; each factory runs at most once."""
    runs = []

    async def factory(number):
        runs.append(number)
        await trio.sleep(0.01)
        return number

    found = []
    async with open_infra(etcd.node("one")) as one, open_infra(etcd.node("two"), seed=2) as two:

        async def call(infra, number):
            found.append(await infra.state.get_or_set("k", lambda: factory(number)))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(call, (one, two)[number % 2], number)
        assert found[0] == await one.state.get("k")
    assert 1 == len({(entry.version, entry.value) for entry in found})
    assert len(runs) == len(set(runs))


async def test_get_or_set_takes_what_appeared_meanwhile(etcd, autojump_clock):
    """A key that appears between look and write is returned, not replaced."""
    backend = Meddling(etcd.node("one"))
    async with open_infra(backend) as infra:
        backend.before_txn = lambda: etcd.put(KEY, b"7")
        assert 7 == (await infra.state.get_or_set("k", lambda: 1)).value


# ── update ──────────────────────────────────────────────────────────────────────────────────────


async def test_update_runs_again_on_conflict(etcd, autojump_clock):
    """20 tasks on two nodes update one key: no update is lost."""
    async with open_infra(etcd.node("one")) as one, open_infra(etcd.node("two"), seed=2) as two:

        async def add(infra):
            entry = await infra.state.update("k", lambda value: (value or 0) + 1)
            assert entry.value >= 1

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(add, (one, two)[number % 2])
        assert 20 == (await one.state.get("k")).value


async def test_update_returns_the_new_entry(infra, autojump_clock):
    """The entry is what a read would show."""
    created = await infra.state.update("k", lambda value: [value])
    assert created == await infra.state.get("k")

    async def slowly(value):
        await trio.sleep(1)
        return [*value, 2]

    assert [None, 2] == (await infra.state.update("k", slowly)).value
    entry = await infra.state.update("k", lambda value: value)
    assert entry == await infra.state.get("k")
    assert entry.create_revision == created.create_revision


async def test_update_deletes(infra, etcd, autojump_clock):
    """Returning DELETE deletes; of an absent key it is nothing."""
    await infra.state.set("k", 1)
    assert None is await infra.state.update("k", lambda _: DELETE)
    assert None is await etcd.get(KEY)
    assert None is await infra.state.update("k", lambda _: DELETE)


async def test_update_never_deletes_what_its_function_has_not_seen(etcd, autojump_clock):
    """A key that changes between read and delete is shown to the function again."""
    backend = Meddling(etcd.node("one"))
    seen = []

    def function(value):
        seen.append(value)
        return DELETE if value == 1 else value

    async with open_infra(backend) as infra:
        await infra.state.set("k", 1)
        backend.before_txn = lambda: etcd.put(KEY, b"2")
        assert 2 == (await infra.state.update("k", function)).value
        assert [1, 2] == seen


async def test_updates_own_exception_passes(infra, etcd, autojump_clock):
    """The function's exception leaves as it is, after one run, and nothing is written."""
    before = etcd.store.revision
    runs = []

    def refuse(value):
        runs.append(value)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await infra.state.update("k", refuse)
    assert [None] == runs
    assert before == etcd.store.revision


async def test_update_waits_for_a_prepared_transaction(infra, etcd, autojump_clock):
    """A write to a key with an intent waits until the intent is gone, and is not lost."""
    await etcd.put(b"test/intent/k", b"some-transaction")
    done = []

    async def write():
        await infra.state.update("k", lambda _: 1)
        done.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await etcd.delete(KeyRange.one(b"test/intent/k"))
    assert 1 == len(done)
    assert b"1" == (await etcd.get(KEY)).value


# ── fences ──────────────────────────────────────────────────────────────────────────────────────


async def test_every_write_takes_a_fence(infra, etcd, autojump_clock):
    """Under a living fence each write works; under a dead one each is a FencedError, and nothing is written."""
    state = infra.state

    def writes(fence):
        return (
            lambda: state.set("k", 1, fence=fence),
            lambda: state.set("k", 1, ttl=9, fence=fence),
            lambda: state.update("k", lambda _: 1, fence=fence),
            lambda: state.update("k", lambda _: DELETE, fence=fence),
            lambda: state.get_or_set("new", lambda: 1, fence=fence),
            lambda: state.compare_and_swap("k", 1, expected_version=0, fence=fence),
            lambda: state.compare_and_swap("k", 2, expected_value=1, fence=fence),
            lambda: state.delete("k", fence=fence),
            lambda: state.delete("k", expected_version=1, fence=fence),
        )

    hold = await infra.lock("job").acquire()
    for write in writes(hold.fence):
        await write()
    await hold.release()
    await state.set("k", 1)
    await state.delete("new")
    before, leases = etcd.store.snapshot().kvs, await etcd.lease_list()
    for write in writes(hold.fence):
        with pytest.raises(FencedError, match="job"):
            await write()
    await trio.sleep(1)
    assert [kv for kv in before if b"/state/" in kv.key] == [
        kv for kv in etcd.store.snapshot().kvs if b"/state/" in kv.key
    ]
    assert leases == await etcd.lease_list()


# ── TTLs ────────────────────────────────────────────────────────────────────────────────────────


async def test_ttl_ends_a_key(infra, etcd, autojump_clock):
    """A key with a TTL goes by itself, and its lease with it."""
    leases = await etcd.lease_list()
    await infra.state.set("k", 1, ttl=5)
    entry = await infra.state.get("k")
    assert entry.lease not in leases
    await trio.sleep(4)
    assert (await infra.state.get("k")) is not None
    await trio.sleep(2)
    assert None is await infra.state.get("k")
    assert leases == await etcd.lease_list()


async def test_update_keeps_the_ttl(infra, etcd, autojump_clock):
    """Put without lease: an update, a swap and an add of a key with a TTL do not make it immortal."""
    await infra.state.set("k", 1, ttl=5)
    entry = await infra.state.update("k", lambda value: value + 1)
    assert entry.lease == (await etcd.get(KEY)).lease != 0
    assert (await infra.state.compare_and_swap("k", 3, expected_version=entry.version)).swapped
    assert (await infra.state.compare_and_swap("k", 4, expected_value=3)).swapped
    assert 5 == await infra.counter("k").add()
    await infra.counter("k").reset(1)
    assert 2 == await infra.counter("k").add()
    assert entry.lease == (await etcd.get(KEY)).lease
    await trio.sleep(6)
    assert None is await etcd.get(KEY)


async def test_set_without_ttl_ends_the_ttl(infra, etcd, autojump_clock):
    """`set` says all about a key: without ttl= it stays, and the old lease goes."""
    leases = await etcd.lease_list()
    await infra.state.set("k", 1, ttl=5)
    await infra.state.set("k", 2)
    await trio.sleep(0.1)
    assert leases == await etcd.lease_list()
    await trio.sleep(10)
    assert 2 == (await infra.state.get("k")).value


async def test_replaced_ttls_leave_no_leases(infra, etcd, autojump_clock):
    """1,000 writes of one key with a TTL of a day leave one lease; deleting the key leaves none."""
    leases = await etcd.lease_list()
    for number in range(1000):
        await infra.state.set("k", number, ttl=86_400)
    await trio.sleep(0.1)
    assert 1 == len(set(await etcd.lease_list()) - set(leases))
    assert 999 == (await infra.state.get("k")).value
    await infra.state.delete("k")
    await trio.sleep(0.1)
    assert leases == await etcd.lease_list()


async def test_foreign_lease_is_left_alone(infra, etcd, autojump_clock):
    """A key that hung on somebody else's lease is replaced; that lease lives on."""
    await etcd.lease_grant(60, lease=77)
    await etcd.put(KEY, b"1", lease=77)
    await infra.state.set("k", 2)
    await trio.sleep(1)
    assert 77 in await etcd.lease_list()


async def test_failed_swaps_leave_no_lease(infra, etcd, autojump_clock):
    """1,000 swaps with a TTL that are refused leave no lease."""
    await infra.state.set("k", 1)
    leases = await etcd.lease_list()
    for _ in range(1000):
        assert not (await infra.state.compare_and_swap("k", 2, expected_version=1, ttl=60)).swapped
    await trio.sleep(0.1)
    assert leases == await etcd.lease_list()


async def test_full_store_leaves_no_lease(etcd, autojump_clock):
    """A write that etcd refuses, as it is full since the lease was granted, raises that, and its lease goes."""
    backend = Meddling(etcd.node("one"))
    async with open_infra(backend) as infra:
        leases = await etcd.lease_list()

        async def fill():
            etcd.store.full = True

        backend.before_txn = fill
        with pytest.raises(StorageFullError):
            await infra.state.set("k", 1, ttl=60)
        await trio.sleep(0.1)
        assert leases == await etcd.lease_list()
        etcd.store.full = False
        assert await infra.state.set("k", 1)


async def test_lease_that_ends_before_the_write_is_granted_anew(etcd, autojump_clock):
    """The TTL's lease dies between grant and put: another one is granted, and the write succeeds."""
    backend = Meddling(etcd.node("one"))
    async with open_infra(backend) as infra:
        mine = set(await etcd.lease_list())

        async def end_lease():
            for lease in set(await etcd.lease_list()) - mine:
                await etcd.lease_revoke(lease)

        backend.before_txn = end_lease
        await infra.state.set("k", 1, ttl=5)
        entry = await infra.state.get("k")
        assert 5 == (await etcd.lease_time_to_live(entry.lease)).granted_ttl


async def test_ttl_counts_from_the_write(etcd, autojump_clock):
    """A write that comes through long after its lease was granted gets its whole TTL."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        faulty.only = lambda verb, request: verb == "txn" and not request.is_read_only
        faulty.delay_next(6)
        await infra.state.set("k", 1, ttl=10)
        left = (await etcd.lease_time_to_live((await infra.state.get("k")).lease)).ttl
        assert left >= 9


# ── many and lists ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [0, 1, 64, 65, 128, 129, 4096, 5000])
async def test_get_many(infra, count, autojump_clock):
    """Any number of keys is read at once, absent ones as None, in the order asked for."""
    for number in (0, 5, 64, 128, 4097):
        await infra.state.set(str(number), number)
    keys = [str(number) for number in reversed(range(count))]
    found = await infra.state.get_many(keys)
    assert keys == list(found)
    there = {key: entry.value for key, entry in found.items() if entry}
    assert {str(number): number for number in (0, 5, 64, 128, 4097) if number < count} == there


async def test_get_many_is_one_revision(etcd, autojump_clock):
    """Beyond one round trip, later reads are pinned to the first one's revision."""

    class Between(Wrapping):
        reads = 0

        async def around(self, verb, request, call):
            if verb == "txn" and request.is_read_only:
                self.reads += 1
                if self.reads == 2:
                    await etcd.put(b"test/state/4999", b"2")
            return await call()

    backend = Between(etcd.node("one"))
    async with open_infra(backend) as infra:
        await infra.state.set("0", 1)
        await infra.state.set("4999", 1)
        backend.reads = 0
        found = await infra.state.get_many(map(str, range(5000)))
        assert 2 == backend.reads
        assert (1, 1) == (found["0"].value, found["4999"].value)


async def test_list_is_pinned_to_one_revision(infra, etcd, autojump_clock):
    """What is written while a list is read does not show in it: neither new, nor changed, nor deleted keys."""
    for number in range(600):
        await etcd.put(b"test/state/order/%03d" % number, b"%d" % number)
    await infra.state.set("orders", "no part of it")
    listed = []
    listing = infra.state.list("order/")
    async for entry in listing:
        if entry.value == 10:
            await etcd.delete(KeyRange.one(b"test/state/order/599"))
            await etcd.put(b"test/state/order/300", b'"changed"')
            await etcd.put(b"test/state/order/9", b'"new"')
        listed.append(entry.value)
    assert list(range(600)) == listed
    assert listing.revision < etcd.store.revision
    with pytest.raises(StopAsyncIteration):
        await anext(listing)


async def test_list_of_compacted_history(infra, etcd, autojump_clock):
    """A list whose revision is compacted under way raises CompactedError; nothing is skipped silently."""
    for number in range(300):
        await etcd.put(b"test/state/%03d" % number, b"0")
    listing = infra.state.list("")
    await anext(listing)
    await etcd.put(b"x", b"")
    await etcd.compact(etcd.store.revision)
    with pytest.raises(CompactedError):
        async for _ in listing:
            pass


async def test_list_can_be_left(infra, autojump_clock):
    """Leaving a list early leaves nothing behind, and warns of nothing."""
    for number in range(5):
        await infra.state.set(f"k/{number}", number)
    async for entry in infra.state.list("k/"):
        assert 0 == entry.value
        break
    assert [] == [entry async for entry in infra.state.list("nothing/")]


# ── consistency ─────────────────────────────────────────────────────────────────────────────────


class Lagging(Wrapping):
    """Serializable reads, or with `all_reads` all, are answered as of revision `at` while it is set."""

    at = 0
    all_reads = False

    def __init__(self, inner):
        super().__init__(inner)
        self.asked = []

    async def range(self, request: Range, /) -> RangeResult:
        self.asked.append(request.serializable)
        if self.at and (request.serializable or self.all_reads):
            found = await self.inner.range(
                Range(request.range, revision=self.at, serializable=request.serializable)
            )
            return RangeResult(found.kvs, found.count, found.more, self.at)
        return await super().range(request)


async def test_serializable_read_asks_one_member(etcd, autojump_clock):
    """SERIALIZABLE sets etcd's flag and may answer from the past; LINEARIZABLE does not."""
    backend = Lagging(etcd.node("one"))
    async with open_infra(backend) as infra:
        backend.at = old = await infra.state.set("k", "old")
        new = await infra.state.set("k", "new")
        backend.asked.clear()
        assert "old" == (await infra.state.get("k", consistency=Consistency.SERIALIZABLE)).value
        assert "new" == (await infra.state.get("k")).value
        assert [True, False] == backend.asked
        backend.asked.clear()
        entry = await infra.state.get("k", consistency=Consistency.SERIALIZABLE, min_revision=new)
        assert "new" == entry.value
        assert [True, False] == backend.asked
        assert "old" == (await infra.state.get("k", consistency="serializable", min_revision=old)).value


async def test_min_revision_of_the_future(infra, etcd, autojump_clock):
    """A revision that the store has not reached is a FutureRevisionError, after a few tries."""
    await infra.state.set("k", 1)
    assert 1 == (await infra.state.get("k", min_revision=etcd.store.revision)).value
    with pytest.raises(FutureRevisionError, match="1000"):
        await infra.state.get("k", min_revision=1000)


async def test_stale_linearizable_read_is_asked_again(etcd, autojump_clock):
    """Read your writes: a linearizable answer from before `min_revision` is not believed."""
    backend = Lagging(etcd.node("one"))
    async with open_infra(backend) as infra:
        backend.at = await infra.state.set("k", "old")
        new = await infra.state.set("k", "new")
        backend.all_reads = True

        async def recover():
            await trio.sleep(0.1)
            backend.at = 0

        async with trio.open_nursery() as nursery:
            nursery.start_soon(recover)
            assert "new" == (await infra.state.get("k", min_revision=new)).value


async def test_serializable_reads_need_no_session(etcd, autojump_clock):
    """Without a session reads go on, and writes wait for the next one."""
    node = etcd.node("one")
    async with open_infra(node) as infra:
        await infra.state.set("k", 1)
        await etcd.lease_revoke(infra.session.lease.id)
        infra.session.lose(SessionLostError("for the test"))
        assert 1 == (await infra.state.get("k", consistency=Consistency.SERIALIZABLE)).value
        assert await infra.state.set("k", 2)


async def test_unreachable_store(etcd, autojump_clock):
    """Reads of a store that can not be reached raise UnavailableError after five seconds."""
    node = etcd.node("one")
    async with open_infra(node) as infra:
        node.partition()
        with pytest.raises(UnavailableError):
            await infra.state.get("k")
        node.heal()


async def test_closed_coordinator(etcd, autojump_clock):
    """After the coordinator's end writes raise SessionLostError; nothing is written."""
    async with open_infra(etcd.node("one")) as infra:
        await infra.state.set("k", 1)
    before = etcd.store.revision
    for write in (
        infra.state.set("k", 2),
        infra.state.delete("k"),
        infra.counter("n").add(),
    ):
        with pytest.raises(SessionLostError):
            await write
    assert before == etcd.store.revision


async def test_inspect_state(etcd, autojump_clock):
    """`inspect("state")` lists keys with version, lease, TTL, size and how the value begins."""
    async with open_infra(etcd.node("one")) as infra:
        version = await infra.state.set("order/1", {"a": "x" * 100})
        await infra.state.set("order/2", 1, ttl=30)
        await infra.state.set("raw", b"\x00\xff")
        one, two = await infra.inspect("state", "order/")
        assert ("order/1", version, None, None, 108) == (
            one.key,
            one.version,
            one.lease,
            one.ttl,
            one.size_bytes,
        )
        assert one.preview.startswith('{"a":"xxx')
        assert one.preview.endswith("…")
        entry = await infra.state.get("order/2")
        assert (f"{entry.lease:x}", 30) == (two.lease, two.ttl)
        everything = await infra.inspect("state")
        assert ["order/1", "order/2", "raw"] == [info.key for info in everything]
        assert "b'\\x00\\xff'" == everything[2].preview


async def test_namespaces_do_not_mix(autojump_clock):
    """Two namespaces on one store do not see each other's keys, nor does one whose name is a prefix."""
    etcd = MemoryEtcd()
    async with open_infra(etcd, namespace="a") as one, open_infra(etcd, namespace="ab", seed=2) as two:
        await one.state.set("k", 1)
        assert None is await two.state.get("k")
        assert [] == [entry async for entry in two.state.list("")]
