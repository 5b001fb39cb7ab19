"""Programs that move money, keep rules and append to lists by transactions of every kind, and tell what they were told."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random

import trio

from etcd_infra import Cas, Decrement, Delete, Increment, Isolation, Set, open_coordinator
from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import Txn
from etcd_infra._wrappers.grouped import Grouped
from etcd_infra._wrappers.observed import Observed
from etcd_infra.errors import (
    ConflictError,
    EtcdError,
    LostError,
    OutcomeUnknownError,
    TransactionTimeoutError,
)
from etcd_infra.testing import FaultKind, Settings

NAMESPACE = "sim"
KEYS = Keys(NAMESPACE)
ACCOUNT, MARK, PAIR, ITEM, LOG, PAD = "account/", "did/", "pair/", "item/", "log/", "pad/"
MOST_ITEMS = 4
SIDES = ("a", "b")
# What a stranger may delete or make anew: what is kept, what is promised, or both promises' halves.
FOREIGN = tuple(prefix.decode() for prefix in (KEYS.state(ACCOUNT), KEYS.transactions, KEYS.intents))
ONE_MOMENT = (Isolation.SERIALIZABLE_SNAPSHOT, Isolation.SERIALIZABLE)
VALIDATED = (*ONE_MOMENT, Isolation.REPEATABLE_READS)
FINALLY = ("add", "move", "promise")
# Each way as often as it is worth it.
WAYS = (
    *("add", "swap", "move", "move", "promise", "promise", "promise"),
    *("look", "audit", "leave", "leave", "come back", "item", "item", "append", "blind", "pad", "wait"),
)


@dataclass(frozen=True)
class Shape:
    """What a seed decides besides its faults; `promise` is the TTL of what is begun in two phases."""

    ttl: int
    promise: int
    accounts: int
    tasks: int
    pause: float
    think: float
    foreign: str
    settings: Settings
    grouped: bool = False


def shape_of(seed, *, kinds=tuple(FaultKind)):
    """Draw a run's shape: small, and crowded."""
    draw = Random(f"{seed}/shape")
    ttl = draw.choice((2, 3, 5, 10))
    promise = draw.choice((1, 2, 3))
    foreign = draw.choice(FOREIGN)
    nodes = ("a", "b", "c")[: draw.choice((2, 2, 3))]
    shape = Shape(
        ttl=ttl,
        promise=promise,
        accounts=draw.choice((2, 3, 4)),
        tasks=draw.choice((1, 1, 2)),
        pause=draw.choice((0.05, 0.2, 0.4)),
        think=draw.choice((0.0, 0.02, 0.2)),
        foreign=foreign,
        settings=settings_of(nodes, draw.choice((12.0, 16.0, 20.0)), ttl, promise, foreign, kinds),
    )
    # So few tasks would never have their transactions grouped by themselves.
    return replace(shape, grouped=True, tasks=3, pause=0.6) if draw.random() < 0.2 else shape


def shape_from(*, nodes, seconds, **others):
    """Make a shape of its fields as JSON has them."""
    settings = settings_of(tuple(nodes), seconds, others["ttl"], others["promise"], others["foreign"])
    return Shape(settings=settings, **others)


def settings_of(nodes, seconds, ttl, promise, foreign, kinds=tuple(FaultKind)):
    """Settle how a run goes: everybody must get through when it is calm, past whatever the dead have promised."""
    calm = 2.0 * (ttl + promise) + 10
    return Settings(nodes=nodes, seconds=seconds, calm_seconds=calm, prefix=foreign.encode(), kinds=kinds)


class GivenUpError(Exception):
    """The program has rolled back what it had promised."""


class TransactionProgram:
    """The program of one run; an instance is what `simulate` calls."""

    def __init__(self, shape):
        self.shape = shape
        self._operations = 0

    async def __call__(self, process):
        """Work until it is calm; then write every account once more in each way, and rest."""
        while True:
            try:
                async with self._open(process) as infra:
                    async with trio.open_nursery() as nursery:
                        for _ in range(self.shape.tasks):
                            nursery.start_soon(self._work, process, infra)
                    await process.rest()
                    return
            except (EtcdError, LostError) as error:
                process.note("refused", error=type(error).__name__)
                await trio.sleep(0.5)

    @asynccontextmanager
    async def _open(self, process):
        def observe(call):
            # What had no answer, and so may have been applied, or may still be.
            if isinstance(call.request, Txn) and call.error in {OutcomeUnknownError, trio.Cancelled}:
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
        for way in FINALLY:
            while not await self._operate(process, infra, way):
                await trio.sleep(0.1)

    async def _operate(self, process, infra, way):
        """Do one operation, and tell what came of it; return whether it was done."""
        self._operations += 1
        operation = Operation(self, process, infra, self._operations)
        process.note("asked", operation=operation.number, way=way)
        patience = process.random.uniform(0.2, 2) if way == "wait" else 60.0
        outcome, error = "cancelled", ""
        with process.interruptible(), trio.move_on_after(patience):
            try:
                await WAY[way](operation)
                outcome = "committed"
            except OutcomeUnknownError:
                outcome = "unknown"
            except (ConflictError, EtcdError, GivenUpError, LostError, TransactionTimeoutError) as raised:
                outcome, error = "failed", type(raised).__name__
        process.note("told", operation=operation.number, outcome=outcome, error=error)
        return outcome == "committed"


class Operation:
    """One operation: what its way needs."""

    def __init__(self, program, process, infra, number):
        self.shape = program.shape
        self.process = process
        self.infra = infra
        self.number = number
        self.draw = process.random
        self.last = process.calm

    def note(self, what, **facts):
        """Tell the checker something of this operation."""
        self.process.note(what, operation=self.number, **facts)

    @property
    def mark(self):
        """The key whose every put is one application of this operation."""
        return f"{MARK}{self.number}"

    def transfer(self, most):
        """Draw what each of two to `most` accounts gains; nothing is made or lost."""
        accounts = [f"{ACCOUNT}{number}" for number in range(self.shape.accounts)]
        if self.last:
            chosen = accounts
        else:
            chosen = self.draw.sample(accounts, self.draw.randint(2, min(most, len(accounts))))
        amounts = [self.draw.randint(1, 9) for _ in chosen[1:]]
        return dict(zip(chosen, [-sum(amounts), *amounts], strict=True))

    async def think(self):
        """Take a moment, so that something can happen meanwhile."""
        if self.shape.think and not self.last:
            await trio.sleep(self.draw.uniform(0, self.shape.think))

    async def transact(self, level, body):
        """Run `body` as a transaction, and tell what each run of it saw and wrote."""
        runs = 0

        async def recorded(tx):
            nonlocal runs
            runs += 1
            run = Run(self, tx, runs, level)
            try:
                await body(run)
                run.whole = True
            finally:
                run.tell()

        await self.infra.transact(recorded, level)


class Run:
    """One run of a transaction's body, recorded."""

    def __init__(self, operation, tx, number, level):
        self.operation = operation
        self.tx = tx
        self.number = number
        self.level = level
        self.reads = {}
        self.lists = {}
        self.writes = {}
        self.whole = False
        operation.note("run", run=number)

    async def get(self, key):
        """Read a key that this run has not written."""
        value = await self.tx.get(key)
        self.reads[key] = value
        await self._saw()
        return value

    async def list(self, prefix):
        """Read a range that this run has not written to."""
        found = await self.tx.list(prefix)
        self.lists[prefix] = found
        await self._saw()
        return found

    async def _saw(self):
        if len(self.reads) + len(self.lists) == 1:
            self.operation.note("first", run=self.number)
        await self.operation.think()

    def set(self, key, value):
        """Write a key, and this operation's mark with it."""
        self.tx.set(key, value)
        self.tx.set(self.operation.mark, [self.operation.number, self.number])
        self.writes[key] = value

    def delete(self, key):
        """Delete a key, and leave this operation's mark."""
        self.tx.delete(key)
        self.tx.set(self.operation.mark, [self.operation.number, self.number])
        self.writes[key] = None

    def tell(self):
        """Tell what was seen and written."""
        self.operation.note(
            "ran",
            run=self.number,
            level=self.level,
            whole=self.whole,
            reads=self.reads,
            lists=self.lists,
            writes=self.writes,
        )


# ── money ───────────────────────────────────────────────────────────────────────────────────────


async def add(op):
    """Move money by execute: etcd-infra reads, and guards what it read."""
    gains = op.transfer(3)
    op.note("adds", gains=gains)
    operations = [Increment(key, gain) if gain > 0 else Decrement(key, -gain) for key, gain in gains.items()]
    result = await op.infra.execute([*operations, Set(op.mark, [op.number, 0])])
    op.note("applied", revision=result.revision, values={one.key: one.value for one in result.results[:-1]})


async def swap(op):
    """Move money by execute, guarded by the versions that the program has read; it may fail."""
    gains = op.transfer(2)
    found = await op.infra.state.get_many(gains)
    await op.think()
    op.note("adds", gains=gains)
    operations = [
        Cas(key, (entry.value if entry else 0) + gains[key], expected_version=entry.version if entry else 0)
        for key, entry in found.items()
    ]
    result = await op.infra.execute([*operations, Set(op.mark, [op.number, 0])])
    op.note("applied", revision=result.revision, values={one.key: one.value for one in result.results[:-1]})


async def move(op):
    """Move money by transact."""

    async def body(run):
        for key, gain in gains.items():
            run.set(key, (await run.get(key) or 0) + gain)

    gains = op.transfer(3)
    await op.transact(op.draw.choice(VALIDATED), body)


async def promise(op):
    """Move money in two phases; its owner may take too long, give up, or vanish at any step."""
    gains = op.transfer(3)
    op.note("adds", gains=gains)
    seconds = op.shape.promise
    pause = 0.0 if op.last else op.draw.choice((0.0, 0.0, 0.05, seconds / 2, 1.5 * seconds))
    gives_up = not op.last and op.draw.random() < 0.15
    tx = None
    try:
        async with op.infra.begin(ttl=seconds) as tx:
            op.note("begun", transaction=tx.transaction_id)
            for key, gain in gains.items():
                tx.add(Increment(key, gain))
            tx.add(Set(op.mark, [op.number, 0]))
            await tx.prepare()
            op.note("prepared")
            await trio.sleep(pause)
            if gives_up:
                await tx.rollback()
                raise GivenUpError
            result = await tx.commit()
            values = {one.key: one.value for one in result.results[:-1]}
            op.note("applied", revision=result.revision, values=values)
    finally:
        if tx is not None:
            op.note("left", status=str(tx.status))


async def look(op):
    """Read all accounts at once, without a transaction."""
    op.note("look")
    found = await op.infra.state.get_many([f"{ACCOUNT}{number}" for number in range(op.shape.accounts)])
    op.note("looked", values={key: entry.value if entry else None for key, entry in found.items()})


async def audit(op):
    """Sum up all accounts in a transaction that writes nothing."""

    async def body(run):
        if by_key:
            for number in range(op.shape.accounts):
                await run.get(f"{ACCOUNT}{number}")
        else:
            await run.list(ACCOUNT)

    by_key = op.draw.random() < 0.5
    await op.transact(op.draw.choice(VALIDATED), body)


# ── rules over what is read ─────────────────────────────────────────────────────────────────────


async def leave(op):
    """Go off duty if both of a pair are on: of two who do so at once, one must stay."""

    async def body(run):
        duty = {side: await run.get(f"{PAIR}{side}") for side in SIDES}
        if all(value is None or value[0] for value in duty.values()):
            run.set(f"{PAIR}{mine}", [False, op.number])

    mine = op.draw.choice(SIDES)
    await op.transact(op.draw.choice(VALIDATED), body)


async def come_back(op):
    """Go on duty."""

    async def body(run):
        await run.get(f"{PAIR}{mine}")
        run.set(f"{PAIR}{mine}", [True, op.number])

    mine = op.draw.choice(SIDES)
    await op.transact(op.draw.choice(VALIDATED), body)


async def item(op):
    """Add an item if there are few, else take one away, and keep count elsewhere."""

    async def body(run):
        items = await run.list(ITEM)
        free = [name for number in range(2 * MOST_ITEMS) if (name := f"{ITEM}{number}") not in items]
        if len(items) < MOST_ITEMS and (adds or not items):
            run.set(free[place % len(free)], [op.number])
        else:
            run.delete(sorted(items)[place % len(items)])
        run.set(f"{LOG}count", [len(items), op.number])

    adds, place = op.draw.random() < 0.5, op.draw.randrange(100)
    await op.transact(op.draw.choice(VALIDATED), body)


async def append(op):
    """Append to one list what another one holds last."""

    async def body(run):
        other = await run.get(f"{LOG}{1 - mine}") or []
        own = await run.get(f"{LOG}{mine}") or []
        run.set(f"{LOG}{mine}", [*own[-5:], op.number, other[-1] if other else 0])

    mine = op.draw.choice((0, 1))
    await op.transact(op.draw.choice(VALIDATED), body)


async def blind(op):
    """Write what was not read, beside what was."""

    async def body(run):
        await run.get(f"{LOG}{mine}")
        await op.think()
        run.set(f"{PAD}{mine}", [op.number])

    mine = op.draw.choice((0, 1))
    await op.transact(op.draw.choice(VALIDATED), body)


async def pad(op):
    """Write what rests on nothing, at the level that promises nothing; or by execute."""

    async def body(run):
        for number in (0, 1):
            await run.get(f"{PAD}{number}")
        run.set(f"{PAD}{mine}", [op.number])

    mine = op.draw.choice((0, 1))
    if op.draw.random() < 0.6:
        await op.transact(Isolation.READ_COMMITTED, body)
        return
    sets = {f"{PAD}{mine}": [op.number], f"{PAD}{1 - mine}": None}
    op.note("sets", values=sets)
    written = [Set(key, value) if value else Delete(key) for key, value in sets.items()]
    result = await op.infra.execute([*written, Set(op.mark, [op.number, 0])])
    op.note("applied", revision=result.revision, values={})


async def wait(op):
    """Wait until a list was written to, for a while."""

    async def body(run):
        found = await run.get(f"{LOG}{mine}")
        before.append(found)
        if found == before[0]:
            await run.tx.retry()

    mine = op.draw.choice((0, 1))
    before = []
    await op.transact(op.draw.choice(ONE_MOMENT), body)


WAY = {
    "add": add,
    "swap": swap,
    "move": move,
    "promise": promise,
    "look": look,
    "audit": audit,
    "leave": leave,
    "come back": come_back,
    "item": item,
    "append": append,
    "blind": blind,
    "pad": pad,
    "wait": wait,
}
