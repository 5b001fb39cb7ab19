"""The intents of prepared two-phase transactions, as every writer of state meets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Range, RangeResult, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._record import Record, decide
from etcd_infra._primitives.operations import TransactionStatus
from etcd_infra.errors import OutcomeUnknownError, UnavailableError

if TYPE_CHECKING:
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._session.session import Session

LOOK_AGAIN_SECONDS: Final = 30.0


async def wait_resolved(session: Session, intent: KeyValue) -> None:
    """
    Wait until the transaction that left `intent` is decided and the intent gone; if need be, decide it.

    A transaction that is seen undecided for longer than its own time, by this process's clock, is given the
    verdict TIMEOUT, unless its owner is faster. Returns early when the session is lost.

    Raises:
        EtcdError: etcd refuses to tell.

    Cancellation:
        Leaves nothing behind.

    Round trips:
        One look, and one per event; one watch for all who wait in a process.
    """
    waiter = _Waiter(session, intent)
    watch = session.key_watch(session.keys.intents)
    watch.listen(intent.key, waiter)
    failures = 0
    try:
        with session.tether():
            while True:
                try:
                    await watch.ready()
                    if await waiter.is_resolved():
                        return
                except (UnavailableError, OutcomeUnknownError):
                    await trio.sleep(delay(failures, session.random.random()))
                    failures += 1
                else:
                    await waiter.wait()
    finally:
        watch.ignore(intent.key, waiter)


class _Waiter:
    """
    One who waits for one incarnation of an intent.

    Attributes:
        patience: Seconds for which the transaction may stay undecided still.
    """

    def __init__(self, session: Session, intent: KeyValue) -> None:
        self._session = session
        self._intent = intent
        self._record_key = session.keys.transaction(intent.value.decode(errors="replace"))
        self._since = session.clock.now()
        self._changed = trio.Event()
        self.patience = 0.0

    def key_deleted(self, key: bytes, revision: int) -> None:
        """See `Listener`."""
        del key, revision
        self._changed.set()

    def read_again(self) -> None:
        """See `Listener`."""
        self._changed.set()

    async def wait(self) -> None:
        """Wait until there is reason to look again."""
        with trio.move_on_after(min(self.patience, LOOK_AGAIN_SECONDS)):
            await self._changed.wait()

    async def is_resolved(self) -> bool:
        """Look; decide what was undecided for too long."""
        self._changed = trio.Event()
        intent, record = await self._look()
        if intent is None or intent.create_revision != self._intent.create_revision:
            return True
        found = Record.parse(record) if record is not None else None
        if record is None or found is None or found.status is not TransactionStatus.PREPARED:
            # It came with its record and goes with it: alone, it promises nothing.
            await self._remove(intent)
            return True
        self.patience = found.ttl - self._session.clock.since(self._since)
        if self.patience > 0:
            return False
        await decide(self._session, record, found, TransactionStatus.TIMEOUT)
        return True

    async def _look(self) -> tuple[KeyValue | None, KeyValue | None]:
        keys = (self._intent.key, self._record_key)
        answer = await self._session.backend.txn(Txn(success=tuple(Range(KeyRange.one(key)) for key in keys)))
        intent, record = [
            found.kvs[0] if isinstance(found, RangeResult) and found.kvs else None for found in answer.results
        ]
        return intent, record

    async def _remove(self, intent: KeyValue) -> None:
        same = Compare.modified_at(intent.key, intent.mod_revision)
        await self._session.backend.txn(Txn((same,), (DeleteRange(KeyRange.one(intent.key)),)))
