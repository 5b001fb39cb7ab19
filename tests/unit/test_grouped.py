"""Group commit: what travels together, and that each is answered as if it had been sent alone."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager

import pytest
import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Put, Range, Txn
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra._wrappers.footprint import Footprint
from etcd_infra._wrappers.grouped import GROUP_MEMBERS, ON_THEIR_WAY, Grouped
from etcd_infra.errors import InvalidRequestError, OutcomeUnknownError, StorageFullError, UnavailableError
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend

LINE = KeyRange.prefix(b"line/")


class Gate(Wrapping):
    """Lets a Txn through when it is told to; counts the members of each."""

    def __init__(self, inner):
        super().__init__(inner)
        self.sizes = []
        self.errors = []
        self.open = trio.Event()

    async def around(self, verb, request, call):
        """See `Wrapping`."""
        if verb == "txn":
            nested = [op for op in request.success if isinstance(op, Txn)]
            self.sizes.append(len(nested) or 1)
            await self.open.wait()
            if nested and self.errors:
                raise self.errors.pop(0)
        return await call()


@asynccontextmanager
async def grouped(etcd, **options):
    """Open the backend under test in front of a gate."""
    gate = Gate(etcd.node("one"))
    async with open_background() as background:
        yield Grouped(gate, background, **options), gate


async def send_all(backend, gate, requests):
    """Send all at once; open the gate when they wait; return the outcomes in order."""
    outcomes = [None] * len(requests)

    async def send(number, request):
        try:
            outcomes[number] = await backend.txn(request)
        except Exception as error:  # noqa: BLE001 - an outcome, too
            outcomes[number] = error

    async with trio.open_nursery() as nursery:
        for number, request in enumerate(requests):
            nursery.start_soon(send, number, request)
            await trio.testing.wait_all_tasks_blocked()
        gate.open.set()
    return outcomes


def put(key, value=b"v"):
    return Txn((Compare.absent(key),), (Put(key, value),), (Range(KeyRange.one(key)),))


async def test_few_are_sent_as_they_are(etcd, autojump_clock):
    """Four transactions at once are four calls."""
    async with grouped(etcd) as (backend, gate):
        await send_all(backend, gate, [put(b"%d" % number) for number in range(ON_THEIR_WAY)])
        assert [1] * ON_THEIR_WAY == gate.sizes


async def test_those_that_an_answer_wakes_leave_together(etcd, autojump_clock):
    """Tasks that go on in one turn of the loop share a departure, although there is room for several."""
    async with grouped(etcd) as (backend, gate):
        go = trio.Event()

        async def send(number):
            await go.wait()
            await backend.txn(put(b"k%d" % number))

        async with trio.open_nursery() as nursery:
            for number in range(9):
                nursery.start_soon(send, number)
            await trio.testing.wait_all_tasks_blocked()
            go.set()
            await trio.testing.wait_all_tasks_blocked()
            gate.open.set()
        assert [1, 8] == gate.sizes


async def test_reads_neither_wait_nor_make_others_wait(etcd, autojump_clock):
    """A read-only transaction on its way is no reason for a write to look for company."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        await send_all(backend, gate, [Txn((), (Range(LINE),)), put(b"k0"), put(b"k1"), put(b"k2")])
        assert [1, 1, 2] == gate.sizes


async def test_many_travel_together_and_are_answered_each(etcd, autojump_clock):
    """What waits leaves as one Txn: each has its own answer, at the group's revision."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        await etcd.put(b"k7", b"old")
        outcomes = await send_all(backend, gate, [put(b"k%d" % number) for number in range(10)])
        assert [1, 9] == gate.sizes
        assert [number != 7 for number in range(10)] == [outcome.succeeded for outcome in outcomes]
        assert b"old" == outcomes[7].results[0].kvs[0].value
        assert {etcd.store.revision} == {outcome.revision for outcome in outcomes[1:]}
        for number in (1, 9):
            assert outcomes[number].revision == (await etcd.get(b"k%d" % number)).mod_revision


async def test_group_is_bounded(etcd, autojump_clock):
    """A group has at most 32 members; the rest leaves with the next one."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        await send_all(backend, gate, [put(b"k%03d" % number) for number in range(50)])
        assert [1, GROUP_MEMBERS, 50 - 1 - GROUP_MEMBERS] == gate.sizes


async def test_two_places_in_one_line_never_share_a_revision(etcd, autojump_clock):
    """Joins of one line are sent one after the other, each with a token of its own."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        joins = [
            Txn((Compare.absent(b"line/%d" % number),), (Put(b"line/%d" % number), Range(LINE, limit=2)))
            for number in range(8)
        ]
        outcomes = await send_all(backend, gate, joins)
        assert 8 == len({outcome.revision for outcome in outcomes})
        assert list(range(1, 9)) == [outcome.results[1].count for outcome in outcomes]
        assert 1 == max(gate.sizes)


CASES = [
    ("two puts of one key", put(b"a"), put(b"a"), False),
    ("other keys", put(b"a"), put(b"b"), True),
    ("a compare of what is written", put(b"a"), Txn((Compare.absent(b"a"),), (Put(b"b"),)), False),
    ("a range compare", put(b"line/1"), Txn((Compare.nothing_in(LINE),), (Put(b"b"),)), False),
    ("a read of what is written", put(b"a"), Txn((), (Put(b"b"), Range(KeyRange.one(b"a")))), False),
    ("a read in the other branch", put(b"a"), Txn((), (Put(b"b"),), (Range(KeyRange.one(b"a")),)), False),
    ("both read the same", Txn((), (Put(b"a"), Range(LINE))), Txn((), (Put(b"b"), Range(LINE))), True),
    ("a range delete over a read", Txn((), (DeleteRange(LINE),)), Txn((Compare.absent(b"line/1"),), (Put(b"b"),)), False),
    ("a range delete over a read range", Txn((), (DeleteRange(LINE),)), Txn((), (Put(b"b"), Range(LINE))), False),
    ("an open-ended delete", Txn((), (DeleteRange(KeyRange.since(b"a")),)), put(b"b"), False),
    ("an open-ended read", Txn((), (Put(b"0"), Range(KeyRange.since(b"a")))), put(b"b"), False),
    ("an open-ended read of later keys", Txn((), (Put(b"0"), Range(KeyRange.since(b"c")))), put(b"b"), True),
    ("two range deletes side by side", Txn((), (DeleteRange(KeyRange(b"a", b"b")),)), Txn((), (DeleteRange(KeyRange(b"b", b"c")),)), True),
    ("two range deletes that overlap", Txn((), (DeleteRange(KeyRange(b"a", b"c")),)), Txn((), (DeleteRange(KeyRange(b"b", b"d")),)), False),
    ("a nested write", Txn((), (Txn((), (), (Put(b"a"),)),)), put(b"a"), False),
    ("a nested compare", Txn((), (Txn((Compare.absent(b"a"),), (Put(b"c"),)),)), put(b"a"), False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "independent"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_what_has_nothing_to_do_with_each_other(one, other, independent):
    """Independent: neither writes what the other one reads or writes; the order does not matter."""
    assert independent is Footprint.of(one).is_independent_of(Footprint.of(other))
    assert independent is Footprint.of(other).is_independent_of(Footprint.of(one))


def test_weight_is_the_longest_list_of_each_level():
    """As etcd counts: the longest list of each level, added up."""
    nested = Txn((), (Txn((), tuple(Put(b"%d" % number) for number in range(5))), Put(b"x")))
    assert 2 + 5 == Footprint.of(nested).weight
    assert 0 == Footprint.of(Txn((), (DeleteRange(LINE),))).size


@pytest.mark.parametrize(
    "request_",
    [
        Txn((), (Range(LINE),)),
        Txn((), tuple(Put(b"%d" % number) for number in range(100))),
        Txn((), (Put(b"a", bytes(20_000)),)),
    ],
    ids=["read-only", "many operations", "large"],
)
async def test_what_is_no_companion_is_sent_at_once(etcd, autojump_clock, request_):
    """A read, a long and a large transaction do not wait for others."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        await send_all(backend, gate, [put(b"k0"), put(b"k1"), request_, put(b"k2")])
        assert [1, 1, 2] == gate.sizes


async def test_refused_group_is_sent_one_by_one(etcd, autojump_clock):
    """One bad member spoils the group: the others are applied once, and it alone gets its error."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        bad = Txn((), (Put(b"bad", lease=99),))
        outcomes = await send_all(backend, gate, [put(b"k0"), put(b"k1"), bad, put(b"k2")])
        assert [True, True, True] == [outcomes[number].succeeded for number in (0, 1, 3)]
        assert "lease" in str(outcomes[2])
        assert [1, 3, 1, 1, 1] == gate.sizes
        for key in (b"k1", b"k2"):
            assert 1 == (await etcd.get(key)).version


@pytest.mark.parametrize("error", [UnavailableError("nobody"), OutcomeUnknownError("a Txn")])
async def test_error_of_a_group_is_told_to_each(etcd, autojump_clock, error):
    """No answer, or surely none: each member learns it, with its own keys."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        gate.errors.append(error)
        outcomes = await send_all(backend, gate, [put(b"k%d" % number) for number in range(4)])
        for number in (1, 2, 3):
            assert type(error) is type(outcomes[number])
            if isinstance(error, OutcomeUnknownError):
                assert (b"k%d" % number,) == outcomes[number].keys
        assert outcomes[1] is not outcomes[2]


async def test_refused_groups_become_smaller_and_grow_again(etcd, autojump_clock):
    """A server whose budget is smaller than etcd's default is not asked in vain each time."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        gate.errors += [InvalidRequestError("too many operations")] * 2
        await send_all(backend, gate, [put(b"k%03d" % number) for number in range(100)])
        groups = [size for size in gate.sizes if size > 1]
        assert [32, 16, 8, 9] == groups[:4]


async def test_full_store_is_noticed_although_nested_puts_are_not_counted(etcd, autojump_clock):
    """Over quota etcd refuses puts, but not nested ones: a lone one finds out, and then no group puts any more."""

    class Full(Wrapping):
        full = True

        async def around(self, verb, request, call):
            """See `Wrapping`."""
            if verb == "txn" and self.full and any(isinstance(op, Put) for op in request.success):
                await trio.lowlevel.checkpoint()
                raise StorageFullError("no space")
            return await call()

    full = Full(etcd.node("one"))
    async with open_background() as background:
        backend = Grouped(full, background, on_their_way=1)
        refused = []

        async def write(number):
            for turn in range(20):
                try:
                    await backend.txn(put(b"%d/%d" % (number, turn)))
                except StorageFullError:
                    refused.append(turn)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(write, number)
        assert 16 * GROUP_MEMBERS > 400 - len(refused)
        assert 20 == refused.count(19)


@pytest.mark.parametrize("when", ["waiting", "on its way"])
async def test_cancelled_member_harms_nobody(etcd, autojump_clock, when):
    """One of a group is cancelled: before it leaves it is not sent; afterwards the others get their answers."""
    async with grouped(etcd, on_their_way=1) as (backend, gate):
        outcomes = []

        async def send(number):
            outcomes.append((await backend.txn(put(b"k%d" % number))).succeeded)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, 0)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(send, 1)
            with trio.move_on_after(0.001 if when == "waiting" else 1) as scope:
                await backend.txn(put(b"k2"))
            assert scope.cancelled_caught
            gate.open.set()
        assert [True, True] == outcomes
        assert (when == "waiting") is ((await etcd.get(b"k2")) is None)
        assert ([1, 1] if when == "waiting" else [1, 2]) == gate.sizes


async def test_group_that_nobody_waits_for_is_given_up(etcd, autojump_clock):
    """All members of a group are cancelled: so is its call."""
    cancelled = []

    class Stuck(Wrapping):
        async def around(self, verb, request, call):
            """See `Wrapping`."""
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                cancelled.append(len(request.success))
                raise

    async with open_background() as background:
        backend = Grouped(Stuck(etcd.node("one")), background, on_their_way=1)
        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(backend.txn, put(b"k%d" % number))
        await trio.testing.wait_all_tasks_blocked()
        assert [1, 3] == sorted(cancelled)


async def test_stuck_calls_hold_nobody_up(etcd, autojump_clock):
    """Those on their way get no answer: whoever waits leaves after ten milliseconds all the same."""

    class FirstIsStuck(Wrapping):
        stuck = 1

        async def around(self, verb, request, call):
            """See `Wrapping`."""
            if self.stuck:
                self.stuck -= 1
                await trio.sleep(5)
            return await call()

    async with open_background() as background:
        backend = Grouped(FirstIsStuck(etcd.node("one")), background, on_their_way=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.txn, put(b"k0"))
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(0.1):
                await backend.txn(put(b"k1"))


async def test_random_transactions_are_answered_as_if_sent_alone(autojump_clock):
    """100 seeds: counters and lines under faults and cancellations; every answered add counts once, tokens differ."""
    for seed in range(100):
        draws = random.Random(seed)
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        async with open_background() as background:
            backend = Grouped(RecordingBackend(faulty), background, on_their_way=draws.choice([1, 2]))
            await check_adds(etcd, backend, faulty, draws)


async def check_adds(etcd, backend, faulty, draws):
    told = {}
    maybe = {}

    async def add(key):
        seen = 0
        for _ in range(6):
            if draws.random() < 0.1:
                draws.choice([faulty.lose_next_answer, faulty.lose_next_request, faulty.refuse_next])()
            request = Txn((Compare.modified_at(key, seen),), (Put(key),), (Range(KeyRange.one(key)),))
            maybe[key] = maybe.get(key, 0) + 1
            try:
                with trio.move_on_after(draws.choice([0.0005, 0.1, 60])) as scope:
                    answer = await backend.txn(request)
            except UnavailableError:
                maybe[key] -= 1
                continue
            except OutcomeUnknownError:
                scope = None
            if scope is None or scope.cancelled_caught:
                seen = (await etcd.range(Range(KeyRange.one(key)))).kvs[0].mod_revision if seen else 0
                continue
            if answer.succeeded:
                told[key] = told.get(key, 0) + 1
                seen = answer.revision
            else:
                maybe[key] -= 1
                found = answer.results[0].kvs
                seen = found[0].mod_revision if found else 0

    keys = [b"k%d" % number for number in range(4)]
    async with trio.open_nursery() as nursery:
        for key in keys * 3:
            nursery.start_soon(add, key)
    for key in keys:
        found = await etcd.get(key)
        version = found.version if found else 0
        assert told.get(key, 0) <= version <= maybe.get(key, 0)
