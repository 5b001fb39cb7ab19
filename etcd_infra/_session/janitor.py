"""
What a caller had no time to clean up is cleaned up here, until it is definite or the session is over.

A cancelled caller waits two seconds at most; what is left goes to the janitor. As a backstop it lists what
hangs on the session's lease now and then: a key that this process does not know, seen twice, is deleted.
On the way it counts the sessions of the namespace.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Range, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra.errors import EtcdError, OutcomeUnknownError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.background import Background
    from etcd_infra._session.keepalive import LivingLease

logger = logging.getLogger("etcd_infra.janitor")


class Janitor:
    """Repeats clean-up jobs in the session's nursery."""

    def __init__(
        self, backend: Backend, lease: LivingLease, random: Random, nursery: Background, sessions: bytes
    ) -> None:
        self._backend = backend
        self._lease = lease
        self._random = random
        self._nursery = nursery
        self._jobs = 0
        self._idle = trio.Event()
        self._idle.set()
        self._suspects: frozenset[bytes] = frozenset()
        self._sessions = sessions
        self.sessions_seen = 1
        self.known_keys: set[bytes] = set()

    def take_over(self, job: Callable[[], Awaitable[object]]) -> None:
        """Repeat `job` until it returns; an `EtcdError` means that nothing is definite yet."""
        if self._lease.is_lost() or self._lease.closed:
            return
        self._jobs += 1
        self._idle = trio.Event()
        self._nursery.start_soon(self._repeat, job)

    async def wait_idle(self) -> None:
        """Wait until no job is left."""
        while self._jobs:
            await self._idle.wait()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _repeat(self, job: Callable[[], Awaitable[object]]) -> None:
        failures = 0
        try:
            while not self._lease.is_lost():
                try:
                    await job()
                except EtcdError as error:
                    hopeful = isinstance(error, UnavailableError | OutcomeUnknownError)
                    level = logging.INFO if hopeful else logging.WARNING
                    logger.log(level, "clean-up is not definite yet: %s", error)
                    await trio.sleep(delay(failures, self._random.random()))
                    failures += 1
                else:
                    return
        finally:
            self._jobs -= 1
            if not self._jobs:
                self._idle.set()

    async def patrol(self) -> None:
        """Look every third of the TTL for keys that hang on the lease and belong to nobody here."""
        while not self._lease.is_lost():
            await trio.sleep(self._lease.ttl / 3)
            try:
                await self._look()
            except EtcdError as error:
                logger.debug("could not look for left-over keys: %s", error)

    async def _look(self) -> None:
        hanging = (await self._backend.lease_time_to_live(self._lease.id, keys=True)).keys
        strangers = frozenset(hanging) - self.known_keys
        # In order: what is sent must not depend on hash seeds, or a simulation could not be repeated.
        for key in sorted(strangers & self._suspects):
            found = await self._backend.get(key)
            if found is not None and found.lease == self._lease.id and key not in self.known_keys:
                logger.warning("deleting %r: it hangs on our lease, and nobody here knows it", key)
                incarnation = Compare.created_at(key, found.create_revision)
                await self._backend.txn(Txn((incarnation,), (DeleteRange(KeyRange.one(key)),)))
        self._suspects = strangers
        everybody = await self._backend.range(Range(KeyRange.prefix(self._sessions), keys_only=True))
        self.sessions_seen = sum(key.key.count(b"/", len(self._sessions)) == 0 for key in everybody.kvs)
