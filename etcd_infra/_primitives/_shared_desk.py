"""How a consumer of a work-sharing group claims messages and settles them; the keys are `_shared_group`'s."""

from __future__ import annotations

import logging
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Put, Range, Txn, TxnResult
from etcd_infra._primitives._budget import fit
from etcd_infra._primitives._cas import Change, Committed, Refused, commit, found_in
from etcd_infra._primitives._claim import Claim, Claimant, Progress, unclaim
from etcd_infra._primitives._handling import Effects, Ending, Handling
from etcd_infra._primitives._who import running_task
from etcd_infra.errors import CodecError, EtcdError, MessagesLostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.model import OpResult
    from etcd_infra._primitives._envelope import Record
    from etcd_infra._primitives._group import Group
    from etcd_infra._primitives._shared_view import SharedView
    from etcd_infra._primitives.message import GroupMessage
    from etcd_infra._session.session import Session

T = TypeVar("T")

logger = logging.getLogger("etcd_infra.topic")


class SharedDesk(Generic[T]):
    """
    Where one consumer's messages are claimed and settled; see `Desk`.

    Args:
        group: The group.
        view: What is known of it.
        ack_after: Seconds that a handler has.
        max_retries: How often a message is tried again before it is a dead letter.
    """

    def __init__(self, group: Group[T], view: SharedView, *, ack_after: float, max_retries: int) -> None:
        self._group = group
        self._space = group.space
        self._view = view
        self._ack_after = ack_after
        self._max_retries = max_retries
        self._claims = group.keys.claims(group.name)
        self._open: dict[str, Handling] = {}
        self._busy: dict[str, None] = {}

    def has(self, name: str) -> bool:
        """Whether a message is in hand."""
        return name in self._open

    def next_free(self) -> Record | None:
        """Return the oldest message that nobody has; none is held any more whose claim was lost."""
        for handling in tuple(self._open.values()):
            if handling.is_by_hand and not handling.custody.is_held():
                handling.end(Ending.LOST)
        for name, record in self._view.waiting.items():
            if name not in self._view.claimed and name not in self._open and name not in self._busy:
                return record
        return None

    def next_deadline(self) -> float:
        """Return when the first message that no scope ends must be acknowledged."""
        return min([handling.until for handling in self._open.values() if handling.is_by_hand], default=inf)

    async def expire_old(self) -> None:
        """Give back what should have been acknowledged by now; a cancellation leaves that to the session."""
        now = trio.current_time()
        for handling in tuple(self._open.values()):
            if handling.is_by_hand and handling.until <= now:
                await handling.expire()

    async def close(self) -> None:
        """Give back what was not acknowledged, shielded, in two seconds each or by the session's janitor."""
        for handling in tuple(self._open.values()):
            handling.close()
            await self.abandon(handling)

    async def take(self, record: Record) -> GroupMessage[T] | None:
        """
        Claim a message, or bury it; None: somebody else was faster, or it is buried.

        Raises:
            CodecError, ConflictError, MessagesLostError, SessionLostError, EtcdError: see `SharedMessages`.

        Cancellation:
            It is not claimed, or given back by the session's janitor.
        """
        session = await self._space.sessions.current()
        if record.name not in self._view.waiting:
            return None  # Race: somebody was done with it while there was no session here
        seen, progress = self._view.progress.get(record.name, (0, Progress()))
        self._busy[record.name] = None
        try:
            if progress.attempts > self._max_retries:
                await self._bury(record, seen, progress.attempts, "")
                return None
            if self._group.settles_before(record):
                return await self._take_at_most_once(session, record, seen)
            return await self._claim(session, record, seen, progress)
        finally:
            self._busy.pop(record.name, None)

    async def _claim(
        self, session: Session, record: Record, seen: int, progress: Progress
    ) -> GroupMessage[T] | None:
        group, name = self._group, record.name
        key = group.keys.claim(group.name, name)
        begun = Progress(progress.attempts + 1)
        who = running_task(session)
        mine = msgspec.json.encode(Claimant(who.node, who.since, who.task, session.next_number()))
        request = Txn(
            self._untouched(record, seen),
            (Put(key, mine, lease=session.lease.id), self._put_progress(name, begun)),
            self._looks(record),
        )
        session.janitor.known_keys.add(key)
        try:
            outcome = await session.slots.write(request)
        except BaseException:
            session.janitor.known_keys.discard(key)
            session.janitor.take_over(lambda: unclaim(session, key, mine))
            raise
        if not outcome.applied:
            session.janitor.known_keys.discard(key)
            self._look(record, outcome.results)
            return None
        self._view.claim(name, outcome.revision, begun)
        claim = Claim(session, key, self._claims, outcome.revision)
        claim.guard()
        until = trio.current_time() + self._ack_after
        handling = Handling(self, self._space, claim, record, attempt=begun.attempts, until=until)
        self._open[name] = handling
        try:
            return group.message(record, handling)
        except CodecError as error:
            handling.end(Ending.GIVEN_BACK)
            await self.give_back(handling, 0.0, type(error).__name__, counts=True)
            raise

    async def _take_at_most_once(self, session: Session, record: Record, seen: int) -> GroupMessage[T] | None:
        done = self._put_progress(record.name, Progress(1, done=True))
        outcome = await session.slots.write(Txn(self._untouched(record, seen), (done,), self._looks(record)))
        if not outcome.applied:
            self._look(record, outcome.results)
            return None
        self._view.finish(record.name, outcome.revision)
        unclaimed = Claim(session, b"", self._claims, 0)
        handling = Handling(self, self._space, unclaimed, record, attempt=1, until=inf)
        handling.end(Ending.ACKNOWLEDGED)
        return self._group.message(record, handling)

    def _untouched(self, record: Record, seen: int) -> tuple[Compare, ...]:
        keys, group = self._group.keys, self._group.name
        return (
            Compare.absent(keys.claim(group, record.name)),
            Compare.modified_at(keys.progress(group, record.name), seen),
            Compare.modified_at(self._group.cursor_key, self._view.cursor_revision),
            Compare.created_at(keys.message(record.name), record.position.revision),
            *self._group.standing(record),
        )

    def _put_progress(self, name: str, progress: Progress) -> Put:
        return Put(self._group.keys.progress(self._group.name, name), msgspec.json.encode(progress))

    def _looks(self, record: Record) -> tuple[Range | Txn, ...]:
        keys, group, name = self._group.keys, self._group.name, record.name
        looked_at = (keys.claim(group, name), keys.progress(group, name), self._group.cursor_key)
        message = Range(KeyRange.one(keys.message(name)), keys_only=True)
        standing = [Txn((compare,)) for compare in self._group.standing(record)]
        return (*[Range(KeyRange.one(key)) for key in looked_at], message, *standing)

    def _look(self, record: Record, looks: Sequence[OpResult]) -> None:
        """Take in what a refusal shows."""
        name = record.name
        claim, progress, cursor, message = map(found_in, looks[:4])
        if not cursor:
            raise self._group.deleted()
        for kv in (*claim, *progress):
            self._view.see(kv)
        if cursor[0].mod_revision != self._view.cursor_revision:
            self._view.take_floor(cursor[0])
        elif not all(isinstance(standing, TxnResult) and standing.succeeded for standing in looks[4:]):
            # A copy of a dead letter that has another copy by now, or is none any more.
            self._view.waiting.pop(name, None)
        elif not message and name in self._view.waiting:
            lost = self._view.ahead[name].revision
            self._view.forget(name)
            self._view.tell()
            raise MessagesLostError(f"message {name!r} was deleted unread", lost - 1, lost)
        elif not claim and not progress:
            self._view.progress.pop(name, None)

    # ── what comes of a message ─────────────────────────────────────────────────────────────────

    async def acknowledge(self, handling: Handling, effects: Effects) -> bool:
        """See `Desk`."""
        record, claim = handling.record, handling.custody
        assert isinstance(claim, Claim)
        done = self._put_progress(record.name, Progress(handling.attempt, done=True))
        change = Change(
            (
                DeleteRange(KeyRange.one(claim.key)),
                done,
                *self._group.resurrection(record),
                *effects.ops,
            ),
            effects.keys,
            effects.conditions,
            fence=claim.fence,
        )
        claim.unguard()
        outcome: Committed | Refused | None = None
        try:
            outcome = await commit(self._space.sessions, self._space.keys, fit(change))
        finally:
            if not isinstance(outcome, Committed):
                claim.guard()
                self._view.tell()
        if not isinstance(outcome, Committed):
            return False
        claim.session.janitor.known_keys.discard(claim.key)
        self._view.finish(record.name, outcome.revision)
        self._freed(record.name)
        return True

    async def give_back(self, handling: Handling, delay: float, reason: str, *, counts: bool) -> None:
        """See `Desk`."""
        claim, record = handling.custody, handling.record
        assert isinstance(claim, Claim)
        try:
            if not counts:
                await self._uncount(claim, handling)
            elif handling.attempt > self._max_retries:
                await self._bury_claimed(claim, handling, reason)
        finally:
            if delay and handling.attempt <= self._max_retries:
                claim.session.start_soon(lambda: self._release_later(claim, record.name, delay))
            else:
                await self._release(claim, record.name)

    async def abandon(self, handling: Handling) -> None:
        """See `Desk`."""
        claim = handling.custody
        assert isinstance(claim, Claim)
        await self._release(claim, handling.record.name)

    def lost(self, handling: Handling) -> None:
        """See `Desk`: anybody may take it now, this consumer, too."""
        claim, name = handling.custody, handling.record.name
        assert isinstance(claim, Claim)
        if self._open.get(name) is handling:
            claim.disown()
            del self._open[name]
            self._view.tell()

    async def _release_later(self, claim: Claim, name: str, delay: float) -> None:
        await trio.sleep(delay)
        await self._release(claim, name)

    async def _release(self, claim: Claim, name: str) -> None:
        """Delete a claim, shielded, within two seconds; what is left then, the janitor does."""
        with trio.move_on_at(claim.session.clean_up_deadline(), shield=True):
            with suppress(EtcdError):
                await claim.delete()
                self._freed(name)
                return
        claim.session.janitor.take_over(claim.delete)
        self._freed(name)

    def _freed(self, name: str) -> None:
        self._open.pop(name, None)
        self._view.release(name)

    async def _uncount(self, claim: Claim, handling: Handling) -> None:
        put = self._put_progress(handling.record.name, Progress(handling.attempt - 1))
        await commit(self._space.sessions, self._space.keys, Change((put,), (), fence=claim.fence))

    async def _bury_claimed(self, claim: Claim, handling: Handling, reason: str) -> None:
        record = handling.record
        logger.warning("%r of %r is a dead letter now", record.name, self._group.name)
        done = self._put_progress(record.name, Progress(handling.attempt, done=True))
        burial = self._group.burial(record, handling.attempt, reason)
        claim.unguard()
        # Race: without the claim no acknowledgement that is still on its way is applied to a dead letter.
        ops = (*burial, done, DeleteRange(KeyRange.one(claim.key)))
        change = Change(ops, (), fence=claim.fence)
        outcome = await commit(self._space.sessions, self._space.keys, fit(change))
        self._view.finish(record.name, outcome.revision)

    async def _bury(self, record: Record, seen: int, attempts: int, reason: str) -> None:
        logger.warning("%r of %r is a dead letter now", record.name, self._group.name)
        done = self._put_progress(record.name, Progress(attempts, done=True))
        burial = self._group.burial(record, attempts, reason)
        change = Change((*burial, done), (), self._untouched(record, seen), self._looks(record))
        outcome = await commit(self._space.sessions, self._space.keys, fit(change))
        if isinstance(outcome, Committed):
            self._view.finish(record.name, outcome.revision)
        else:
            self._look(record, outcome.reads)
