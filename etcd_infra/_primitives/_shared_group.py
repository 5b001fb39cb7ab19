"""
A group whose consumers share the work: each message goes to one of them, by a claim of its own.

Keys
    ``{ns}topic/{topic}/group/{group}/shared/claim/{name}``     who handles a message; on the session's lease.
    ``{ns}topic/{topic}/group/{group}/shared/progress/{name}``  JSON how often it was begun, and whether it is
                                                                done; on no lease, so that it survives its
                                                                consumers.
    ``{ns}topic/{topic}/cursor/{group}``                        the floor: everything up to it is done.

Algorithm
    1. Read the messages after the floor, some way ahead; watch claims and progress.
    2. Take the oldest one that nobody has: ``[slot, no claim, mod(progress) and mod(cursor) as seen, the
       message is there] → [put claim, progress: begun once more] else [look]``.
    3. Acknowledge: ``[slot, created(claim)==token, mod of what was read, no intent] → [effects, delete claim,
       progress: done]``. Give back: delete the claim. After `max_retries`: ``[slot, no claim, progress as
       seen] → [dead letter, progress: done]``.
    4. Whoever sees that the oldest ones are all done moves the floor, and deletes their progress, and that of
       messages which were trimmed.

Guarantees
    A message has one claim at a time; an acknowledgement under a claim that is gone is refused, with its
    effects. A consumer that dies gives its messages back when its lease ends; what it had begun is counted.

Does not guarantee
    Any order. That two handlers of a message never overlap when a consumer was paused for longer than its
    lease: the first one's acknowledgement is refused then.

Source
    The visibility timeout of message queues, as a lease; the token is the claim's create revision.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, suppress
from heapq import nsmallest
from math import inf
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import msgspec
import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.keys import last_segment
from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Put, Range, Txn, TxnResult
from etcd_infra._policy.backoff import delay as backoff
from etcd_infra._primitives._budget import fit
from etcd_infra._primitives._cas import Change, Committed, Refused, commit, found_in
from etcd_infra._primitives._claim import Claim, Claimant, Progress, parse_progress, unclaim
from etcd_infra._primitives._envelope import Position
from etcd_infra._primitives._group import Cursor, Group
from etcd_infra._primitives._handling import Effects, Ending, Handling
from etcd_infra._primitives._who import running_task
from etcd_infra._session.mirror import Changes, Snapshot, open_mirror
from etcd_infra.errors import (
    CodecError,
    ConflictError,
    EtcdError,
    MessagesLostError,
    SessionLostError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from etcd_infra._etcd.model import Event, KeyValue, OpResult
    from etcd_infra._primitives._envelope import Record
    from etcd_infra._primitives._reader import Reader
    from etcd_infra._primitives.message import GroupMessage
    from etcd_infra._session.mirror import Mirror
    from etcd_infra._session.session import Session

T = TypeVar("T")

logger = logging.getLogger("etcd_infra.topic")

WAITING: Final = 256
"""So many messages that are not done are kept ready."""

AHEAD: Final = 8192
"""So many messages after the floor are remembered as done; no more is read before it moves."""

FLOOR_STEP: Final = 64
"""So many messages at the floor must be done before it moves."""


IDLE_SECONDS: Final = 5.0
"""The floor moves, too, when nothing has happened for so long."""

FORGOTTEN_TOGETHER: Final = 16
"""Of so many messages that were perhaps trimmed, the progress is deleted with each move of the floor."""


class SharedMessages(Generic[T]):
    """
    One consumer's end of a work-sharing group, to be iterated over; see `Topic.subscribe`.

    Several of its messages may be in hand at a time: it never waits for those before.
    """

    def __init__(self, group: Group[T], reader: Reader, *, ack_after: float, max_retries: int) -> None:
        self._group = group
        self._space = group.space
        self._reader = reader
        self._ack_after = ack_after
        self._max_retries = max_retries
        self._shared = group.keys.shared(group.name)
        self._claims = group.keys.claims(group.name)
        self._cursor_seen = 0
        self._floor = Position(0)
        self._read_up_to = Position(0)
        self._store_is_new = False
        self._reading = trio.CancelScope()
        self._waiting: dict[str, Record] = {}
        self._ahead: dict[str, Position] = {}
        self._claimed: dict[str, int] = {}
        self._progress: dict[str, tuple[int, Progress]] = {}
        self._open: dict[str, Handling] = {}
        self._busy: dict[str, None] = {}
        self._lost: list[Exception] = []
        self._changed = trio.Event()

    def __aiter__(self) -> SharedMessages[T]:
        return self

    async def __anext__(self) -> GroupMessage[T]:
        """
        Wait for a message that nobody else handles, and claim it.

        Raises:
            MessagesLostError, CodecError, ConflictError, SessionLostError, EtcdError: as for an ordered group.

        Cancellation:
            Nothing is claimed, or the claim is given back, in two seconds or by the session's janitor. (But a
            message that was published at most once may be lost: it is acknowledged before it is returned.)

        Round trips:
            One.
        """
        await trio.lowlevel.checkpoint()
        failures = 0
        while True:
            if self._lost:
                raise self._lost.pop(0)
            changed = self._changed
            await self._expire_old()
            done = len(self._done_at_floor())
            if done >= FLOOR_STEP:
                await self._move_floor()
            record = self._next_free()
            if record is None:
                idle_at = trio.current_time() + IDLE_SECONDS if done else inf
                with trio.move_on_at(min(self._next_deadline(), idle_at)) as idle:
                    await changed.wait()
                if idle.cancelled_caught and done:
                    await self._move_floor()
                continue
            try:
                message = await self._take(record)
            except SessionLostError:
                continue  # whether there is a next session, `current` says
            if message is not None:
                return message
            await trio.sleep(backoff(failures, self._space.random.random()) / 10)
            failures += 1

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[None]:
        """
        Follow the group for the length of a body, and give back at the end what was not acknowledged.

        Raises:
            EtcdError: etcd refuses.

        Round trips:
            Three.
        """
        shared = KeyRange.prefix(self._shared)
        async with (
            open_mirror(self._space.backend, shared, self._space.random) as mirror,
            open_background() as background,
        ):

            async def follow(task_status: trio.TaskStatus[None]) -> None:
                await self._follow(mirror, task_status)

            await self._read_floor()
            await background.start(follow)
            background.start_soon(self._read_ahead)
            try:
                yield
            finally:
                await self._close()

    # ── what is known of the group ──────────────────────────────────────────────────────────────

    async def _read_ahead(self) -> None:
        """Read the messages after the floor, some way ahead; until cancelled."""
        resets = self._reader.resets
        while True:
            # Those that somebody handles, or that wait for a second try, hold up nobody.
            while len(self._waiting) - len(self._claimed) >= WAITING or len(self._ahead) >= AHEAD:
                await self._changed.wait()
            try:
                if self._store_is_new or resets != self._reader.resets:
                    await self._begin_anew()
                    resets = self._reader.resets
                with trio.CancelScope() as self._reading:
                    self._add(await self._reader.next())
            except MessagesLostError as error:
                self._lost.append(error)
            except (EtcdError, ConflictError, SessionLostError) as error:
                # Once is enough, until somebody hears of it.
                if not self._lost or isinstance(self._lost[-1], MessagesLostError):
                    self._lost.append(error)
                self._tell()
                await trio.sleep(1.0)
            self._tell()

    async def _begin_anew(self) -> None:
        """Go by the floor of a store that was restored or wiped."""
        found = await self._group.known_cursor()
        self._store_is_new = False
        self._waiting.clear()
        self._ahead.clear()
        self._read_up_to = Position(0)
        self._take_floor(found)
        self._reader.move(self._floor)

    def _add(self, record: Record) -> None:
        if record.position <= max(self._floor, self._read_up_to):
            return
        self._read_up_to = record.position
        self._ahead[record.name] = record.position
        if self._group.is_for_us(record) and not self._is_done(record.name):
            self._waiting[record.name] = record

    async def _follow(self, mirror: Mirror, task_status: trio.TaskStatus[None]) -> None:
        """Keep claims and progress up to date; started once they are."""
        while True:
            match await mirror.receive():
                case Snapshot(kvs=kvs, store_reset=store_reset):
                    if store_reset:
                        # What was done in the store before may not be done in this one.
                        self._store_is_new = True
                        self._reading.cancel()
                    self._claimed.clear()
                    self._progress.clear()
                    for kv in kvs:
                        self._see(kv)
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                case Changes(events):
                    for event in events:
                        self._saw(event)
            self._tell()

    def _saw(self, event: Event) -> None:
        if not event.is_delete:
            self._see(event.kv)
            return
        name = last_segment(event.key)
        if event.key.startswith(self._claims):
            if self._claimed.get(name, 0) < event.revision:
                self._claimed.pop(name, None)
        elif self._progress.pop(name, (0, None))[1] is not None:
            # Progress is deleted when the floor has passed it.
            self._forget(name)

    def _see(self, kv: KeyValue) -> None:
        name = last_segment(kv.key)
        if kv.key.startswith(self._claims):
            self._claimed[name] = max(kv.create_revision, self._claimed.get(name, 0))
        elif kv.mod_revision >= self._progress.get(name, (0, None))[0]:
            progress = parse_progress(kv)
            self._progress[name] = (kv.mod_revision, progress)
            if progress.done:
                self._waiting.pop(name, None)

    def _forget(self, name: str) -> None:
        self._waiting.pop(name, None)
        self._ahead.pop(name, None)

    def _is_done(self, name: str) -> bool:
        known = self._progress.get(name)
        return known is not None and known[1].done

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def _read_floor(self) -> None:
        """Read the cursor, and go on from there."""
        found = await self._group.known_cursor()
        self._take_floor(found)
        self._reader.since = found.create_revision
        self._reader.move(max(self._reader.position, self._floor))

    def _take_floor(self, kv: KeyValue) -> None:
        self._cursor_seen = kv.mod_revision
        self._floor = Cursor.parse(kv).position(kv)
        for name, position in tuple(self._ahead.items()):
            if position > self._floor:
                break
            self._forget(name)
        self._tell()

    # ── claiming ────────────────────────────────────────────────────────────────────────────────

    def _next_free(self) -> Record | None:
        for handling in tuple(self._open.values()):
            if handling.is_by_hand and not handling.custody.is_held():
                handling.end(Ending.LOST)
        for name, record in self._waiting.items():
            if name not in self._claimed and name not in self._open and name not in self._busy:
                return record
        return None

    def _next_deadline(self) -> float:
        return min([handling.until for handling in self._open.values() if handling.is_by_hand], default=inf)

    async def _expire_old(self) -> None:
        now = trio.current_time()
        for handling in tuple(self._open.values()):
            if handling.is_by_hand and handling.until <= now:
                await handling.expire()

    async def _take(self, record: Record) -> GroupMessage[T] | None:
        """Claim a message, or bury it; None: somebody else was faster, or it is buried."""
        session = await self._space.sessions.current()
        if record.name not in self._waiting:
            return None  # Race: somebody was done with it while there was no session here
        seen, progress = self._progress.get(record.name, (0, Progress()))
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
        self._claimed[name] = outcome.revision
        self._progress[name] = (outcome.revision, begun)
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
        self._note_done(record.name, outcome.revision)
        unclaimed = Claim(session, b"", self._claims, 0)
        handling = Handling(self, self._space, unclaimed, record, attempt=1, until=inf)
        handling.end(Ending.ACKNOWLEDGED)
        return self._group.message(record, handling)

    def _untouched(self, record: Record, seen: int) -> tuple[Compare, ...]:
        keys, group = self._group.keys, self._group.name
        return (
            Compare.absent(keys.claim(group, record.name)),
            Compare.modified_at(keys.progress(group, record.name), seen),
            Compare.modified_at(self._group.cursor_key, self._cursor_seen),
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
            self._see(kv)
        if cursor[0].mod_revision != self._cursor_seen:
            self._take_floor(cursor[0])
        elif not all(isinstance(standing, TxnResult) and standing.succeeded for standing in looks[4:]):
            # A copy of a dead letter that has another copy by now, or is none any more.
            self._waiting.pop(name, None)
        elif not message and name in self._waiting:
            lost = self._ahead[name].revision
            self._forget(name)
            self._tell()
            raise MessagesLostError(f"message {name!r} was deleted unread", lost - 1, lost)
        elif not claim and not progress:
            self._progress.pop(name, None)

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
                self._tell()
        if not isinstance(outcome, Committed):
            return False
        claim.session.janitor.known_keys.discard(claim.key)
        self._open.pop(record.name, None)
        self._claimed.pop(record.name, None)
        self._note_done(record.name, outcome.revision)
        return True

    def _note_done(self, name: str, revision: int) -> None:
        if name in self._ahead:
            self._progress[name] = (revision, Progress(done=True))
        self._waiting.pop(name, None)
        self._tell()

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
            self._tell()

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
        self._claimed.pop(name, None)
        self._tell()

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
        self._note_done(record.name, outcome.revision)

    async def _bury(self, record: Record, seen: int, attempts: int, reason: str) -> None:
        logger.warning("%r of %r is a dead letter now", record.name, self._group.name)
        done = self._put_progress(record.name, Progress(attempts, done=True))
        burial = self._group.burial(record, attempts, reason)
        change = Change((*burial, done), (), self._untouched(record, seen), self._looks(record))
        outcome = await commit(self._space.sessions, self._space.keys, fit(change))
        if isinstance(outcome, Committed):
            self._note_done(record.name, outcome.revision)
        else:
            self._look(record, outcome.reads)

    # ── the floor ───────────────────────────────────────────────────────────────────────────────

    def _done_at_floor(self) -> list[str]:
        found: list[str] = []
        for name in self._ahead:
            if name in self._waiting or name in self._open or len(found) == FLOOR_STEP:
                break
            found.append(name)
        return found

    async def _move_floor(self) -> None:
        """Move the floor over those that are done; if somebody else was faster, take that in."""
        names = self._done_at_floor()
        if not names:
            return
        cursor = Cursor(*self._ahead[names[-1]], shared=True)
        keys, group = self._group.keys, self._group.name
        spent = [DeleteRange(KeyRange.one(keys.progress(group, name))) for name in names]
        one = KeyRange.one(self._group.cursor_key)
        change = Change(
            (Put(one.key, cursor.to_json()), *spent, *self._forget_trimmed()),
            (),
            (Compare.modified_at(one.key, self._cursor_seen),),
            (Range(one),),
        )
        outcome = await commit(self._space.sessions, self._space.keys, fit(change))
        if isinstance(outcome, Committed):
            self._cursor_seen = outcome.revision
            self._floor = Position(cursor.revision, cursor.name)
            for name in names:
                self._progress.pop(name, None)
                self._forget(name)
            self._tell()
            return
        found = found_in(outcome.reads[0])
        if not found:
            raise self._group.deleted()
        self._take_floor(found[0])

    def _forget_trimmed(self) -> list[Txn]:
        """Return what deletes the progress of messages that are gone: no floor will ever pass them."""
        keys, group = self._group.keys, self._group.name
        unread = (name for name in self._progress if name not in self._ahead and name not in self._claimed)
        return [
            Txn(
                (Compare.absent(keys.message(name)), Compare.absent(keys.claim(group, name))),
                (DeleteRange(KeyRange.one(keys.progress(group, name))),),
            )
            for name in nsmallest(FORGOTTEN_TOGETHER, unread)
        ]

    async def _close(self) -> None:
        """Give back what was not acknowledged, and move the floor, in about two seconds."""
        for handling in tuple(self._open.values()):
            handling.close()
            await self.abandon(handling)
        session = self._space.sessions.session
        if session is not None and not session.lease.is_lost():
            with (
                trio.move_on_at(session.clean_up_deadline(), shield=True),
                suppress(EtcdError, SessionLostError),
            ):
                await self._move_floor()
