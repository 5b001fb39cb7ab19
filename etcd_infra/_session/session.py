"""
A session: a lease that this process keeps alive, and everything that hangs on it.

Keys
    ``{ns}session/{lease}``  JSON node id, host, start; on the lease. Its mod revision is the *generation*.
    ``{ns}epoch``            a random id, created once: the lineage of the store.

Algorithm
    1. Grant a lease under an id of our own choice, so that a grant without an answer is simply repeated.
    2. Write the session key, `[absent] → [put]`, and read or create the epoch in the same Txn.
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
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

import trio

from etcd_infra._etcd.model import Compare, KeyRange, KeyValue, Put, Range, RangeResult, Txn, TxnResult
from etcd_infra._policy.backoff import delay
from etcd_infra._session.janitor import Janitor
from etcd_infra._session.keepalive import (
    CLEAN_UP_SECONDS,
    LivingLease,
    SessionStatus,
    Tether,
    clean_up_deadline,
)
from etcd_infra._session.key_watch import KeyWatch
from etcd_infra._session.scopes import open_background
from etcd_infra._session.slots import Slots
from etcd_infra.errors import (
    EtcdError,
    InvalidAnswerError,
    LeaseExistsError,
    LeaseNotFoundError,
    OutcomeUnknownError,
    SessionLostError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._session.clock import Clock, Instant
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
        generation: Mod revision of the session key; 0 while it is known to be missing.
        epoch: The store's lineage.
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
        nursery: trio.Nursery,
        tally: Tally,
    ) -> None:
        self.backend = backend
        self.keys = keys
        self.lease = lease
        self.info = info
        self.node_id = node_id
        self.clock = clock
        self.random = random
        self.tally = tally
        self.key = keys.session(lease.id)
        self.generation = 0
        self.epoch = ""
        self.janitor = Janitor(backend, lease, random, nursery, keys.sessions)
        self.janitor.known_keys.add(self.key)
        self.slots = Slots(self)
        self.owners: dict[tuple[bytes, trio.lowlevel.Task], Held | None] = {}
        self._nursery = nursery
        self._watches: dict[bytes, KeyWatch] = {}
        self._numbers = 0
        self._newest_generation = 0

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

    async def current(self) -> Session:
        """Return this session: a plain session is its own only one."""
        await trio.lowlevel.checkpoint()
        self.check()
        return self

    async def wait_lost(self) -> None:
        """Wait until the session is lost."""
        await self.lease.lost.wait()

    @contextmanager
    def tether(self, *leases: LivingLease) -> Generator[Tether]:
        """Open a scope that is cancelled when the session, or one of `leases`, is lost."""
        tether = Tether(self.lease, *leases)
        with tether.scope:
            tether.tie()
            try:
                yield tether
            finally:
                tether.untie()

    def next_number(self) -> int:
        """Return a number that this session never used in a key's name."""
        self._numbers += 1
        return self._numbers

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

    # ── the generation ──────────────────────────────────────────────────────────────────────────

    async def living_generation(self) -> int:
        """
        Return a generation that can guard a Txn; re-create the session key if it is missing.

        Raises:
            SessionLostError: the session is lost.
        """
        while not self.generation:
            await self.write_key()
        await trio.lowlevel.checkpoint_if_cancelled()
        self.check()
        return self.generation

    def saw_key(self, found: RangeResult, revision: int) -> bool:
        """Take in what a read at `revision` showed of the session key; return whether the generation moved."""
        before = self.generation
        if found.kvs:
            self.generation = max(before, found.kvs[0].mod_revision)
            self._newest_generation = max(self._newest_generation, self.generation)
        elif revision > self._newest_generation:
            # Race: an older answer that comes later must not make a living generation look dead: copies
            # that compare it would be thought stale.
            self.generation = 0
        return self.generation != before

    def wrote_key(self, revision: int) -> None:
        """Take in that the session key was rewritten at `revision`."""
        self.saw_key(RangeResult((KeyValue(self.key, mod_revision=revision),)), revision)

    async def write_key(self) -> None:
        """
        Create the session key if it is missing, and read or create the epoch: one Txn.

        Raises:
            SessionLostError: the lease does not exist any more.
            EtcdError: nothing is definite; calling again is safe.
        """
        epoch = self.keys.epoch
        # etcd: without the nested Txn the epoch would cost a round trip of its own. It is never deleted,
        # so its guard "absent" can not become true again.
        remember_epoch = Txn(
            (Compare.absent(epoch),),
            (Put(epoch, b"%032x" % self.random.getrandbits(128)), Range(KeyRange.one(epoch))),
            (Range(KeyRange.one(epoch)),),
        )
        read_own = Range(KeyRange.one(self.key))
        request = Txn(
            (Compare.absent(self.key),),
            (Put(self.key, self.info, lease=self.lease.id), remember_epoch),
            (read_own, remember_epoch),
        )
        try:
            answer = await self.backend.txn(request)
        except LeaseNotFoundError as error:
            self.lose(SessionLostError(f"lease {self.lease.id:x} does not exist any more"))
            raise SessionLostError(str(self.lease.error)) from error
        own, remembered = answer.results
        if answer.succeeded:
            self.wrote_key(answer.revision)
        elif isinstance(own, RangeResult):
            self.saw_key(own, answer.revision)
        if not isinstance(remembered, TxnResult) or not isinstance(remembered.results[-1], RangeResult):
            msg = f"an unexpected answer to {request}: {answer}"
            raise InvalidAnswerError(msg)
        self.epoch = remembered.results[-1].kvs[0].value.decode(errors="replace")

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
        until = clean_up_deadline()
        with trio.move_on_at(until - CLEAN_UP_SECONDS / 2, shield=True):
            if not self.lease.is_lost():
                await self.janitor.wait_idle()
        await revoke_in_time(self.backend, self.lease.id, self.random, until=until)
        self.lose(SessionLostError("the session was closed"))


async def revoke(backend: Backend, lease: int) -> None:
    """Revoke a lease; one that is gone is as good. An `EtcdError` means that nothing is definite."""
    with suppress(LeaseNotFoundError):
        await backend.lease_revoke(lease)


async def revoke_in_time(backend: Backend, lease: int, random: Random, *, until: float) -> bool:
    """Repeat `revoke`, shielded, until Trio's time `until` at most; return whether it is definite."""
    failures = 0
    with trio.move_on_at(until, shield=True):
        while True:
            try:
                await revoke(backend, lease)
            except EtcdError as error:
                logger.info("lease %x is not revoked yet: %s", lease, error)
                await trio.sleep(delay(failures, random.random()))
                failures += 1
            else:
                return True
    return False


async def grant(backend: Backend, clock: Clock, random: Random, *, ttl: int) -> LivingLease:
    """
    Grant a lease under a new id of our own, repeating until etcd answers.

    Raises:
        StorageFullError, AccessDeniedError, InvalidRequestError: etcd refuses.

    Cancellation:
        The lease is revoked, in two seconds at most; a late copy of the grant runs out after its TTL.

    Round trips:
        One.
    """
    lease = random.getrandbits(63) or 1
    sent_at: Instant | None = None
    failures = 0
    try:
        while True:
            first_copy = sent_at is None
            sent_at = sent_at or clock.now()
            try:
                granted_ttl = (await backend.lease_grant(ttl, lease=lease)).ttl
                return LivingLease(backend, clock, random, lease=lease, ttl=granted_ttl, sent_at=sent_at)
            except LeaseExistsError:
                if not first_copy and (found := await _adopt(backend, lease)):
                    return LivingLease(backend, clock, random, lease=lease, ttl=found, sent_at=sent_at)
                lease, sent_at = random.getrandbits(63) or 1, None
                continue
            except UnavailableError:
                sent_at = None if first_copy else sent_at
            except OutcomeUnknownError:
                pass
            await trio.sleep(delay(failures, random.random()))
            failures += 1
    except trio.Cancelled:
        if sent_at is not None:
            await revoke_in_time(backend, lease, random, until=clean_up_deadline())
        raise


async def _adopt(backend: Backend, lease: int) -> int:
    # The first copy of our grant worked: the lease has run since then, for as long as the server said.
    return (await backend.lease_time_to_live(lease)).granted_ttl


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
                await _write_key_at_last(session)
                yield session
            finally:
                await session.close()
    finally:
        if session is not None:
            session.lose(SessionLostError("the session was closed"))


async def _write_key_at_last(session: Session) -> None:
    failures = 0
    while not session.generation:
        try:
            await session.write_key()
        except (UnavailableError, OutcomeUnknownError):
            await trio.sleep(delay(failures, session.random.random()))
            failures += 1
