"""
A range of keys, followed without a gap: what is there, then every change, in order, each once.

Algorithm
    1. Read everything at one revision, page by page.
    2. Watch from the next revision on; reconnects are the backend's business.
    3. If history was compacted before it was read here: begin anew, and say what may have been missed.

Guarantees
    Never goes back: an answer from before what was told is asked again; only a store that was restored or
    wiped is told from a lower revision on, and that is said. Bounded memory: a consumer that does not keep
    up is served from etcd's history, and told of a gap if that is gone; nothing is read ahead here.

Source
    etcd ``client/v3/mirror``, which stops where history is compacted.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._policy.backoff import delay
from etcd_infra._session.pages import Pages
from etcd_infra.errors import CompactedError, EtcdError, StoreResetError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import Event, KeyRange, KeyValue

logger = logging.getLogger("etcd_infra.watch")

MAX_STALE_READS: Final = 4


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    Everything in the range at `revision`.

    Attributes:
        missed_after: None for the first one; else the last revision that was told before: changes between
            that and `revision` were not told one by one.
        store_reset: The store was restored or wiped: revisions may be lower than those told before.
    """

    revision: int
    kvs: tuple[KeyValue, ...]
    missed_after: int | None = None
    store_reset: bool = False


@dataclass(frozen=True, slots=True)
class Changes:
    """All that happened in the range at one revision or several, in order; never a part of a revision."""

    events: tuple[Event, ...]


class Mirror:
    """The consumer's end; made by `open_mirror`."""

    def __init__(self, channel: trio.MemoryReceiveChannel[Snapshot | Changes]) -> None:
        self._channel = channel
        self._error: EtcdError | None = None

    async def receive(self) -> Snapshot | Changes:
        """
        Wait for what comes next: a `Snapshot` first.

        Raises:
            EtcdError: etcd refuses to let these keys be read or watched; nothing comes any more.

        Cancellation:
            Nothing is lost; call again.
        """
        try:
            return await self._channel.receive()
        except trio.EndOfChannel:
            assert self._error is not None
            raise self._error from None

    def fail(self, error: EtcdError) -> None:
        """Note why nothing comes any more."""
        self._error = error


@asynccontextmanager
async def open_mirror(backend: Backend, keys: KeyRange, random: Random) -> AsyncGenerator[Mirror]:
    """
    Follow `keys`; entering waits until they are read and watched, under the caller's scope.

    Raises:
        EtcdError: etcd refuses.

    Round trips:
        Two, and one more for each further 256 keys.
    """
    send, receive = trio.open_memory_channel[Snapshot | Changes](0)
    mirror = Mirror(receive)
    follower = _Follower(backend, keys, random, send)

    async def follow(task_status: trio.TaskStatus[None]) -> None:
        watched = False

        def started() -> None:
            nonlocal watched
            if not watched:
                watched = True
                task_status.started()

        with send:
            try:
                await follower.run(started)
            except EtcdError as error:
                if not watched:
                    raise
                mirror.fail(error)

    async with open_background() as background:
        await background.start(follow)
        yield mirror


class _Follower:
    """Reads and watches for ever; `_told` is the revision up to which everything was told."""

    def __init__(
        self,
        backend: Backend,
        keys: KeyRange,
        random: Random,
        send: trio.MemorySendChannel[Snapshot | Changes],
    ) -> None:
        self._backend = backend
        self._keys = keys
        self._random = random
        self._send = send
        self._told = 0
        self._up_to_date = False
        self._reset = False
        self._stale_reads = 0

    async def run(self, started: Callable[[], None]) -> None:
        failures = 0
        while True:
            told = self._told
            try:
                await self._follow(started)
            except CompactedError as error:
                logger.warning("%s is read again: %s", self._keys, error)
                self._up_to_date = False
            except StoreResetError as error:
                logger.warning("%s is read again: %s", self._keys, error)
                self._up_to_date, self._reset = False, True
            except UnavailableError as error:
                logger.info("%s can not be followed at the moment: %s", self._keys, error)
            failures = 0 if self._told != told else failures + 1
            await trio.sleep(delay(failures, self._random.random()))

    async def _follow(self, started: Callable[[], None]) -> None:
        snapshot = None if self._up_to_date else await self._read()
        revision = snapshot.revision if snapshot else self._told
        async with self._backend.watch(self._keys, start_revision=revision + 1, progress_notify=True) as stream:
            started()
            if snapshot:
                await self._send.send(snapshot)
                self._told, self._up_to_date, self._reset = revision, True, False
            async for batch in stream:
                if batch.created:
                    continue  # its revision is the store's: what happened up to it comes after it
                if batch.events:
                    await self._send.send(Changes(batch.events))
                self._told = max(self._told, batch.revision)

    async def _read(self) -> Snapshot:
        pages = Pages(self._backend, self._keys)
        kvs = list(await pages.next())
        if pages.revision < self._told and not self._reset:
            # etcd: some servers answer linearizable reads with an older revision now and then (#20418).
            self._stale_reads += 1
            if self._stale_reads > MAX_STALE_READS:
                raise StoreResetError(f"the store went back to revision {pages.revision}")
            raise UnavailableError(f"a stale read: at {pages.revision}, not {self._told}")
        self._stale_reads = 0
        while not pages.finished:
            kvs += await pages.next()
        missed_after = self._told or None
        return Snapshot(pages.revision, tuple(kvs), missed_after, self._reset)
