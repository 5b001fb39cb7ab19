"""A simulated process, as the program that runs in it sees it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Generator
    from random import Random

    from etcd_infra.testing.simulation.backend import SimulatedBackend
    from etcd_infra.testing.simulation.clocks import NodeClock
    from etcd_infra.testing.simulation.link import Link
    from etcd_infra.testing.simulation.network import Call
    from etcd_infra.testing.simulation.simulation import Simulation
    from etcd_infra.testing.simulation.watch import SimulatedWatch


@dataclass(frozen=True, slots=True)
class Note:
    """
    Something that a program told.

    Attributes:
        at: True seconds.
        process: Whose program; ``a#2`` is the second life of node a.
        what: The kind of note.
        facts: What it says.
        revision: The store's revision at that moment.
        lineage: The number of the store's lineage at that moment.
    """

    at: float
    process: str
    what: str
    facts: dict[str, object]
    revision: int
    lineage: int


class SimulatedProcess:
    """
    One life of a node: what its program may use instead of the real world.

    Attributes:
        name: The node.
        id: The node and the number of its life: ``a#2``.
        backend: Its way to etcd.
        random: The only source of random draws.
        dead: It was killed: its tasks never run again.
    """

    def __init__(  # noqa: PLR0913 - only the simulation calls it
        self, simulation: Simulation, name: str, life: int, *, clock: NodeClock, link: Link, random: Random
    ) -> None:
        self.name = name
        self.id = f"{name}#{life}"
        self.clock = clock
        self.link = link
        self.random = random
        self.dead = False
        self.resting = False
        self.scope = trio.CancelScope()
        # Dictionaries as ordered sets: no order may depend on addresses.
        self.calls: dict[Call, None] = {}
        self.watches: dict[SimulatedWatch, None] = {}
        self.interruptibles: dict[trio.CancelScope, None] = {}
        self._simulation = simulation
        self.backend: SimulatedBackend

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def boot_clock(self) -> float:
        """Return the machine's boot-time clock: seconds, suspended time included."""
        return self.clock.boot(self._simulation.now)

    @property
    def calm(self) -> bool:
        """Whether the time of faults is over: then the program is to finish what it does, and to `rest`."""
        return self._simulation.calm

    async def rest(self) -> None:
        """
        Say that this program has got through, and wait until it may end.

        What it has opened stays open meanwhile: the simulation looks for left-overs before a lease could have
        cleaned them up.
        """
        self.resting = True
        self._simulation.somebody_rests()
        await self._simulation.over.wait()

    @contextmanager
    def interruptible(self) -> Generator[trio.CancelScope]:
        """Open a scope that a fault may cancel."""
        with trio.CancelScope() as scope:
            self.interruptibles[scope] = None
            try:
                yield scope
            finally:
                del self.interruptibles[scope]

    def note(self, what: str, **facts: object) -> None:
        """Tell checkers something; a dead process tells nothing."""
        if not self.dead:
            self._simulation.note(self, what, facts)
