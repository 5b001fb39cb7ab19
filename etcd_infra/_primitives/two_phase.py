"""
A transaction in two phases: promised first, then committed or rolled back, so that others can join in between.

Keys
    ``{ns}txn/{id}``      the record (see `_record`), on the transaction's own lease, which nobody renews.
    ``{ns}intent/{key}``  the id, on that lease: no writer of this library changes the state key meanwhile.

Algorithm
    1. Prepare: the keys are promised to it, all at one revision (see `_promise`).
    2. Commit: ``[mod(record)==R, versions as read] → [writes, delete intents, record = COMMITTED] else
       [record]``.
    3. Roll back: the same without writes, ROLLED_BACK. Whoever is blocked writes TIMEOUT, the same way, once
       the transaction's time is over (see `_intents`); whoever comes first decides.
    4. Leaving the block without a commit rolls back; the lease, and with it the record, is revoked.

Guarantees
    All at one revision, or nothing. One verdict, ever: a commit that comes after a TIMEOUT changes nothing, and
    says so. A crashed owner blocks nobody for longer than about its TTL.

Does not guarantee
    That foreign writers (`etcdctl`) keep away: the commit notices them and FAILS. That readers see the
    promise: they see the old values until the commit. New keys under a prefix are not kept away.

Source
    J. Gray, "Notes on Data Base Operating Systems" (1978). The record decides as in Percolator (D. Peng,
    F. Dabek, 2010), but here all keys of a commit are written by the Txn that decides.
"""

# Over the budget of 250 lines: half of them are the docstrings of the public surface.

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from etcd_infra._primitives._fold import bind
from etcd_infra._primitives._promise import Promising, lease_of_its_own
from etcd_infra._primitives._record import Verdict, decide
from etcd_infra._primitives.operations import TransactionResult, TransactionStatus
from etcd_infra._session.ttl import check_ttl
from etcd_infra.errors import (
    ConflictError,
    EtcdError,
    NotHeldError,
    OutcomeUnknownError,
    StorageFullError,
    TransactionTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._primitives._promise import Promise
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.operations import Operation
    from etcd_infra._session.own_lease import OwnLease
    from etcd_infra._session.session import Session

logger = logging.getLogger("etcd_infra.transaction")


class TwoPhaseTransaction:
    """
    A transaction that is promised before it is committed; made by `begin`.

    Attributes:
        transaction_id: Its name; random.
        status: Where it stands, as far as this process knows.
    """

    def __init__(self, space: Space, session: Session, ttl: int) -> None:
        self._space = space
        self._session = session
        self._ttl = ttl
        self._began = session.clock.now()
        self._operations: list[Operation] = []
        self._own: OwnLease | None = None
        self._promise: Promise | None = None
        self._commit_was_sent = False
        self.transaction_id = f"{space.random.getrandbits(64):016x}"
        self.status = TransactionStatus.PENDING

    def __repr__(self) -> str:
        return f"<TwoPhaseTransaction {self.transaction_id} {self.status}>"

    def remaining(self) -> float:
        """Seconds that are left for the commit, counted from `begin`."""
        return max(0.0, self._ttl - self._session.clock.since(self._began))

    def add(self, operation: Operation) -> None:
        """
        Add an operation; operations on the same key act one after the other.

        Raises:
            TypeError, ValueError: it makes no sense.
            NotHeldError: the transaction is prepared already, or over.
        """
        self._expect(TransactionStatus.PENDING, "add an operation")
        bind((operation,), self._space)
        self._operations.append(operation)

    async def prepare(self) -> None:
        """
        Read, compute, and promise: from now on no writer of this library changes the keys.

        Waits while other transactions have promised some of them.

        Raises:
            ConflictError: a version that a `Cas` presumes is not there; names the operation, as in `execute`.
            TransactionTimeoutError: its time was over before; status TIMEOUT.
            CodecError, InvalidRequestError, ValueError, EtcdError: as in `execute`.
            NotHeldError: it is prepared already, or over.
            After any of these but the last the status is FAILED (or TIMEOUT), and nothing is promised.

        Cancellation:
            FAILED: the promise is taken back within two seconds, or by the janitor, or ends with its lease.

        Round trips:
            Three: grant a lease, read, promise. Two more for each conflict.
        """
        self._expect(TransactionStatus.PENDING, "prepare")
        self.status = TransactionStatus.FAILED
        try:
            with trio.move_on_after(self.remaining()) as in_time:
                self._promise = await self._prepare()
                self.status = TransactionStatus.PREPARED
        finally:
            if self._promise is None:
                await self._end_lease()
        if in_time.cancelled_caught:
            self.status = TransactionStatus.TIMEOUT
            raise self._too_late()

    async def commit(self) -> TransactionResult:
        """
        Apply everything at one revision.

        Raises:
            TransactionTimeoutError: its time was over, or somebody who was blocked said so; nothing changed.
            ConflictError: a foreign writer has changed one of the keys; status FAILED, nothing was changed.
            OutcomeUnknownError: no answer came until the record had ended with its lease, or etcd refused the
                next copy.
            NotHeldError: it is not prepared.
            EtcdError: etcd refuses the request; nothing was written.

        Cancellation:
            The status stays PREPARED: committed, or not yet; commit again, or leave, and it is settled.

        Round trips:
            One; one more for each lost answer.
        """
        self._expect(TransactionStatus.PREPARED, "commit")
        promise = self._promise
        assert promise is not None
        if self.remaining() <= 0:
            verdict = await self._decide(promise, TransactionStatus.TIMEOUT)
        else:
            verdict = await self._decide(promise, TransactionStatus.COMMITTED)
        if verdict.status is TransactionStatus.PREPARED:
            verdict = await self._decide(promise, TransactionStatus.FAILED)
        if verdict.status is TransactionStatus.FAILED:
            msg = f"somebody who minds no intents has changed a key of transaction {self.transaction_id}"
            raise ConflictError(msg)
        if verdict.status is not TransactionStatus.COMMITTED:
            raise self._too_late()
        results = promise.folded.results_at(verdict.revision, promise.bound)
        return TransactionResult(self.transaction_id, verdict.status, results, verdict.revision)

    async def rollback(self) -> None:
        """
        Give up: nothing was changed, and nothing will be. Harmless if it has failed already.

        Raises:
            NotHeldError: it was committed.
            EtcdError: etcd refuses the request; the promise ends with its lease.

        Cancellation:
            The status stays PREPARED; leaving settles it.

        Round trips:
            One; none if nothing was prepared.
        """
        await trio.lowlevel.checkpoint()
        if self.status is TransactionStatus.PENDING:
            self.status = TransactionStatus.ROLLED_BACK
        elif self.status is TransactionStatus.PREPARED:
            assert self._promise is not None
            try:
                await self._decide(self._promise, TransactionStatus.ROLLED_BACK)
            except StorageFullError:
                await self._end_lease()  # it has no put, and takes everything along
                self.status = TransactionStatus.ROLLED_BACK
        if self.status is TransactionStatus.COMMITTED:
            msg = f"transaction {self.transaction_id} was committed: it can not be rolled back"
            raise NotHeldError(msg)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    async def leave(self) -> None:
        """Roll back what was not committed, shielded, in two seconds at most; the lease ends what is left."""
        until = self._session.clean_up_deadline()
        with trio.move_on_at(until, shield=True):
            try:
                if self.status in {TransactionStatus.PENDING, TransactionStatus.PREPARED}:
                    await self.rollback()
            except (EtcdError, NotHeldError) as error:
                logger.info("leaving transaction %s: %s", self.transaction_id, error)
        if self.status is TransactionStatus.PREPARED and not self._commit_was_sent:
            self.status = TransactionStatus.ROLLED_BACK  # only its owner could have committed it
        await self._end_lease(until)

    def _expect(self, status: TransactionStatus, what: str) -> None:
        if self.status is not status:
            msg = f"transaction {self.transaction_id} is {self.status}: it can not {what}, only when {status}"
            raise NotHeldError(msg)

    def _too_late(self) -> TransactionTimeoutError:
        return TransactionTimeoutError(
            f"the {self._ttl} s of transaction {self.transaction_id} were over; nothing was changed"
        )

    async def _end_lease(self, until: float | None = None) -> None:
        own, self._own = self._own, None
        if own is not None:
            await own.end(until=self._session.clean_up_deadline() if until is None else until)

    async def _prepare(self) -> Promise:
        promising = Promising(self._space, self._session, self.transaction_id, self._operations, self._ttl)
        self._own = await lease_of_its_own(self._space, self._ttl)
        return await promising.make(self._own.lease.id)

    async def _decide(self, promise: Promise, status: TransactionStatus) -> Verdict:
        committing = status is TransactionStatus.COMMITTED
        earlier, self._commit_was_sent = self._commit_was_sent, self._commit_was_sent or committing
        try:
            verdict = await decide(
                self._session,
                promise.kv,
                promise.record,
                status,
                writes=tuple(promise.folded.writes.values()) if committing else (),
                conditions=promise.folded.conditions if committing else (),
                earlier_copies=earlier,
            )
        except OutcomeUnknownError:
            raise
        except EtcdError:
            self._commit_was_sent = earlier  # this one was refused, and no copy of it is on its way
            raise
        self.status = verdict.status
        return verdict


def begin(space: Space, *, ttl: int = 30) -> AbstractAsyncContextManager[TwoPhaseTransaction]:
    """
    Begin a transaction; to be entered. Leaving without a commit rolls it back.

    Args:
        space: Where.
        ttl: Whole seconds, at least 1, from now to the commit. Afterwards anybody may decide on TIMEOUT.

    Raises:
        TypeError, ValueError: the TTL is no good.

    Cancellation:
        The body's; what was promised is taken back within two seconds, or ends with its lease.

    Round trips:
        None to enter; to leave one to revoke the lease if it was prepared, one more without a commit.
    """
    return _begin(space, check_ttl(ttl))


@asynccontextmanager
async def _begin(space: Space, ttl: int) -> AsyncGenerator[TwoPhaseTransaction]:
    transaction = TwoPhaseTransaction(space, await space.sessions.current(), ttl)
    try:
        yield transaction
    finally:
        await transaction.leave()
