"""Programs that campaign in every way there is, and observers of who leads."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from etcd_infra.errors import EtcdError, LostError
from tests.simulation.locks import DATA, KEYS, LockProgram, Shape, settings_of, tell
from tests.simulation.locks import shape_of as lock_shape_of

QUORUM = 2
WAYS = ("block", "block", "block", "in time", "quorum")


def shape_of(seed, **kinds):
    """Draw a run's shape as for locks, with faults that strike elections."""
    shape = lock_shape_of(seed, **kinds)
    return replace(shape, settings=replace(shape.settings, prefix=KEYS.elections))


def shape_from(*, nodes, seconds, locks, **others):
    """Make a shape of its fields as JSON has them."""
    settings = settings_of(tuple(nodes), seconds, others["ttl"], prefix=KEYS.elections)
    return Shape(locks=tuple(locks), settings=settings, **others)


class ElectionProgram(LockProgram):
    """The program of one run: leads instead of locking, and looks who leads meanwhile."""

    ways = WAYS

    @staticmethod
    def registers(name):
        """Name what is written by a leader, with the line that decides who is one."""
        return {DATA + name.encode(): KEYS.election_line(name)}

    @asynccontextmanager
    async def _taken(self, infra, process, way, name, operation):
        election = infra.election(name, quorum=QUORUM if way == "quorum" else 1)
        async with election.lead(b"%d" % operation) as leadership:
            tell(process, name, operation, leadership)
            yield leadership

    async def _work(self, process, infra):
        await super()._work(process, infra)
        # Nobody waits for a registration to go, so what the janitor still has to do would be no one's delay.
        for name in self.shape.locks:
            while process.id in {member.node_id for member in await infra.members(name).list()}:
                await trio.sleep(0.1)

    async def _body(self, process, name, operation, hold, *, last):
        draw = process.random
        await super()._body(process, name, operation, hold, last=last)
        try:
            if draw.random() < 0.3:
                await hold.proclaim(b"%d, later" % operation)
                process.note("proclaimed", operation=operation, token=hold.token)
            if draw.random() < 0.2:
                await hold.step_down()
        except BaseException:
            process.note("leaving", operation=operation, token=hold.token, status=str(hold.status))
            raise

    @asynccontextmanager
    async def _bystanders(self, process, infra):
        async with trio.open_nursery() as nursery:
            for name in self.shape.locks:
                nursery.start_soon(self._observe, process, infra, name)
                nursery.start_soon(self._follow, process, infra, name)
            yield
            nursery.cancel_scope.cancel()

    @staticmethod
    async def _observe(process, infra, name):
        number = 0
        while True:
            number += 1
            try:
                async with infra.election(name).observe() as leaders:
                    async for leader in leaders:
                        term = leader.term if leader else 0
                        process.note("observed", election=name, observer=number, term=term)
            except (EtcdError, LostError):
                await trio.sleep(0.5)

    @staticmethod
    async def _follow(process, infra, name):
        try:
            async with infra.election(name).transitions() as events:
                async for event in events:
                    process.note("transition", election=name, kind=str(event.kind), term=event.term)
        except (EtcdError, LostError):
            return
