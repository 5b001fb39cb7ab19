"""A simulated machine: its clocks, its network link, and the process that lives on it."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from etcd_infra.testing.simulation.backend import SimulatedBackend
from etcd_infra.testing.simulation.clocks import NodeClock
from etcd_infra.testing.simulation.link import Link
from etcd_infra.testing.simulation.process import SimulatedProcess

if TYPE_CHECKING:
    from etcd_infra.testing.simulation.simulation import Simulation


class Machine:
    """One node: it outlives its processes."""

    def __init__(self, simulation: Simulation, name: str, seed: str) -> None:
        self.name = name
        self.link = Link(Random(f"{seed}/link"), simulation.timeline)
        self._random = Random(f"{seed}/process")
        # Two machines' monotonic clocks have nothing in common.
        self.clock = NodeClock(origin=self._random.uniform(0, 10**5))
        self.process: SimulatedProcess | None = None
        self.processes: list[SimulatedProcess] = []
        self._simulation = simulation
        self._stopped = 0

    def start(self) -> None:
        """Start a process, unless one lives."""
        if self.process is not None:
            return
        simulation = self._simulation
        life = len(self.processes) + 1
        random = Random(self._random.getrandbits(64))
        process = SimulatedProcess(simulation, self.name, life, clock=self.clock, link=self.link, random=random)
        process.backend = SimulatedBackend(process, simulation.network)
        self.process = process
        self.processes.append(process)
        simulation.run_program(process)
        if self._stopped:
            simulation.freezer.freeze(process)

    def kill(self) -> None:
        """End the process at once: its tasks never run again; its requests stay in the network."""
        process, self.process = self.process, None
        if process is None:
            return
        process.dead = True
        self._simulation.freezer.freeze(process)
        for watch in tuple(process.watches):
            watch.cut()

    def pause(self) -> None:
        """Stop the process: SIGSTOP."""
        self._stopped += 1
        if self.process is not None:
            self._simulation.freezer.freeze(self.process)

    def go_on(self) -> None:
        """Let the process go on, if nothing else keeps it from running."""
        self._stopped -= 1
        if not self._stopped and self.process is not None:
            self._simulation.freezer.thaw(self.process)

    def suspend(self) -> None:
        """Let the whole machine sleep."""
        self.pause()
        self.clock.suspend(self._simulation.now)
        self._reconsider()

    def resume(self) -> None:
        """Wake the machine."""
        self.clock.resume(self._simulation.now)
        self._reconsider()
        self.go_on()

    def set_rate(self, rate: float) -> None:
        """Let the machine's clocks run fast or slow."""
        self.clock.set_rate(rate, self._simulation.now)
        self._reconsider()

    def _reconsider(self) -> None:
        # The dead, too: their deadlines must come when they are cleared away.
        for process in self.processes:
            self._simulation.timeline.reconsider(process)

    def break_connections(self) -> None:
        """Reset every connection: nobody knows what became of the calls in flight."""
        if self.process is None:
            return
        for call in tuple(self.process.calls):
            call.break_off()
        for watch in tuple(self.process.watches):
            watch.cut()

    def notice_dead_connections(self) -> None:
        """Break the watches through which nothing comes any more."""
        if self.process is not None and (self.link.requests_cut or self.link.answers_cut):
            for watch in tuple(self.process.watches):
                watch.cut()
