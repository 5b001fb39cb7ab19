"""
A simulation: programs on several nodes, one etcd, one seed that decides everything.

Three phases. *Faults*: the plan strikes. *Calm*: no faults any more; every program must get through and `rest`
within a bound. *Rest*: programs keep what they have open, so that whatever was left behind shows before a lease
could have cleaned it up; then they end, and nothing of them may be left.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra.testing.simulation.actions import Actions
from etcd_infra.testing.simulation.clocks import SimulationClock, run_as
from etcd_infra.testing.simulation.faults import FaultKind, draw_plan
from etcd_infra.testing.simulation.machine import Machine
from etcd_infra.testing.simulation.network import Network
from etcd_infra.testing.simulation.pausing import Freezer
from etcd_infra.testing.simulation.process import Note, SimulatedProcess
from etcd_infra.testing.simulation.server import SimulatedServer
from etcd_infra.testing.simulation.timeline import Timeline
from etcd_infra.testing.simulation.trio_internals import deterministic_scheduling, replace_deadlines
from etcd_infra.testing.violation import Violation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence

    from etcd_infra.testing.simulation.faults import Fault
    from etcd_infra.testing.simulation.server import TimedCommit

SETTLE_SECONDS: Final = 3.0
END_SECONDS: Final = 10.0
LAST_LEASE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that really happened, to whom (empty: to all), and from when to when (true seconds)."""

    kind: FaultKind
    node: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Settings:
    """
    How a simulation runs.

    Attributes:
        nodes: Names of the nodes; each runs the program.
        seconds: True seconds of the phase of faults.
        calm_seconds: True seconds within which every program must get through afterwards.
        prefix: Keys that somebody else may delete.
        kinds: The faults to draw from.
    """

    nodes: tuple[str, ...] = ("a", "b", "c")
    seconds: float = 20.0
    calm_seconds: float = 20.0
    prefix: bytes = b""
    kinds: tuple[FaultKind, ...] = tuple(FaultKind)


@dataclass(slots=True)
class SimulationRun:
    """
    What happened in one simulation.

    Attributes:
        seed, plan, settings: What decided it.
        lineages: Every commit of the store, with its true time and its cause; one list per lineage.
        began_at: True time at which each lineage began.
        notes: What the programs told.
        strikes: The faults that struck.
        violations: What must not have happened.
        requests: How many calls were sent.
        calm_at: When the phase of faults ended.
        calls: When, who, which verb and what was answered, for each call that was applied.
        leases: Which process granted which lease.
    """

    seed: int
    plan: tuple[Fault, ...]
    settings: Settings
    lineages: list[list[TimedCommit]]
    began_at: list[float]
    notes: list[Note]
    strikes: list[Strike]
    violations: list[Violation] = field(default_factory=list[Violation])
    requests: int = 0
    calm_at: float = 0.0
    calls: list[tuple[float, str, str, object]] = field(default_factory=list[tuple[float, str, str, object]])
    leases: dict[int, str] = field(default_factory=dict[int, str])

    def log_lines(self) -> list[str]:
        """Describe the run, line by line; the same seed gives the same lines, in every process."""
        lines = [f"{at!r} {who} {verb} {result!r}" for at, who, verb, result in self.calls]
        lines += [
            f"{note.at!r} {note.process} {note.what} {sorted(note.facts.items())!r}" for note in self.notes
        ]
        lines += [repr(strike) for strike in self.strikes]
        for lineage in self.lineages:
            lines += [f"{timed.at!r} {timed.origin} {timed.commit!r}" for timed in lineage]
        return [*lines, *(str(violation) for violation in self.violations)]


class Simulation:
    """The state of a simulation while it runs; `simulate` makes it."""

    def __init__(
        self,
        program: Callable[[SimulatedProcess], Awaitable[None]],
        seed: int,
        settings: Settings,
        plan: Sequence[Fault],
    ) -> None:
        self.settings = settings
        self.clock = SimulationClock()
        self.timeline = Timeline(self.clock)
        self.freezer = Freezer()
        self.server = SimulatedServer(self.timeline, Random(f"{seed}/server"))
        self.network = Network(self.timeline, self.server)
        self.network.struck = lambda fault, _: self.strike(fault, until=self.now + fault.seconds)
        self.machines = {name: Machine(self, name, f"{seed}/{name}") for name in settings.nodes}
        self.calm = False
        self.over = trio.Event()
        self.run = SimulationRun(
            seed,
            tuple(plan),
            settings,
            self.server.lineages,
            self.server.began_at,
            notes=[],
            strikes=[],
            calls=self.network.log,
            leases=self.network.leases,
        )
        self._program = program
        self._actions = Actions(self, settings.prefix)
        self._all_rest = trio.Event()
        self._nursery: trio.Nursery
        self._running = 0
        self._ended = trio.Event()

    @property
    def now(self) -> float:
        """True seconds since the beginning."""
        return self.clock.now

    @property
    def faulty_until(self) -> float:
        """When the phase of faults ends."""
        return self.settings.seconds

    # ── for processes and faults ────────────────────────────────────────────────────────────────

    def note(self, process: SimulatedProcess, what: str, facts: dict[str, object]) -> None:
        """Keep what a program tells."""
        revision, lineage = self.server.store.revision, self.server.lineage
        self.run.notes.append(Note(self.now, process.id, what, facts, revision, lineage))

    def strike(self, fault: Fault, until: float | None = None) -> None:
        """Note that a fault happened."""
        self.run.strikes.append(Strike(fault.kind, fault.node, self.now, self.now if until is None else until))

    def violate(self, invariant: str, what: str) -> None:
        """Note what must not happen."""
        self.run.violations.append(Violation(invariant, what, self.now))

    def somebody_rests(self) -> None:
        """See whether every living process rests."""
        if self.calm and all(machine.process and machine.process.resting for machine in self.machines.values()):
            self._all_rest.set()

    def run_program(self, process: SimulatedProcess) -> None:
        """Start a process's program."""
        self._nursery.start_soon(self._run_program, process)

    async def _run_program(self, process: SimulatedProcess) -> None:
        run_as(process)
        self._running += 1
        try:
            with process.scope:
                await self._program(process)
        except Exception as error:  # noqa: BLE001 - whatever a program raises is a finding
            if not process.dead:
                self.violate("program", f"{process.id} raised {_described(error)}")
        finally:
            self._running -= 1
            if not self._running:
                self._ended.set()

    # ── the phases ──────────────────────────────────────────────────────────────────────────────

    async def play(self, at_rest: Callable[[Simulation], Iterable[Violation]] | None) -> None:
        """Go through the phases."""
        replace_deadlines(self.timeline)
        self.clock.happenings = self.timeline
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for machine in self.machines.values():
                machine.start()
            for fault in self.run.plan:
                self._actions.plan(fault)
            await trio.sleep_until(self.settings.seconds)
            await self._calm_down()
            if at_rest is not None and self._all_rest.is_set():
                self.run.violations.extend(at_rest(self))
            await self._end()
            nursery.cancel_scope.cancel()
        self._look_for_left_overs()

    async def _calm_down(self) -> None:
        self.calm = True
        self.run.calm_at = self.now
        self._actions.end_all()
        for machine in self.machines.values():
            machine.link.forget_faults()
            machine.set_rate(1.0)
            machine.start()
        self.somebody_rests()
        with trio.move_on_after(self.settings.calm_seconds):
            await self._all_rest.wait()
        if not self._all_rest.is_set():
            late = [
                name
                for name, machine in self.machines.items()
                if not (machine.process and machine.process.resting)
            ]
            self.violate("liveness", f"{', '.join(late)} did not get through in {self.settings.calm_seconds} s")
        else:
            await trio.sleep(SETTLE_SECONDS)

    async def _end(self) -> None:
        self.over.set()
        dead = [process for machine in self.machines.values() for process in machine.processes if process.dead]
        for process in dead:
            self.freezer.thaw(process)
            process.scope.cancel()
        with trio.move_on_after(END_SECONDS):
            await self._ended.wait()
        if not self._ended.is_set():
            self.violate("end", f"{self._running} programs did not end within {END_SECONDS} s")
        await self._let_leases_end()

    async def _let_leases_end(self) -> None:
        # What was killed, or arrived late, ends by itself; a lease that does not is kept alive by somebody.
        with trio.move_on_after(LAST_LEASE_SECONDS):
            while self.server.store.snapshot().leases:
                await trio.sleep(1)
                self.server.let_expire()

    def _look_for_left_overs(self) -> None:
        self.run.requests = self.network.sent
        watches = [
            process.id for machine in self.machines.values() for process in machine.processes if process.watches
        ]
        if watches:
            self.violate("left-overs", f"open watches of {watches}")
        snapshot = self.server.store.snapshot()
        if snapshot.leases:
            self.violate("left-overs", f"leases that nobody owns are kept alive: {snapshot.leases}")


def simulate(  # noqa: PLR0913
    program: Callable[[SimulatedProcess], Awaitable[None]],
    *,
    seed: int,
    settings: Settings | None = None,
    plan: Sequence[Fault] | None = None,
    checks: Iterable[Callable[[SimulationRun], Iterable[Violation]]] = (),
    at_rest: Callable[[Simulation], Iterable[Violation]] | None = None,
) -> SimulationRun:
    """
    Run `program` on every node, under the faults that `seed` decides; return what happened.

    The same arguments give the same run, to the last bit, in every process.

    Args:
        program: Runs once per node, and again after a kill. It must use nothing but its process: ``backend``,
            ``random``, ``boot_clock``, Trio's clock. While ``not process.calm`` it works; then it finishes and
            awaits ``process.rest()``. What it raises is a violation.
        seed: Decides the plan (unless `plan` is given) and every tie.
        settings: Nodes, durations, kinds of faults.
        plan: Faults to strike instead of the seed's.
        checks: Look at the finished run.
        at_rest: Looks at the simulation when every program rests, three seconds after the last one began to.

    Returns:
        The run; `violations` is empty if all went well.
    """
    chosen = settings or Settings()
    if plan is None:
        plan = draw_plan(Random(f"{seed}/plan"), chosen.nodes, chosen.seconds, kinds=chosen.kinds)
    with deterministic_scheduling(f"{seed}/scheduling"), _no_garbage_collection():
        simulation = Simulation(program, seed, chosen, plan)
        trio.run(simulation.play, at_rest, clock=simulation.clock)
    for check in checks:
        simulation.run.violations.extend(check(simulation.run))
    return simulation.run


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    # When cycles are collected depends on more than the seed, and a collected generator may run code.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _described(error: BaseException) -> str:
    inner = getattr(error, "exceptions", ())
    if inner:
        return f"{type(error).__name__}({', '.join(map(_described, inner))})"
    return f"{type(error).__name__}: {error}"
