"""
Writer slots: each write to a shared key is applied at most once, whatever happens to its answer.

A slot is a small key on the session's lease, created before it is first used. A write compares the slot's mod
revision and rewrites it in the same Txn, so it can be applied at most once, ever: re-sending is always safe,
and the failure branch tells at once "mine, at revision r" or "not mine, and it never will be". No write ever
compares "absent", which can become true again: a grant that is delivered twice revives a lease that ended.

A caller that was cancelled midway leaves its slot *dirty*, and nothing is ever sent for its write again: the
janitor rewrites the slot, which makes every copy that is still on its way stale, before it is used again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import (
    Compare,
    KeyRange,
    KeyValue,
    OpResult,
    Put,
    Range,
    RangeResult,
    Txn,
    TxnResult,
)
from etcd_infra._policy.backoff import delay
from etcd_infra.errors import (
    EtcdError,
    InvalidAnswerError,
    LeaseNotFoundError,
    OutcomeUnknownError,
    SessionLostError,
    UnavailableError,
)

if TYPE_CHECKING:
    from etcd_infra._session.session import Session


@dataclass(frozen=True, slots=True)
class SlotWrite:
    """
    How a write ended, definitely.

    Attributes:
        applied: Whether it was applied, once.
        revision: At which revision; for a refused write, the store's at the answer.
        results: One per operation of the branch that was taken; empty when the answer of the copy that was
            applied was lost.
        note: What the write stored in its slot: with a lost answer, all that is known of it.
    """

    applied: bool
    revision: int
    results: tuple[OpResult, ...] = ()
    note: bytes = b""


@dataclass(slots=True)
class Slot:
    """
    One slot.

    Attributes:
        created: Its create revision: with another one it was deleted meanwhile, and tells nothing any more.
        revision: Its last known mod revision, the guard of the next write (0: it does not exist).
        dirty: A copy of some write that compares `revision` is without an answer.
    """

    key: bytes
    created: int = 0
    revision: int = 0
    dirty: bool = False

    def found(self, kv: KeyValue | None) -> None:
        """Take in what it is now."""
        self.created = kv.create_revision if kv else 0
        self.moved_to(kv.mod_revision if kv else 0)

    def moved_to(self, revision: int) -> None:
        """Take in that it was rewritten: every copy with the old guard is dead."""
        self.revision = revision
        self.dirty = False


@dataclass(slots=True)
class _Write:
    operation: bytes
    request: Txn
    note: bytes
    unanswered: bool = False


class Slots:
    """The slots of a session: one per write in flight, reused."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._free: list[Slot] = []
        self._count = 0
        self._operations = 0

    async def write(self, request: Txn, *, note: bytes = b"") -> SlotWrite:
        """
        Apply `request.success` if its compares hold, at most once; repeat until the outcome is definite.

        Args:
            request: What to write, and under which conditions; its failure branch may only read.
            note: Kept in the slot, to be found when the answer is lost.

        Raises:
            SessionLostError: the session ended before the write was sent; nothing was written.
            OutcomeUnknownError: the session ended, or somebody deleted the slot, while an answer was missing.
            EtcdError: etcd refuses the request; nothing was written.

        Cancellation:
            The write may be applied, or not, or may still be for a moment; the janitor settles it.

        Round trips:
            One; one more for each answer that was lost, and whenever more writes are on their way than ever
            before.
        """
        slot = self._free.pop() if self._free else self._new()
        self._operations += 1
        write = _Write(b"%d" % self._operations, request, note)
        try:
            with self._session.tether():
                return await self._until_definite(slot, write)
            lost = SessionLostError(str(self._session.lease.error))
        except SessionLostError as error:
            lost = error
        finally:
            self._put_back(slot)
        if write.unanswered:
            msg = f"a write whose session was lost ({lost})"
            raise OutcomeUnknownError(msg, write.request.written_keys) from lost
        raise lost

    def _new(self) -> Slot:
        slot = Slot(self._session.keys.slot(self._session.lease.id, self._count))
        self._session.janitor.known_keys.add(slot.key)
        if not self._count:
            slot.found(self._session.own_key.first_slot)
        self._count += 1
        return slot

    def _put_back(self, slot: Slot) -> None:
        if slot.dirty:
            self._session.janitor.take_over(lambda: self._settle(slot))
        else:
            self._free.append(slot)

    async def _create(self, slot: Slot) -> None:
        failures = 0
        while not slot.revision:
            try:
                answer = await self._session.backend.txn(creation(slot.key, self._session.lease.id))
            except (UnavailableError, OutcomeUnknownError):
                # A copy that comes later finds the slot, or creates one, after its end, that no write compares.
                await trio.sleep(delay(failures, self._session.random.random()))
                failures += 1
            except LeaseNotFoundError:
                await self._session.lease.renew()
                raise
            else:
                slot.found(created(answer))

    async def _until_definite(self, slot: Slot, write: _Write) -> SlotWrite:
        failures = 0
        while True:
            try:
                if not slot.revision:
                    await self._create(slot)
                answer = await self._send(slot, self._guarded(slot, write), write)
            except EtcdError:
                # This copy was refused; an earlier one may have been applied, or may still be.
                if (outcome := await self._settled(slot, write)) is not None:
                    return outcome
                raise
            if answer is None:
                await trio.sleep(delay(failures, self._session.random.random()))
                failures += 1
            elif answer.succeeded:
                slot.moved_to(answer.revision)
                return SlotWrite(
                    applied=True, revision=answer.revision, results=answer.results[:-1], note=write.note
                )
            elif (outcome := await self._refused(slot, write, answer)) is not None:
                return outcome

    async def _refused(self, slot: Slot, write: _Write, answer: TxnResult) -> SlotWrite | None:
        guard = slot.revision
        outcome = self._moved(slot, write, answer)
        if outcome is not None or slot.revision != guard:
            return outcome
        # The caller's own conditions failed. An earlier copy may still come and find them true: so the
        # slot moves before anybody is told "no" (a refused copy was applied afterwards in 40 of 40 trials).
        outcome = await self._settled(slot, write)
        return outcome or SlotWrite(applied=False, revision=answer.revision, results=answer.results[1:])

    async def _settled(self, slot: Slot, write: _Write) -> SlotWrite | None:
        """Move the slot if a copy is out; return its outcome, or None: none was applied, or ever will be."""
        while write.unanswered:
            try:
                answer = await self._send(slot, self._settling(slot), write)
            except EtcdError as error:
                msg = f"an earlier copy of a write that was refused now ({error})"
                raise OutcomeUnknownError(msg, write.request.written_keys) from error
            if answer is None:
                await trio.sleep(delay(0, self._session.random.random()))
            elif answer.succeeded:
                slot.moved_to(answer.revision)
                write.unanswered = False
            elif (outcome := self._moved(slot, write, answer)) is not None:
                return outcome
        return None

    def _moved(self, slot: Slot, write: _Write, answer: TxnResult) -> SlotWrite | None:
        """Look who moved the slot: `write` itself (then it was applied), or what was left in it before."""
        kv = _slot_in(answer)
        if kv and kv.mod_revision == slot.revision:
            return None
        was_deleted = kv is None or kv.create_revision != slot.created
        slot.found(kv)
        if was_deleted and write.unanswered:
            raise OutcomeUnknownError(
                f"a write whose slot {slot.key!r} was deleted", write.request.written_keys
            )
        operation, _, note = kv.value.partition(b" ") if kv else (b"", b"", b"")
        if operation == write.operation:
            return SlotWrite(applied=True, revision=slot.revision, note=note)
        write.unanswered = False
        return None

    async def _send(self, slot: Slot, request: Txn, write: _Write) -> TxnResult | None:
        """Send one copy; None if it brought no answer."""
        dirty, unanswered = slot.dirty, write.unanswered
        slot.dirty = write.unanswered = True
        try:
            answer = await self._session.backend.txn(request)
        except OutcomeUnknownError:
            return None
        except UnavailableError:
            slot.dirty, write.unanswered = dirty, unanswered
            return None
        except EtcdError as error:
            slot.dirty, write.unanswered = dirty, unanswered
            if isinstance(error, LeaseNotFoundError):
                # The session's lease, or one that the write names.
                await self._session.lease.renew()
            raise
        slot.dirty, write.unanswered = dirty, unanswered
        return answer

    def _guarded(self, slot: Slot, write: _Write) -> Txn:
        mark = Put(slot.key, write.operation + b" " + write.note, lease=self._session.lease.id)
        return Txn(
            (Compare.modified_at(slot.key, slot.revision), *write.request.compare),
            (*write.request.success, mark),
            (Range(KeyRange.one(slot.key)), *write.request.failure),
        )

    def _settling(self, slot: Slot) -> Txn:
        return Txn(
            (Compare.modified_at(slot.key, slot.revision),),
            (Put(slot.key, b"settled", lease=self._session.lease.id),),
            (Range(KeyRange.one(slot.key)),),
        )

    async def _settle(self, slot: Slot) -> None:
        answer = await self._session.backend.txn(self._settling(slot))
        if answer.succeeded:
            slot.moved_to(answer.revision)
        else:
            slot.found(_slot_in(answer))
        self._free.append(slot)


def creation(key: bytes, lease: int) -> Txn:
    """Return what creates a slot, unless it exists, and reads it; safe to repeat."""
    one = Range(KeyRange.one(key))
    return Txn((Compare.absent(key),), (Put(key, b"created", lease), one), (one,))


def created(answer: OpResult) -> KeyValue:
    """
    Return the slot, from the answer to its creation.

    Raises:
        InvalidAnswerError: it is not there.
    """
    found = answer.results[-1] if isinstance(answer, TxnResult) else None
    if not isinstance(found, RangeResult) or not found.kvs:
        raise InvalidAnswerError(f"an unexpected answer to the creation of a slot: {answer}")
    return found.kvs[0]


def _slot_in(answer: TxnResult) -> KeyValue | None:
    found = answer.results[0]
    if not isinstance(found, RangeResult):
        msg = f"an unexpected answer for a slot: {answer}"
        raise InvalidAnswerError(msg)
    return found.kvs[0] if found.kvs else None
