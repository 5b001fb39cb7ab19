"""Programs that write, read, count and watch state in every way there is, and tell what they were told."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from etcd_infra import Consistency, StateSnapshot, open_coordinator
from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import Txn
from etcd_infra._wrappers.grouped import Grouped
from etcd_infra._wrappers.observed import Observed
from etcd_infra.errors import (
    CodecError,
    ConflictError,
    EtcdError,
    FencedError,
    LostError,
    OutcomeUnknownError,
    UnavailableError,
)
from tests.simulation.locks import KEYS, NAMESPACE, LockProgram, Shape, settings_of
from tests.simulation.locks import shape_of as lock_shape_of

REGISTERS = ("x", "y")
COUNT, FENCED, BEHIND = "n", "fenced", "behind"
LOCK = "guard"
WAYS = ("set", "set", "swap", "swap", "delete", "get", "get", "look", "add", "add", "add", "fenced", "behind")
PER_OPERATION = 10


def shape_of(seed, **kinds):
    """Draw a run's shape as for locks, with faults that strike state."""
    shape = lock_shape_of(seed, **kinds)
    settings = replace(shape.settings, prefix=KEYS.states)
    return replace(shape, tasks=max(2, shape.tasks), pause=min(shape.pause, 0.5), settings=settings)


def shape_from(*, nodes, seconds, locks, **others):
    """Make a shape of its fields as JSON has them."""
    settings = settings_of(tuple(nodes), seconds, others["ttl"], prefix=KEYS.states)
    return Shape(locks=tuple(locks), settings=settings, **others)


class StateProgram(LockProgram):
    """The program of one run. What an operation writes names it: a number that no other one writes."""

    @asynccontextmanager
    async def _open(self, process):
        def observe(call):
            if call.error in {OutcomeUnknownError, trio.Cancelled} and isinstance(call.request, Txn):
                process.note("unanswered", request=call.request, sent=call.duration)

        async with open_background() as carriers:
            seen = Observed(process.backend, observe)
            async with open_coordinator(
                Grouped(seen, carriers, on_their_way=1) if self.shape.grouped else seen,
                namespace=NAMESPACE,
                ttl=self.shape.ttl,
                node_id=process.id,
                random=process.random,
                boot_clock=process.boot_clock,
            ) as infra:
                yield infra

    async def _work(self, process, infra):
        while not process.calm:
            await self._operate(process, infra, process.random.choice(WAYS))
            await trio.sleep(process.random.uniform(0, self.shape.pause))
        for way in ("set", "add", "fenced"):
            while not await self._operate(process, infra, way, patience=60.0):
                await trio.sleep(0.1)

    async def _operate(self, process, infra, way, *, patience=None):
        """Do one thing; return whether it was acknowledged."""
        draw = process.random
        self._operations += 1
        operation = self._operations
        key = {"add": COUNT, "fenced": FENCED, "behind": BEHIND}.get(way) or draw.choice(REGISTERS)
        delta = draw.randint(1, 3)
        process.note("asked", operation=operation, way=way, key=key, delta=delta)
        outcome, facts = "cancelled", {}
        with process.interruptible():
            try:
                with trio.move_on_after(patience or draw.choice((0.02, 0.5, 5.0, 30.0))):
                    facts = await getattr(self, f"_{way}")(infra, process, key, operation, delta)
                    outcome = "done"
            except OutcomeUnknownError:
                outcome = "unknown"
            except (ConflictError, FencedError, CodecError):
                outcome = "refused"
            except (EtcdError, LostError):
                # A lock around it may have been lost after the write: what was written was told already.
                outcome = "failed"
        process.note(outcome, operation=operation, **facts)
        return outcome == "done"

    async def _set(self, infra, _process, key, operation, _delta):
        return {"version": await infra.state.set(key, operation * PER_OPERATION)}

    async def _swap(self, infra, process, key, operation, _delta):
        entry = await infra.state.get(key)
        expected = entry.version if entry else 0
        process.note("expects", operation=operation, version=expected)
        result = await infra.state.compare_and_swap(key, operation * PER_OPERATION, expected_version=expected)
        return {"swapped": result.swapped, "version": result.version}

    async def _delete(self, infra, _process, key, _operation, _delta):
        return {"deleted": await infra.state.delete(key)}

    async def _get(self, infra, _process, key, _operation, _delta):
        entry = await infra.state.get(key)
        return {"version": entry.version if entry else 0, "value": entry.value if entry else None}

    async def _look(self, infra, process, key, operation, _delta):
        at_least = (await infra.state.set("z", operation * PER_OPERATION)) if operation % 3 == 0 else 0
        process.note("expects", operation=operation, version=at_least)
        try:
            entry = await infra.state.get(key, consistency=Consistency.SERIALIZABLE, min_revision=at_least)
        except UnavailableError:
            return {"version": None, "value": None}
        return {"version": entry.version if entry else 0, "value": entry.value if entry else None}

    async def _add(self, infra, _process, key, _operation, delta):
        return {"result": await infra.counter(key).add(delta)}

    async def _fenced(self, infra, process, key, operation, _delta):
        async with infra.lock(LOCK) as hold:
            process.note("holds", operation=operation, token=hold.token)
            if process.random.random() < 0.5:
                await trio.sleep(process.random.uniform(0, self.shape.work))
            version = await infra.state.set(key, operation * PER_OPERATION, fence=hold.fence)
            process.note("written", operation=operation, version=version)
        return {"version": version}

    async def _behind(self, infra, process, key, operation, _delta):
        count = process.random.randint(1, 4)
        process.note("expects", operation=operation, version=count)
        async with infra.open_write_behind() as behind:
            for number in range(count):
                await behind.set(key, operation * PER_OPERATION + number)
                entry = await behind.get(key)
                process.note("reads", operation=operation, value=entry.value, number=number)
                if process.random.random() < 0.3:
                    await trio.sleep(0.05)
        return {}

    @asynccontextmanager
    async def _bystanders(self, process, infra):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._observe, process, infra)
            yield
            nursery.cancel_scope.cancel()

    @staticmethod
    async def _observe(process, infra):
        number = 0
        while True:
            number += 1
            try:
                async with infra.state.watch(prefix="") as watch:
                    async for item in watch:
                        if isinstance(item, StateSnapshot):
                            entries = {key: entry.version for key, entry in item.entries.items()}
                            process.note("snapshot", observer=number, revision=item.revision, entries=entries)
                        else:
                            version = item.entry.version if item.entry else 0
                            process.note(
                                "change", observer=number, revision=item.revision, key=item.key, version=version
                            )
            except (EtcdError, LostError):
                await trio.sleep(0.5)
