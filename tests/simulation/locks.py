"""Programs that contend for locks in every way there is, and tell what they see."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random

import trio

from etcd_infra import open_coordinator
from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import Put, Txn
from etcd_infra._primitives._lock_like import Renewal
from etcd_infra._wrappers.grouped import Grouped
from etcd_infra.errors import EtcdError, LostError, OutcomeUnknownError
from etcd_infra.testing import FaultKind, Settings

NAMESPACE = "sim"
KEYS = Keys(NAMESPACE)
DATA = b"data/"
WAYS = ("block", "block", "by hand", "attempt", "own lease", "manual", "in time")


@dataclass(frozen=True)
class Shape:
    """What a seed decides besides its faults."""

    ttl: int
    locks: tuple[str, ...]
    tasks: int
    work: float
    pause: float
    settings: Settings
    grouped: bool = False


def shape_of(seed, *, kinds=tuple(FaultKind)):
    """Draw a run's shape: mostly small, since small runs find as much, and there can be more of them."""
    draw = Random(f"{seed}/shape")
    ttl = draw.choice((2, 3, 3, 5, 5, 10))
    seconds = draw.choice((4.0, 6.0, 10.0))
    settings = settings_of(("a", "b", "c")[: draw.choice((2, 2, 3))], seconds, ttl, kinds)
    shape = Shape(
        ttl=ttl,
        locks=("job", "job2")[: draw.choice((1, 1, 2))],
        tasks=draw.choice((1, 1, 2)),
        work=draw.choice((0.1, 0.5, 2.0)),
        pause=draw.choice((0.1, 0.5, 1.0)),
        settings=settings,
    )
    # So few tasks would never have their transactions grouped by themselves.
    grouped = draw.random() < 0.3
    return replace(shape, grouped=True, tasks=3, locks=("job", "job2")) if grouped else shape


def shape_from(*, nodes, seconds, locks, **others):
    """Make a shape of its fields as JSON has them."""
    return Shape(locks=tuple(locks), settings=settings_of(tuple(nodes), seconds, others["ttl"]), **others)


def settings_of(nodes, seconds, ttl, kinds=tuple(FaultKind), prefix=KEYS.locks):
    """Settle how a run goes: everybody must get through within 2 x TTL + 10 s when it is calm."""
    return Settings(nodes=nodes, seconds=seconds, calm_seconds=2.0 * ttl + 10, prefix=prefix, kinds=kinds)


class LockProgram:
    """The program of one run; an instance is what `simulate` calls."""

    ways = WAYS
    refusals = (EtcdError, LostError)

    def __init__(self, shape):
        self.shape = shape
        self._operations = 0

    async def __call__(self, process):
        """Contend until it is calm; then take each lock once more, and rest."""
        while True:
            try:
                async with self._open(process) as infra:
                    async with self._bystanders(process, infra), trio.open_nursery() as nursery:
                        for _ in range(self.shape.tasks):
                            nursery.start_soon(self._work, process, infra)
                    process.note("resting", lease=infra.session.lease.id)
                    await process.rest()
                    return
            except (EtcdError, LostError) as error:
                process.note("refused", error=type(error).__name__)
                await trio.sleep(0.5)

    @asynccontextmanager
    async def _bystanders(self, process, infra):
        yield

    @asynccontextmanager
    async def _open(self, process):
        async with open_background() as carriers:
            grouped = Grouped(process.backend, carriers, on_their_way=1)
            async with open_coordinator(
                grouped if self.shape.grouped else process.backend,
                namespace=NAMESPACE,
                ttl=self.shape.ttl,
                node_id=process.id,
                random=process.random,
                boot_clock=process.boot_clock,
            ) as infra:
                yield infra

    async def _work(self, process, infra):
        while not process.calm:
            await self._round(process, infra, process.random.choice(self.ways))
            await trio.sleep(process.random.uniform(0, self.shape.pause))
        for name in self.shape.locks:
            while not await self._round(process, infra, "block", name=name, last=True):
                await trio.sleep(0.1)

    async def _round(self, process, infra, way, *, name=None, last=False):
        """Take a lock once; return whether it was held, and given back."""
        draw = process.random
        name = name or draw.choice(self.shape.locks)
        self._operations += 1
        operation = self._operations
        patience = draw.uniform(0.01, 3) if way in {"in time", "quorum"} else 60.0
        process.note("asked", operation=operation, lock=name, way=way)
        held = False
        with process.interruptible() as interrupted:
            try:
                with trio.move_on_after(patience) as late:
                    async with self._taken(infra, process, way, name, operation) as hold:
                        held = hold is not None
                        if hold is not None:
                            await self._body(process, name, operation, hold, last=last)
                            process.note(
                                "leaving", operation=operation, token=hold.token, status=str(hold.status)
                            )
                if late.cancelled_caught:
                    process.note("cancelled", operation=operation)
            except self.refusals as error:
                process.note("failed", operation=operation, error=type(error).__name__)
                return False
        if interrupted.cancelled_caught:
            process.note("cancelled", operation=operation)
            return False
        process.note("done", operation=operation)
        return held

    @asynccontextmanager
    async def _taken(self, infra, process, way, name, operation):
        lock = self.lock_of(infra, way, name)
        if way == "attempt":
            async with lock.attempt() as hold:
                if hold is not None:
                    tell(process, name, operation, hold)
                yield hold
            return
        if way == "by hand":
            hold = await lock.acquire()
            tell(process, name, operation, hold)
            try:
                yield hold
            finally:
                await hold.release()
            return
        async with lock as hold:
            tell(process, name, operation, hold)
            yield hold

    def lock_of(self, infra, way, name):
        """Make the lock."""
        if way == "own lease":
            return infra.lock(name, ttl=self.shape.ttl)
        return infra.lock(name, renewal=Renewal.MANUAL if way == "manual" else Renewal.AUTO)

    async def _body(self, process, name, operation, hold, *, last):
        """Write under the fence now and then, until the work is done or the hold is lost."""
        draw = process.random
        try:
            for number in range(1 if last else draw.randint(1, 3)):
                await self.write(process, name, operation, hold, number)
                # When it is calm everybody hurries, so that the bound on getting through is the locks' own.
                await trio.sleep(0.01 if last or process.calm else draw.uniform(0, self.shape.work))
                hold.check()
        except BaseException:
            process.note("leaving", operation=operation, token=hold.token, status=str(hold.status))
            raise

    async def write(self, process, name, operation, hold, number):
        """Write once, guarded by the fence."""
        value = self.value_of(name, hold, operation, number)
        puts = tuple(Put(key, value) for key in self.registers(name))
        try:
            written = await process.backend.txn(Txn(hold.fence.proof, puts))
        except OutcomeUnknownError:
            process.note("unknown", operation=operation, token=hold.token)
        else:
            process.note("written" if written.succeeded else "fenced", operation=operation, token=hold.token)

    @staticmethod
    def registers(name):
        """Name what is written under a lock, each with the line that decides who may."""
        return {DATA + name.encode(): KEYS.lock_line(name)}

    @staticmethod
    def value_of(name, hold, operation, number):
        """Say in a value under which token it was written."""
        return json.dumps([name, hold.token, operation, number]).encode()


def tell(process, name, operation, hold):
    """Note a grant."""
    key, *others = (compare.range.key for compare in hold.fence.proof)
    facts = {"others": tuple(others)} if others else {}
    process.note("granted", operation=operation, lock=name, token=hold.token, key=key, **facts)
