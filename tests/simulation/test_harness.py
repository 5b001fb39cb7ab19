"""The simulation itself: clocks, pauses, kills, messages, phases, plans; each does what its name says."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest
import trio

from etcd_infra._etcd.model import KeyRange, Put, Txn
from etcd_infra.errors import CompactedError, EtcdError, OutcomeUnknownError, StoreResetError
from etcd_infra.testing import Counters, Fault, FaultKind, Hit, Settings, Strike, draw_plan, shrink, simulate
from etcd_infra.testing.simulation.clocks import NodeClock

ONE = Settings(nodes=("a",), seconds=20.0)


def play(program, *faults, settings=ONE, seed=1, **options):
    """Run a program under a plan made by hand."""
    return simulate(program, seed=seed, settings=settings, plan=faults, **options)


def invariants(run):
    """Name what was violated."""
    return [violation.invariant for violation in run.violations]


def noted(run, what):
    """Return the true times of one kind of note."""
    return [round(note.at, 2) for note in run.notes if note.what == what]


async def ticks(process):
    """Note every half second until it is calm."""
    while not process.calm:
        process.note("tick")
        await trio.sleep(0.5)
    await process.rest()


# ── clocks ──────────────────────────────────────────────────────────────────────────────────────


def test_clock_of_a_node():
    """A node's clocks begin anywhere, run at their rate, and differ by the time that was slept through."""
    clock = NodeClock(origin=100, rate=2)
    assert 120 == clock.monotonic(10)
    assert 15 == clock.to_true(130)
    clock.suspend(10)
    assert (120, 140, inf) == (clock.monotonic(20), clock.boot(20), clock.to_true(130))
    clock.resume(20)
    assert (120, 140, 25) == (clock.monotonic(20), clock.boot(20), clock.to_true(130))
    clock.set_rate(0.5, 20)
    assert 125 == clock.monotonic(30)


def test_deadlines_are_never_early():
    """At the true time of a deadline the node's clock shows the deadline or more, whatever the rounding."""
    draw = random.Random(1)
    for _ in range(2000):
        clock = NodeClock(origin=draw.uniform(0, 1e5), rate=draw.uniform(0.9, 1.1))
        shown = clock.monotonic(draw.uniform(0, 1e3)) + draw.uniform(0, 100)
        true = clock.to_true(shown)
        assert clock.monotonic(true) >= shown
        assert clock.monotonic(true - 1e-6) < shown


def test_program_sees_its_own_clock():
    """Two nodes' clocks have nothing in common; a fast one's sleeps are short in true time."""

    async def program(process):
        began = trio.current_time()
        process.note("began", shown=began)
        await trio.sleep(10)
        assert trio.current_time() >= began + 10
        process.note("slept")
        await process.rest()

    settings = replace(ONE, nodes=("a", "b"))
    run = play(program, Fault(FaultKind.CLOCK_RATE, 0.0, "a", number=999_999), settings=settings)
    assert [] == run.violations
    assert [9.26, 10.0] == noted(run, "slept")
    one, two = (note.facts["shown"] for note in run.notes if note.what == "began")
    assert 1 < abs(one - two)


# ── processes ───────────────────────────────────────────────────────────────────────────────────


def test_paused_process_does_not_run():
    """A paused process does nothing; time goes on for it, and its late timers fire when it goes on."""
    run = play(ticks, Fault(FaultKind.PAUSE, 2.2, "a", 5.0))
    assert not [at for at in noted(run, "tick") if 2.2 < at < 7.2]
    assert 7.2 in noted(run, "tick")
    assert [] == run.violations


def test_suspended_machine_stands_still():
    """A suspended machine's timers have as much left as before, and its boot-time clock shows what it missed."""

    async def program(process):
        boot, monotonic = process.boot_clock(), trio.current_time()
        await trio.sleep(4)
        process.note(
            "slept", boot=round(process.boot_clock() - boot), monotonic=round(trio.current_time() - monotonic)
        )
        await process.rest()

    run = play(program, Fault(FaultKind.SUSPEND, 2.0, "a", 10.0))
    (note,) = run.notes
    assert (14, {"boot": 14, "monotonic": 4}) == (round(note.at), note.facts)


def test_killed_process_is_gone():
    """A killed process does nothing any more, its clean-up included; its requests arrive, and a new one starts."""

    async def program(process):
        process.note("started", life=process.id)
        try:
            if process.id == "a#1":
                await trio.sleep(1.9999)
                await process.backend.put(b"k", b"")
                await trio.sleep(100)
        finally:
            process.note("cleaned up", life=process.id)
            if not process.calm:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                    await process.backend.put(b"clean-up", b"")
        await process.rest()

    run = play(program, Fault(FaultKind.KILL, 2.0, "a", 3.0))
    assert ["a#1", "a#2", "a#2"] == [note.facts["life"] for note in run.notes]
    assert [0.0, 5.0, 5.0] == noted(run, "started") + noted(run, "cleaned up")
    written = [(timed.origin, event.key) for timed in run.lineages[0] for event in timed.commit.events]
    assert [("a#1", b"k"), ("a#2", b"clean-up")] == written
    assert [] == run.violations


def test_cancel_strikes_interruptible_scopes_only():
    """A cancelling fault ends one scope that was opened for it, and nothing else."""

    async def program(process):
        with process.interruptible() as scope:
            await trio.sleep(10)
        process.note("cut", cancelled=scope.cancelled_caught)
        await trio.sleep(5)
        await process.rest()

    run = play(program, Fault(FaultKind.CANCEL, 3.0, "a"), Fault(FaultKind.CANCEL, 4.0, "a"))
    assert [(3.0, True)] == [(note.at, note.facts["cancelled"]) for note in run.notes]
    assert 1 == len(run.strikes)


# ── messages ────────────────────────────────────────────────────────────────────────────────────


async def one_write(process):
    """Write once, after a second; tell how it ended, and when."""
    await trio.sleep(1)
    try:
        revision = await process.backend.put(b"k", b"")
    except EtcdError as error:
        process.note("ended", error=type(error))
    else:
        process.note("ended", error=None, revision=revision)
    await trio.sleep(18)
    await process.rest()


@pytest.mark.parametrize(
    ("kind", "seconds", "error", "commits"),
    [
        (FaultKind.LOST_REQUEST, 0.0, OutcomeUnknownError, []),
        (FaultKind.LOST_ANSWER, 0.0, OutcomeUnknownError, [1]),
        (FaultKind.LATE, 12.0, OutcomeUnknownError, [13]),
        (FaultKind.DUPLICATE, 7.0, None, [1, 8]),
        (FaultKind.DELAYED_ANSWER, 3.0, None, [1]),
        (FaultKind.DELAYED_ANSWER, 9.0, OutcomeUnknownError, [1]),
    ],
)
def test_faults_of_messages(kind, seconds, error, commits):
    """A write is lost, applied without an answer, applied late or twice; its caller knows what a real one would."""
    run = play(one_write, Fault(kind, 0.5, "a", seconds))
    (note,) = run.notes
    assert error == note.facts["error"]
    assert commits == [int(timed.at) for timed in run.lineages[0]]
    assert 1 == len(run.strikes)


@pytest.mark.parametrize(
    ("kind", "written"),
    [(FaultKind.PARTITION, False), (FaultKind.CUT_REQUESTS, False), (FaultKind.CUT_ANSWERS, True)],
)
def test_partitions(kind, written):
    """While requests are cut a write is not applied; while only answers are, it is. Neither has an answer."""
    run = play(one_write, Fault(kind, 0.5, "a", 8.0))
    (note,) = run.notes
    assert OutcomeUnknownError is note.facts["error"]
    assert 6.0 == round(note.at, 1)
    assert written == (1 == len([timed for timed in run.lineages[0] if timed.at < 8]))


def test_no_quorum():
    """Without a quorum nothing is applied, no lease ends, and what has arrived is applied when it is back."""

    async def program(process):
        await process.backend.lease_grant(3, lease=7)
        await process.backend.put(b"leased", b"", lease=7)
        await one_write(process)

    run = play(program, Fault(FaultKind.NO_QUORUM, 0.5, "", 8.0))
    told = [(timed.at, timed.origin) for timed in run.lineages[0][1:]]
    assert [(8.5, "a#1"), (11.5, "expiry")] == told


def test_restore_begins_a_lineage():
    """A restore goes back, watches are told, and the history of both lineages is kept."""

    async def program(process):
        async with process.backend.watch(KeyRange.everything(), start_revision=1) as stream:
            for _ in range(6):
                await process.backend.put(b"k", b"")
                await trio.sleep(0.5)
            with pytest.raises(StoreResetError):
                while True:
                    await stream.receive()
            process.note("told")
        await process.rest()

    run = play(program, Fault(FaultKind.RESTORE, 3.9, "", 2.1))
    assert [[2, 3, 4, 5, 6, 7], [2, 3, 4, 5]] == [
        [timed.commit.revision for timed in lineage] for lineage in run.lineages
    ]
    assert 4.5 > noted(run, "told")[0] > 3.9


def test_compaction_is_told():
    """A watch that begins before the compaction is told so."""

    async def program(process):
        for _ in range(3):
            await process.backend.put(b"k", b"")
        await trio.sleep(5)
        with pytest.raises(CompactedError):
            async with process.backend.watch(KeyRange.everything(), start_revision=2) as stream:
                await stream.receive()
        process.note("told")
        await process.rest()

    assert noted(play(program, Fault(FaultKind.COMPACTION, 2.0)), "told")


# ── phases and findings ─────────────────────────────────────────────────────────────────────────


def test_program_that_raises_is_found():
    """An exception of a program is a violation, with its text."""

    async def program(process):
        raise ValueError("no good")

    run = play(program)
    assert "a#1 raised ValueError: no good" in [violation.what for violation in run.violations]


def test_program_that_hangs_is_found():
    """A program that does not get through in time violates liveness."""

    async def program(process):
        await trio.sleep_forever()

    assert ["liveness", "end"] == invariants(play(program))


def test_program_that_gets_through_in_time_is_fine():
    """A program that needs a while after the faults, but less than the bound, violates nothing."""

    async def program(process):
        await trio.sleep(39)
        await process.rest()

    assert [] == play(program, settings=replace(ONE, calm_seconds=19.5)).violations
    assert ["liveness"] == invariants(play(program, settings=replace(ONE, calm_seconds=18.5)))


def test_lease_that_is_kept_alive_for_nobody_is_found():
    """A lease that outlives every program is a left-over; one that just runs out is not."""

    async def leaves(process):
        await process.backend.lease_grant(10, lease=7)
        await process.rest()

    async def leaves_for_long(process):
        await process.backend.lease_grant(1000, lease=7)
        await process.rest()

    assert [] == play(leaves).violations
    assert ["left-overs"] == invariants(play(leaves_for_long))


def test_checks_see_the_run():
    """Checks get the finished run, and what they find is among its violations."""
    from etcd_infra.testing import Violation

    def check(run):
        return [Violation("mine", f"{len(run.notes)} notes")]

    run = play(ticks, checks=[check])
    assert ["mine"] == invariants(run)


# ── plans ───────────────────────────────────────────────────────────────────────────────────────


def test_plan_is_drawn_from_a_seed():
    """The same seed draws the same plan; runs differ in their kinds, and every kind occurs."""
    plans = [draw_plan(random.Random(seed), ("a", "b"), 10.0) for seed in range(300)]
    assert plans[7] == draw_plan(random.Random(7), ("a", "b"), 10.0)
    kinds = [frozenset(fault.kind for fault in plan) for plan in plans]
    assert set(FaultKind) == set().union(*kinds)
    assert 250 < len(set(kinds))
    assert all(0 <= fault.at <= 10 for plan in plans for fault in plan)


def test_shrink_finds_the_culprits():
    """Out of 40 faults shrinking leaves the three that are needed, and makes them as small as they may be."""
    plan = tuple(Fault(FaultKind.PAUSE, float(at), "a", 16.0) for at in range(40))

    def fails(faults):
        needed = {fault.at: fault.seconds for fault in faults}
        return {3.0, 17.0, 31.0} <= set(needed) and needed[17.0] >= 4

    shortest = shrink(plan, fails)
    assert [3.0, 17.0, 31.0] == [fault.at for fault in shortest]
    assert 4.0 == shortest[1].seconds


def test_shrink_keeps_to_its_budget():
    """Shrinking ends when its budget is used up, with the shortest plan so far."""
    plan = tuple(Fault(FaultKind.RESET, float(at), "a") for at in range(40))
    runs = []

    def fails(faults):
        runs.append(faults)
        return len(faults) >= 2

    shortest = shrink(plan, fails, budget=5)
    assert 5 == len(runs)
    assert 2 <= len(shortest) < 40
    assert (plan[0],) == shrink(plan[:1], bool)


def test_counters():
    """A cell counts runs in which a check fell into a fault, or five seconds after, on the same node or on none."""
    counters = Counters()
    pause = Strike(FaultKind.PAUSE, "a", 10.0, 12.0)
    counters.add([pause], [Hit("L1", 16.9, "a"), Hit("L1", 11.0, "a"), Hit("L2", 11.0), Hit("L3", 11.0, "b")])
    counters.add([pause], [Hit("L1", 17.1, "a"), Hit("L2", 9.9)])
    counters.add([], [Hit("L1", 11.0)])
    assert {("pause", "L1"): 1, ("pause", "L2"): 1} == dict(counters.cells)
    assert (3, 2, 4) == (counters.runs, counters.struck["pause"], counters.checked["L1"])
    assert ["pause x L3: 0"] == counters.too_few({FaultKind.PAUSE: ("L1", "L3")}, 1)
    assert "| pause | 2 | 1 | 1 | 0 |" in counters.table()


def test_fenced_write_of_a_txn_in_flight():
    """A transaction that is applied after its lease has ended is refused by its compare: nothing is written."""

    async def program(process):
        from etcd_infra._etcd.model import Compare

        await process.backend.lease_grant(2, lease=7)
        created = await process.backend.put(b"own", b"", lease=7)
        await trio.sleep(1)
        with pytest.raises(OutcomeUnknownError):
            await process.backend.txn(Txn((Compare.created_at(b"own", created),), (Put(b"data", b""),)))
        await trio.sleep(15)
        await process.rest()

    run = play(program, Fault(FaultKind.LATE, 0.9, "a", 8.0))
    keys = [event.key for timed in run.lineages[0] for event in timed.commit.events]
    assert [b"own", b"own"] == keys
