"""
A session: a lease that this process keeps alive, and everything that hangs on it.

Keys
    ``{ns}session/{lease}``  JSON node id, host, start; on the lease. Its mod revision is the *generation*.
    ``{ns}epoch``            a random id, created once: the lineage of the store.

Algorithm
    1. Grant a lease under an id of our own choice, so that a grant without an answer is simply repeated.
    2. Write the session key, `[absent] → [put]`; in the same Txn read or create the epoch and the first writer
       slot (`slots.py`).
    3. Renew every fifth of the TTL (`keepalive.py`); a janitor cleans up what cancelled callers left.
    4. At the end wait for the janitor, then revoke; both bounded by two seconds.

Guarantees
    A Txn that compares ``mod(session key) == generation`` and got no answer is dead for ever once the
    session key was rewritten; and every put on the lease is dead once the lease is.

Does not guarantee
    That the lease lives while it is trusted: etcd may revoke a renewed lease. Holders watch their keys.

Source
    etcd ``client/v3/concurrency/session.go``; the generation is ours.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._session.granting import grant, revoke_in_time
from etcd_infra._session.janitor import Janitor
from etcd_infra._session.keepalive import (
    CLEAN_UP_SECONDS,
    LivingLease,
    SessionStatus,
    Tether,
    clean_up_deadline,
)
from etcd_infra._session.key_watch import KeyWatch
from etcd_infra._session.session_key import SessionKey
from etcd_infra._session.slots import Slots
from etcd_infra.errors import (
    SessionLostError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.background import Background
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._session.clock import Clock
    from etcd_infra._session.tally import Tally

logger = logging.getLogger("etcd_infra.session")


class Held(Protocol):
    """What a task holds, as far as a session must know it."""

    def is_held(self) -> bool:
        """Whether it is held still."""
        ...


class Session:
    """
    A living lease, its generation, its janitor and its key watches; made by `open_session`.

    Attributes:
        lease: The lease, with `id`, the granted `ttl` in seconds, and `remaining()`.
        own_key: The session key: the generation, and the store's epoch.
        own_leases: Leases of single holds, to be revoked at the end with the session's.
        owners: What each task holds or (None) waits for, by line: so that none waits for itself.
    """

    def __init__(  # noqa: PLR0913 - only open_session calls it
        self,
        backend: Backend,
        keys: Keys,
        lease: LivingLease,
        *,
        info: bytes,
        node_id: str,
        clock: Clock,
        random: Random,
        nursery: Background,
        tally: Tally,
    ) -> None:
        self.backend = backend
        self.keys = keys
        self.lease = lease
        self.node_id = node_id
        self.clock = clock
        self.random = random
        self.tally = tally
        self.own_key = SessionKey(backend, keys, lease, info, random)
        self.janitor = Janitor(backend, lease, random, nursery, keys.sessions)
        self.janitor.known_keys.update((self.own_key.key, keys.slot(lease.id, 0)))
        self.slots = Slots(self)
        self.owners: dict[tuple[bytes, trio.lowlevel.Task], Held | None] = {}
        self.own_leases: dict[LivingLease, None] = {}
        self._nursery = nursery
        self._clean_up_ran_out_at = -inf
        self._watches: dict[bytes, KeyWatch] = {}
        self._numbers = 0
        self._tasks: WeakKeyDictionary[trio.lowlevel.Task, int] = WeakKeyDictionary()
        self._tasks_seen = 0

    def __repr__(self) -> str:
        return f"<Session {self.node_id} lease={self.lease.id:x} {self.status}>"

    @property
    def status(self) -> SessionStatus:
        """ALIVE, SUSPENDED (a renewal is overdue) or LOST, by the clocks of this moment."""
        self.lease.is_lost()
        return self.lease.status

    @property
    def connected_nodes(self) -> int:
        """How many sessions the namespace has, this one included; at most a third of the TTL old."""
        return self.janitor.sessions_seen

    def remaining(self) -> float:
        """Seconds for which the session is proven to live."""
        return self.lease.remaining()

    def check(self) -> None:
        """
        Do nothing while the session lives.

        Raises:
            SessionLostError: it is lost; what hung on it is gone or will be.
        """
        if self.lease.is_lost():
            raise SessionLostError(str(self.lease.error)) from self.lease.error

    @property
    def session(self) -> Session:
        """This session: see `SessionSource`."""
        return self

    async def current(self) -> Session:
        """Return this session: a plain session is its own only one."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.check()
        return self

    async def wait_lost(self) -> None:
        """Wait until the session is lost."""
        await self.lease.lost.wait()

    def tether(self, *leases: LivingLease) -> Tether:
        """Return a scope, to be entered, that is cancelled when the session, or one of `leases`, is lost."""
        return Tether(self.lease, *leases)

    def next_number(self) -> int:
        """Return a number that this session never used in a key's name."""
        self._numbers += 1
        return self._numbers

    def number_of_task(self) -> int:
        """Return the running task's number, the same as long as it runs."""
        task = trio.lowlevel.current_task()
        if task not in self._tasks:
            self._tasks_seen += 1
            self._tasks[task] = self._tasks_seen
        return self._tasks[task]

    def key_watch(self, prefix: bytes) -> KeyWatch:
        """Return the one watch on `prefix` of this session."""
        watch = self._watches.get(prefix)
        if watch is None:
            watch = self._watches[prefix] = KeyWatch(self.backend, prefix, self.random)
            self._nursery.start_soon(watch.run)
        return watch

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run `function` in the background until the session ends."""
        self._nursery.start_soon(function)

    def clean_up_deadline(self) -> float:
        """
        Return Trio's time at which a shielded clean-up that begins now must end.

        Two seconds at most, never longer than the lease lives; and no time at all right after one that ran
        out: several holds of one task that are left one after the other take two seconds together.
        """
        now = trio.current_time()
        if now - self._clean_up_ran_out_at < CLEAN_UP_SECONDS / 2:
            return now
        return min(clean_up_deadline(), self.lease.deadline)

    def clean_up_ran_out(self) -> None:
        """Note that a clean-up had to be left to the janitor."""
        self._clean_up_ran_out_at = trio.current_time()

    def lose(self, error: Exception) -> None:
        """End the session for this process: everything that hangs on it is cancelled."""
        self.lease.lose(error)

    # ── opening and closing ─────────────────────────────────────────────────────────────────────

    async def close(self) -> None:
        """
        Let the janitor and the slots finish, then revoke the lease; all of it in two seconds at most.

        Never raises for etcd's sake: what can not be done now, the lease's end will do.
        """
        self.lease.closed = True
        now, until = trio.current_time(), self.clean_up_deadline()
        with trio.move_on_at((now + until) / 2, shield=True):
            if not self.lease.is_lost():
                await self.janitor.wait_idle()
        async with trio.open_nursery() as nursery:
            for lease in (self.lease, *self.own_leases):
                revoking = partial(revoke_in_time, self.backend, lease.id, self.random, until=until)
                nursery.start_soon(revoking)
        self.lose(SessionLostError("the session was closed"))


@asynccontextmanager
async def open_session(  # noqa: PLR0913
    backend: Backend,
    keys: Keys,
    *,
    ttl: int,
    node_id: str,
    info: bytes,
    clock: Clock,
    random: Random,
    tally: Tally,
) -> AsyncGenerator[Session]:
    """
    Open a session; entering waits until etcd has granted it.

    The body is *not* cancelled when the session is lost; what hangs on it is.

    Raises:
        StorageFullError, AccessDeniedError, InvalidRequestError: etcd refuses the session.

    Cancellation:
        While entering and at the end the lease is revoked, in two seconds at most.

    Round trips:
        Two to open, one to close.
    """
    session: Session | None = None
    try:
        async with open_background() as nursery:
            lease = await grant(backend, clock, random, ttl=ttl)
            session = Session(
                backend,
                keys,
                lease,
                info=info,
                node_id=node_id,
                clock=clock,
                random=random,
                nursery=nursery,
                tally=tally,
            )
            nursery.start_soon(lease.keep_alive)
            nursery.start_soon(session.janitor.patrol)
            try:
                await session.own_key.living_generation()
                yield session
            finally:
                await session.close()
    finally:
        if session is not None:
            session.lose(SessionLostError("the session was closed"))
