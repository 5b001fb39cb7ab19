"""
One watch for all the keys that a process waits for or holds under one prefix.

Whoever waits or holds listens to single keys, or to a whole line for a moment; the watch on the prefix is
fanned out by key. It starts from now each time it is created, and everybody reads again then: a watch
that starts in the past is served by etcd's slow loop (64 ms median under load against 8 ms).
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Final, Protocol

import trio

from etcd_infra._etcd.model import KeyRange, Range, RangeResult, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra.errors import EtcdError, StoreResetError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import WatchBatch

logger = logging.getLogger("etcd_infra.watch")

GUARD_AFTER_SECONDS: Final = 0.25
GUARD_TOGETHER_SECONDS: Final = 0.1
GUARD_AGAIN_SECONDS: Final = 0.5
IDLE_SECONDS: Final = 30.0
READ_TOGETHER: Final = 100


class Listener(Protocol):
    """Somebody who cares for keys; both methods are called on the Trio loop and must not block."""

    def key_deleted(self, key: bytes, revision: int) -> None:
        """Hear that one of the keys was deleted at `revision`."""
        ...

    def read_again(self) -> None:
        """Hear that the watch was made anew: deletions may have been missed."""
        ...


class Heir(Protocol):
    """Somebody in this process who is next in line behind a key."""

    key: bytes

    def inherit(self, mine: RangeResult) -> None:
        """Take in what the Txn that deleted the key ahead read of `self.key`."""
        ...


class Guarded:
    """A key that this process holds: `gone` is called once if its incarnation ends."""

    __slots__ = ("created", "key", "since", "watch")

    def __init__(self, watch: KeyWatch, key: bytes, created: int) -> None:
        self.watch = watch
        self.key = key
        self.created = created
        self.since = trio.current_time()

    def key_deleted(self, key: bytes, revision: int) -> None:  # noqa: ARG002
        """See `Listener`."""
        if revision > self.created:
            self.watch.report_gone(self)

    def read_again(self) -> None:
        """See `Listener`."""
        self.watch.doubt(self)

    def forget(self) -> None:
        """Guard it no more: the key's end is its holder's own doing from now on."""
        self.watch.unguard(self)


class KeyWatch:
    """
    The watch on `prefix`: opened when somebody first listens, closed when nobody has for a while.

    `run` must be running in the background.

    Attributes:
        told_up_to: The revision that a read must have reached: what happened before it will not be told
        (again).
    """

    def __init__(self, backend: Backend, prefix: bytes, random: Random) -> None:
        self._backend = backend
        self._prefix = prefix
        self._random = random
        # Dictionaries as ordered sets: the order of wake-ups must not depend on addresses.
        self._listeners: defaultdict[bytes, dict[Listener, None]] = defaultdict(dict)
        self._refused: EtcdError | None = None
        self.told_up_to = 0
        self._heirs: dict[bytes, Heir] = {}
        self._wanted = trio.Event()
        self._created = trio.Event()
        self._guards: dict[Guarded, Callable[[], None]] = {}
        self._fresh: deque[Guarded] = deque()
        self._doubted: deque[Guarded] = deque()
        self._failures = 0
        self._to_do = trio.Event()

    # ── listening ───────────────────────────────────────────────────────────────────────────────

    def listen(self, name: bytes, listener: Listener) -> None:
        """Tell `listener` of deletions of the key `name`, or, if it ends in a slash, in the line `name`."""
        self._listeners[name][listener] = None
        self._wanted.set()

    def ignore(self, name: bytes, listener: Listener) -> None:
        """Undo `listen`; harmless if there was none."""
        if listeners := self._listeners.get(name):
            listeners.pop(listener, None)
            if not listeners:
                del self._listeners[name]

    def stand_behind(self, ahead: bytes, heir: Heir | None) -> None:
        """Note who is next in line behind the key `ahead`; None: nobody any more."""
        if heir is None:
            self._heirs.pop(ahead, None)
        else:
            self._heirs[ahead] = heir

    def heir_of(self, key: bytes) -> Heir | None:
        """Return who in this process is next in line behind `key`."""
        return self._heirs.get(key)

    @property
    def is_open(self) -> bool:
        """Whether the watch exists: whoever listens now is told of everything from now on."""
        return self._created.is_set() and self._refused is None

    async def ready(self) -> None:
        """
        Wait until the watch exists: a read from now on, and then the watch, miss nothing.

        Call it after `listen`.

        Raises:
            EtcdError: etcd refuses the watch.
        """
        while not self._created.is_set():
            if self._refused is not None:
                raise self._refused
            await self._created.wait()
        await trio.lowlevel.checkpoint_if_cancelled()

    def guard(self, key: bytes, created: int, gone: Callable[[], None]) -> Guarded:
        """
        Call `gone()` if the incarnation of `key` that was created at `created` ends.

        It is covered after a quarter of a second, so that short holds cost nothing.
        """
        guarded = Guarded(self, key, created)
        self._guards[guarded] = gone
        self._fresh.append(guarded)
        self._to_do.set()
        return guarded

    def unguard(self, guarded: Guarded) -> None:
        """Undo `guard`."""
        self._guards.pop(guarded, None)
        self.ignore(guarded.key, guarded)

    def report_gone(self, guarded: Guarded) -> None:
        """Tell the holder, once."""
        gone = self._guards.get(guarded)
        self.unguard(guarded)
        if gone is not None:
            gone()

    def doubt(self, guarded: Guarded) -> None:
        """Read this key again soon."""
        self._doubted.append(guarded)
        self._to_do.set()

    # ── background ──────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Keep the watch open while it is wanted, and read the guarded keys; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_guards)
            failures = 0
            while True:
                await self._wanted.wait()
                try:
                    await self._watch()
                    failures = 0
                except EtcdError as error:
                    logger.warning("the watch on %r broke: %s", self._prefix, error)
                    self._broke(error)
                    await trio.sleep(delay(failures, self._random.random()))
                    failures += 1

    def _broke(self, error: EtcdError) -> None:
        if not isinstance(error, UnavailableError | StoreResetError):
            # Waiters must not wait for what will never be told; holders are read from time to time.
            self._refused = error
            created, self._created = self._created, trio.Event()
            created.set()
            self._everybody_reads_again()

    async def _watch(self) -> None:
        unused_since = None
        try:
            watched = KeyRange.prefix(self._prefix)
            async with self._backend.watch(watched, no_put=True, coordination=True) as stream:
                self.told_up_to = stream.created_revision
                self._created.set()
                self._refused = None
                self._everybody_reads_again()
                async for batch in stream:
                    if self._listeners:
                        unused_since = None
                    elif unused_since is None:
                        unused_since = trio.current_time()
                    elif trio.current_time() - unused_since > IDLE_SECONDS:
                        self._wanted = trio.Event()
                        return
                    self._deliver(batch)
        finally:
            if self._created.is_set():
                self._created = trio.Event()

    def deliver_deleted(self, key: bytes, revision: int) -> None:
        """Tell whoever listens that `key` was deleted; telling it twice does no harm."""
        self.told_up_to = max(self.told_up_to, revision)
        line = key[: key.rfind(b"/") + 1]
        for name in (key, line):
            for listener in tuple(self._listeners.get(name, ())):
                listener.key_deleted(key, revision)

    def _deliver(self, batch: WatchBatch) -> None:
        if batch.created:
            self.told_up_to = batch.revision
            self._everybody_reads_again()
        for event in batch.events:
            if event.is_delete:
                self.deliver_deleted(event.key, event.revision)

    def _everybody_reads_again(self) -> None:
        for listeners in tuple(self._listeners.values()):
            for listener in tuple(listeners):
                listener.read_again()

    async def _keep_guards(self) -> None:
        while True:
            await self._to_do.wait()
            self._to_do = trio.Event()
            while self._fresh or self._doubted:
                await self._settle_some()

    async def _settle_some(self) -> None:
        if not self._doubted:
            # A little later than the first one's time, so that a busy process covers many at once.
            await trio.sleep_until(self._fresh[0].since + GUARD_AFTER_SECONDS + GUARD_TOGETHER_SECONDS)
        self._begin_to_cover()
        doubted = [self._doubted.popleft() for _ in range(min(READ_TOGETHER, len(self._doubted)))]
        held = [guarded for guarded in dict.fromkeys(doubted) if guarded in self._guards]
        if not held:
            return
        try:
            if self._refused is None:
                await self.ready()
            await self._read(held)
            settled = self._refused is None
        except EtcdError:
            settled = False
        if settled:
            self._failures = 0
            return
        self._doubted.extend(guarded for guarded in held if guarded in self._guards)
        patience = delay(self._failures, self._random.random(), cap=GUARD_AGAIN_SECONDS)
        await trio.sleep(patience if self._refused is None else GUARD_AGAIN_SECONDS)
        self._failures += 1

    def _begin_to_cover(self) -> None:
        now = trio.current_time()
        while self._fresh and self._fresh[0].since + GUARD_AFTER_SECONDS <= now:
            guarded = self._fresh.popleft()
            if guarded in self._guards:
                self.listen(guarded.key, guarded)
                self._doubted.append(guarded)

    async def _read(self, guards: Sequence[Guarded]) -> None:
        reads = tuple(Range(KeyRange.one(guarded.key), keys_only=True) for guarded in guards)
        answer = await self._backend.txn(Txn(success=reads))
        # etcd: some servers answer linearizable reads with an older revision now and then (#20418): from
        # before the key was created, or from before its end was told.
        needed = max(self.told_up_to, *(guarded.created for guarded in guards))
        if answer.revision < needed:
            raise UnavailableError(f"a stale read: at {answer.revision}, not {needed}")
        for guarded, found in zip(guards, answer.results, strict=True):
            assert isinstance(found, RangeResult)
            if not found.kvs or found.kvs[0].create_revision != guarded.created:
                self.report_gone(guarded)
