"""Programs that publish, subscribe, and handle messages of groups in every way there is, and tell what they saw."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from math import inf
from random import Random

import trio

from etcd_infra import Delivery, Publish, Retention, Set, open_coordinator
from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.keys import Keys
from etcd_infra._primitives import _feed, _message_names, _reader, _shared_group, _trimmer
from etcd_infra._wrappers.grouped import Grouped
from etcd_infra.errors import (
    AckTimeoutError,
    ConflictError,
    EtcdError,
    EtcdInfraError,
    LostError,
    MessagesLostError,
    NotHeldError,
    OutcomeUnknownError,
)
from etcd_infra.testing import FaultKind, Settings

NAMESPACE = "sim"
KEYS = Keys(NAMESPACE)
TOPIC, ECHO = "news", "echo"
NEWS = KEYS.topic(TOPIC)
ORDERED, SHARED = "ordered", "shared"
GROUPS = (ORDERED, SHARED)
EFFECT, TOTAL, DID, COMMON = "effect/", "total/", "did/", "common"
# What a stranger may delete or make anew: what gives a right to messages, never what says how far a group is.
FOREIGN = tuple(
    prefix.decode()
    for prefix in (NEWS.consumers(ORDERED), NEWS.claims(SHARED), NEWS.trimmers, KEYS.state(TOTAL))
)
PUBLISHING = (
    "publish",
    "publish",
    "publish",
    "named",
    "named",
    "execute",
    "execute",
    "transact",
    "replay",
    "discard",
)
HANDLING = (
    *("transaction", "transaction", "transaction", "transaction", "crowded"),
    *("scope", "scope", "ack", "nack", "raise", "raise late", "slow", "slow transaction", "forget", "cancel"),
)
BUFFERS = {
    # Where everything fits, and where nothing does: a list holds more than what one Txn can publish, twice.
    "large": {},
    "small": {
        (_feed, "RING_MESSAGES"): 3,
        (_reader, "LISTED_TOGETHER"): 40,
        (_reader, "FETCHED_TOGETHER"): 2,
        (_shared_group, "WAITING"): 6,
        (_shared_group, "AHEAD"): 24,
        (_shared_group, "FLOOR_STEP"): 3,
        (_message_names, "NAMES_TOGETHER"): 7,
        (_trimmer, "CHUNK"): 16,
        (_trimmer, "LOOK_SECONDS"): 0.5,
    },
    "tiny": {
        (_feed, "RING_MESSAGES"): 1,
        (_reader, "LISTED_TOGETHER"): 40,
        (_reader, "FETCHED_TOGETHER"): 1,
        (_shared_group, "WAITING"): 3,
        (_shared_group, "AHEAD"): 9,
        (_shared_group, "FLOOR_STEP"): 1,
        (_message_names, "NAMES_TOGETHER"): 2,
        (_trimmer, "CHUNK"): 12,
        (_trimmer, "LOOK_SECONDS"): 0.3,
    },
}


@dataclass(frozen=True)
class Shape:
    """
    What a seed decides besides its faults.

    Attributes:
        count: How many messages are kept; 0: all.
        unacknowledged: Whether messages go that a group still needs.
        from_the_start: Whether groups begin with the oldest message there is.
        buffers: How much the product keeps ready: one of `BUFFERS`.
    """

    ttl: int
    tasks: int
    pause: float
    ack_after: float
    max_retries: int
    count: int
    unacknowledged: bool
    from_the_start: bool
    buffers: str
    foreign: str
    settings: Settings
    grouped: bool = False


def shape_of(seed, *, kinds=tuple(FaultKind)):
    """Draw a run's shape: few processes, few messages, and all ways to handle them."""
    draw = Random(f"{seed}/shape")
    ttl = draw.choice((2, 3, 3, 5))
    foreign = draw.choice(FOREIGN)
    ack_after = draw.choice((0.6, 1.0, 1.0, 2.0))
    nodes = ("a", "b", "c")[: draw.choice((2, 2, 3))]
    shape = Shape(
        ttl=ttl,
        tasks=draw.choice((1, 1, 2)),
        pause=draw.choice((0.3, 0.5, 0.8)),
        ack_after=ack_after,
        max_retries=draw.choice((0, 1, 2, 5)),
        count=draw.choice((0, 0, 0, 2, 6)),
        unacknowledged=draw.random() < 0.5,
        from_the_start=draw.random() < 0.5,
        buffers=draw.choice(("large", "small", "small", "tiny")),
        foreign=foreign,
        settings=settings_of(nodes, draw.choice((4.0, 6.0, 10.0)), ttl, foreign, kinds),
    )
    # So few tasks would never have their transactions grouped by themselves.
    return replace(shape, grouped=True, tasks=3, pause=0.6) if draw.random() < 0.2 else shape


def shape_from(*, nodes, seconds, **others):
    """Make a shape of its fields as JSON has them."""
    return Shape(settings=settings_of(tuple(nodes), seconds, others["ttl"], others["foreign"]), **others)


def settings_of(nodes, seconds, ttl, foreign, kinds=tuple(FaultKind)):
    """Settle how a run goes: when it is calm everything is settled within 2 x TTL + 10 s, and what is left over."""
    calm = 2.0 * ttl + 10 + seconds
    return Settings(nodes=nodes, seconds=seconds, calm_seconds=calm, prefix=foreign.encode(), kinds=kinds)


class HandlerError(Exception):
    """What a handler raises when it fails."""


class TopicProgram:
    """The program of one run; an instance is what `simulate` calls. Numbers are given out once per run."""

    def __init__(self, shape):
        self.shape = shape
        self.operations = 0
        self.ids = []
        self._deliveries = 0
        self._subscriptions = 0
        self._inside = 0
        self._before = {}

    async def __call__(self, process):
        """Publish and handle until it is calm; then publish once more, wait until all is settled, and rest."""
        with self._buffers():
            while True:
                try:
                    async with self._open(process) as infra:
                        await self._live(process, infra)
                        return
                except* (EtcdError, LostError) as errors:
                    process.note("refused", error=type(errors.exceptions[0]).__name__)
                await trio.sleep(0.5)

    @contextmanager
    def _buffers(self):
        """Let the product keep as much ready as the shape says, as long as any process lives."""
        wanted = BUFFERS[self.shape.buffers]
        if not self._inside:
            self._before = {where: getattr(*where) for where in wanted}
            for where, value in wanted.items():
                setattr(*where, value)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                for where, value in self._before.items():
                    setattr(*where, value)

    @asynccontextmanager
    async def _open(self, process):
        async with AsyncExitStack() as stack:
            backend = process.backend
            if self.shape.grouped:
                carriers = await stack.enter_async_context(open_background())
                backend = Grouped(backend, carriers, on_their_way=1)
            yield await stack.enter_async_context(
                open_coordinator(
                    backend,
                    namespace=NAMESPACE,
                    ttl=self.shape.ttl,
                    node_id=process.id,
                    random=process.random,
                    boot_clock=process.boot_clock,
                )
            )

    async def _live(self, process, infra):
        life = Life(self, process, infra)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(life.listen)
            for group in GROUPS:
                nursery.start_soon(life.consume, group)
            async with trio.open_nursery() as publishers:
                for _ in range(self.shape.tasks):
                    publishers.start_soon(life.publish)
            await life.get_through()
            process.note("resting", lease=infra.session.lease.id)
            await process.rest()
            nursery.cancel_scope.cancel()

    def next_operation(self):
        """Return a number that no other message of this run carries."""
        self.operations += 1
        return self.operations

    def next_delivery(self):
        """Return a number for one delivery."""
        self._deliveries += 1
        return self._deliveries

    def next_subscription(self):
        """Return a number for one subscription."""
        self._subscriptions += 1
        return self._subscriptions


class Life:
    """What one process does as long as its coordinator is open."""

    def __init__(self, program, process, infra):
        self.program = program
        self.shape = program.shape
        self.process = process
        self.infra = infra
        self.draw = process.random
        self.heard = {}
        self._news = trio.Event()
        shape = self.shape
        retention = None
        if shape.count:
            retention = Retention(count=shape.count, unacknowledged=shape.unacknowledged)
        self.topic = infra.topic(TOPIC, retention=retention)

    # ── publishing ──────────────────────────────────────────────────────────────────────────────

    async def publish(self):
        """Publish in all ways, until it is calm."""
        while not self.process.calm:
            await self._operate(self.draw.choice(PUBLISHING))
            await trio.sleep(self.draw.uniform(0, self.shape.pause))

    async def get_through(self):
        """Publish until this process has heard it, and wait until every group has everything."""
        receipt, heard = None, False
        while not heard:
            number, receipt = await self._operate("publish")
            with trio.move_on_after(2.0 if receipt else 0.1):
                while number not in self.heard:
                    await self._news.wait()
            heard = number in self.heard
        for group in GROUPS:
            # What a restore brought back was told to be lost; its group need not get it.
            while not self.process._simulation.server.lineage and await self._unacknowledged(group):
                await trio.sleep(0.2)
        if receipt is not None:  # what was heard may be unconfirmed all the same
            await self._look_after(number, receipt)

    async def _look_after(self, number, receipt):
        """Tell which groups have acknowledged a message."""
        try:
            await receipt.refresh()
        except EtcdError:
            return
        self.process.note("acknowledged", number=number, by=receipt.acknowledged_by, missing=receipt.missing)

    async def _unacknowledged(self, group):
        try:
            return await self.topic.unacknowledged(group)
        except (EtcdError, ValueError):  # a wiped store has no groups until their consumers make them anew
            return True

    async def _operate(self, way):
        """Do one thing, and tell what came of it; return the operation's number, and its receipt if it has one."""
        number = self.program.next_operation()
        patience = inf if self.process.calm else self.draw.choice((0.02, 0.5, 5.0, 30.0))
        outcome, receipt = "cancelled", None
        self.process.note("asked", operation=number, way=way)
        with self.process.interruptible(), trio.move_on_after(patience):
            try:
                receipt = await getattr(self, f"_{way}")(number)
                outcome = "done"
            except OutcomeUnknownError:
                outcome = "unknown"
            except (EtcdInfraError, HandlerError):
                outcome = "failed"
        self.process.note("told", operation=number, outcome=outcome)
        return number, receipt

    def _mode(self):
        return self.draw.choice((*Delivery, Delivery.AT_LEAST_ONCE, Delivery.EXACTLY_ONCE))

    def _some_id(self):
        """Name a message anew, or, half of the time, as another one."""
        ids = self.program.ids
        if ids and self.draw.random() < 0.6:
            return self.draw.choice(ids[-4:])
        ids.append(f"id-{len(ids)}")
        return ids[-1]

    def _tell_message(self, operation, number, mode, message_id):
        self.process.note("message", operation=operation, number=number, mode=str(mode), id=message_id or "")

    async def _publish(self, number, message_id=None):
        mode = self._mode()
        self._tell_message(number, number, mode, message_id)
        receipt = await self.topic.publish({"op": number}, delivery=mode, message_id=message_id)
        self.process.note(
            "receipt",
            operation=number,
            revision=receipt.revision,
            duplicate=receipt.is_duplicate,
            id=message_id,
        )
        if self.draw.random() < 0.2:
            with trio.move_on_after(2.0):
                await receipt.wait_acknowledged()
            self.process.note(
                "acknowledged",
                number=number,
                by=receipt.acknowledged_by,
                missing=None,
                duplicate=receipt.is_duplicate,
            )
        return receipt

    async def _named(self, number):
        return await self._publish(number, self._some_id())

    async def _execute(self, number):
        publications, dropped = [], self._some_id() if self.draw.random() < 0.4 else None
        for at in range(self.draw.randint(1, 3)):
            mine, mode = (number if not at else self.program.next_operation()), self._mode()
            message_id = None if at else dropped
            self._tell_message(number, mine, mode, message_id)
            publications.append(Publish(TOPIC, {"op": mine}, delivery=mode, message_id=message_id))
        result = await self.infra.execute([Set(f"{DID}{number}", number), *publications])
        success = [one.success for one in result.results[1:]]
        self.process.note("executed", operation=number, revision=result.revision, success=success)

    async def _transact(self, number):
        modes = [self._mode() for _ in range(self.draw.randint(1, 2))]
        numbers = [number, *[self.program.next_operation() for _ in modes[1:]]]
        message_id = self._some_id() if self.draw.random() < 0.3 else None
        gives_up = self.draw.random() < 0.15
        for mine, mode in zip(numbers, modes, strict=True):
            self._tell_message(number, mine, mode, message_id if mine == number else None)

        async def body(run):
            run.set(COMMON, (await run.get(COMMON) or 0) + 1)
            run.set(f"{DID}{number}", number)
            for mine, mode in zip(numbers, modes, strict=True):
                run.publish(
                    TOPIC, {"op": mine}, delivery=mode, message_id=message_id if mine == number else None
                )
            if gives_up:
                raise HandlerError

        await self.infra.transact(body)

    async def _replay(self, number):
        group = self.draw.choice(GROUPS)
        for letter in (await self.topic.dead_letters(group))[:2]:
            self.process.note("replays", operation=number, group=group, name=letter.name)
            await self.topic.replay(group, letter)

    async def _discard(self, number):
        group = self.draw.choice(GROUPS)
        for letter in (await self.topic.dead_letters(group))[:1]:
            if self.draw.random() < 0.3:
                self.process.note("discards", operation=number, group=group, name=letter.name)
                await self.topic.discard(group, letter)

    # ── listening without a group ───────────────────────────────────────────────────────────────

    async def listen(self):
        """Hear everything from now on, or from where it began before; again and again until it is calm."""
        last = None
        while True:
            start = None if self.process.calm else self.draw.choice((None, None, 0, last))
            number = self.program.next_subscription()
            # What was last before a restore may be long in coming again.
            stay = inf if self.process.calm else self.draw.choice((4.0 if start else inf, 1.0, 4.0))
            self.process.note("listens", subscription=number, start=start)
            try:
                with self.process.interruptible(), trio.move_on_after(stay):
                    async with self.topic.subscribe(from_revision=start) as messages:
                        self.process.note("listening", subscription=number)
                        while True:
                            last = await self._hear(messages, number)
            except EtcdError as error:
                self.process.note("deaf", subscription=number, error=type(error).__name__)
            await trio.sleep(0.1)

    async def _hear(self, messages, number):
        try:
            message = await messages.__anext__()
        except MessagesLostError as error:
            self.process.note("missed", subscription=number, after=error.after, up_to=error.up_to)
            return None
        operation = message.payload["op"]
        place = (message.revision, message.index)
        self.process.note("hears", subscription=number, place=place, number=operation)
        self.heard[operation] = None
        self._news.set()
        self._news = trio.Event()
        if self.draw.random() < 0.1 and not self.process.calm:
            await trio.sleep(self.draw.uniform(0, 2))
        return message.revision

    # ── consuming for a group ───────────────────────────────────────────────────────────────────

    async def consume(self, group):
        """Consume for a group, for a while or for good, again and again."""
        while True:
            stay = inf if self.process.calm else self.draw.choice((inf, inf, 3.0, 6.0))
            number = self.program.next_subscription()
            outlives = self.draw.random() < 0.3
            with self.process.interruptible(), trio.move_on_after(stay):
                async with trio.open_nursery() as outer:
                    try:
                        await self._consume(group, number, outer if outlives else None)
                    except EtcdInfraError as error:
                        self.process.note("left", group=group, error=type(error).__name__)
            await trio.sleep(0.1)

    async def _consume(self, group, number, outer):
        """Consume until something is wrong; handlers in `outer` outlive the subscription."""
        shape = self.shape
        subscription = self.topic.subscribe(
            group=group,
            shared=group == SHARED,
            from_revision=0 if shape.from_the_start else None,
            ack_after=shape.ack_after,
            max_retries=shape.max_retries,
        )
        wrong = []
        async with subscription as messages, trio.open_nursery() as inner:
            self.process.note("consumes", group=group, subscription=number)
            while not wrong:
                try:
                    message = await messages.__anext__()
                except MessagesLostError as error:
                    self.process.note("lost", group=group, after=error.after, up_to=error.up_to)
                    continue
                except EtcdInfraError as error:
                    wrong.append(error)
                    break
                handler = Handler(self, group, message)
                handler.tell_handed()
                if self.draw.random() < (0.7 if group == SHARED else 0.3):
                    (outer or inner).start_soon(handler.run)
                else:
                    await handler.run()
        raise wrong[0]


class Handler:
    """What is done with one delivery."""

    def __init__(self, life, group, message):
        self.life = life
        self.process = life.process
        self.draw = life.draw
        self.group = group
        self.message = message
        self.number = life.program.next_delivery()
        self.operation = message.payload["op"]
        self.name = message.handling.record.name
        # When it is calm everybody hurries, so that the bound on getting through is the product's own.
        self.hurries = self.process.calm
        self.way = self.draw.choice(("transaction", "scope", "ack") if self.hurries else HANDLING)
        if message.delivery is Delivery.AT_MOST_ONCE:
            self.way = "scope"

    def note(self, what, **facts):
        """Tell the checker something of this delivery."""
        self.process.note(what, delivery=self.number, **facts)

    def tell_handed(self):
        """Tell that it was handed over."""
        message = self.message
        self.note(
            "handed",
            group=self.group,
            name=self.name,
            operation=self.operation,
            place=(message.revision, message.index),
            attempt=message.attempt,
            mode=str(message.delivery),
            way=self.way,
            token=message.handling.custody.fence.token,
        )

    async def run(self):
        """Handle it, and tell what came of it."""
        outcome = "cancelled"
        patience = self.draw.uniform(0.0, 0.3) if self.way == "cancel" else inf
        with self.process.interruptible(), trio.move_on_after(patience):
            try:
                await getattr(self, f"_{self.way.replace(' ', '_')}")()
                outcome = "done"
            except HandlerError:
                outcome = "raised"
            except ConflictError:
                outcome = "conflict"
            except NotHeldError:
                outcome = "not held"
            except AckTimeoutError:
                outcome = "too late"
            except OutcomeUnknownError:
                outcome = "unknown"
            except EtcdInfraError:
                outcome = "failed"
        self.note("handled", outcome=outcome)

    async def _think(self):
        if not self.hurries:
            await trio.sleep(self.draw.uniform(0, min(0.2, self.life.shape.ack_after / 2)))

    async def _work(self, tx):
        """Apply the effect: once is right, twice would show."""
        key = f"{EFFECT}{self.group}/{self.operation}"
        tx.set(key, (await tx.get(key) or 0) + 1)
        tx.publish(ECHO, {"op": self.operation, "group": self.group})
        await self._think()

    async def _transaction(self, *, more=None):
        async with self.message.transaction() as tx:
            self.note("begins")
            try:
                await self._work(tx)
                if more is not None:
                    await more(tx)
                self.note("asks", effect=True)
            finally:
                self.note("ends")

    async def _crowded(self):
        async def count(tx):
            key = f"{TOTAL}{self.group}"
            total = await tx.get(key) or 0
            await self._think()
            tx.set(key, total + 1)

        await self._transaction(more=count)

    async def _raise_late(self):
        async def fail(_tx):
            await self._think()
            raise HandlerError

        await self._transaction(more=fail)

    async def _slow_transaction(self):
        async def take_long(_tx):
            await trio.sleep(self.life.shape.ack_after * 1.5)

        await self._transaction(more=take_long)

    @asynccontextmanager
    async def _scoped(self):
        async with self.message:
            self.note("begins")
            try:
                yield
                self.note("asks", effect=False)
            finally:
                self.note("ends")

    async def _scope(self):
        async with self._scoped():
            await self._think()

    async def _cancel(self):
        async with self._scoped():
            await trio.sleep(0.2)

    async def _slow(self):
        async with self._scoped():
            await trio.sleep(self.life.shape.ack_after * 1.5)

    async def _raise(self):
        async with self._scoped():
            await self._think()
            raise HandlerError

    async def _ack(self):
        await self._think()
        self.note("asks", effect=False)
        await self.message.ack()

    async def _nack(self):
        await self._think()
        await self.message.nack(self.draw.choice((0.0, 0.1, 0.5)))

    async def _forget(self):
        await trio.lowlevel.checkpoint()
