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

from contextlib import asynccontextmanager, suppress
from math import inf
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Put, Range, Txn
from etcd_infra._policy.backoff import delay as backoff
from etcd_infra._primitives._budget import fit
from etcd_infra._primitives._cas import Change, Committed, commit, found_in
from etcd_infra._primitives._group import Cursor, Group
from etcd_infra._primitives._shared_desk import SharedDesk
from etcd_infra._primitives._shared_view import SharedView
from etcd_infra._session.mirror import Changes, Snapshot, open_mirror
from etcd_infra.errors import (
    ConflictError,
    EtcdError,
    MessagesLostError,
    SessionLostError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from etcd_infra._primitives._reader import Reader
    from etcd_infra._primitives.message import GroupMessage
    from etcd_infra._session.mirror import Mirror

T = TypeVar("T")

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
        self._view = SharedView(group)
        self._desk = SharedDesk(group, self._view, ack_after=ack_after, max_retries=max_retries)
        self._store_is_new = False
        self._reading = trio.CancelScope()
        self._lost: list[Exception] = []

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
            changed = self._view.changed
            await self._desk.expire_old()
            done = len(self._done_at_floor())
            if done >= FLOOR_STEP:
                await self._move_floor()
            record = self._desk.next_free()
            if record is None:
                idle_at = trio.current_time() + IDLE_SECONDS if done else inf
                with trio.move_on_at(min(self._desk.next_deadline(), idle_at)) as idle:
                    await changed.wait()
                if idle.cancelled_caught and done:
                    await self._move_floor()
                continue
            try:
                message = await self._desk.take(record)
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
        shared = KeyRange.prefix(self._group.keys.shared(self._group.name))
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
        view, resets = self._view, self._reader.resets
        while True:
            # Those that somebody handles, or that wait for a second try, hold up nobody.
            while len(view.waiting) - len(view.claimed) >= WAITING or len(view.ahead) >= AHEAD:
                await view.changed.wait()
            try:
                if self._store_is_new or resets != self._reader.resets:
                    await self._begin_anew()
                    resets = self._reader.resets
                with trio.CancelScope() as self._reading:
                    view.add(await self._reader.next())
            except MessagesLostError as error:
                self._lost.append(error)
            except (EtcdError, ConflictError, SessionLostError) as error:
                # Once is enough, until somebody hears of it.
                if not self._lost or isinstance(self._lost[-1], MessagesLostError):
                    self._lost.append(error)
                view.tell()
                await trio.sleep(1.0)
            view.tell()

    async def _begin_anew(self) -> None:
        """Go by the floor of a store that was restored or wiped."""
        found = await self._group.known_cursor()
        self._store_is_new = False
        self._view.begin_anew()
        self._view.take_floor(found)
        self._reader.move(self._view.floor)

    async def _follow(self, mirror: Mirror, task_status: trio.TaskStatus[None]) -> None:
        """Keep claims and progress up to date; started once they are."""
        while True:
            match await mirror.receive():
                case Snapshot(kvs=kvs, store_reset=store_reset):
                    if store_reset:
                        # What was done in the store before may not be done in this one.
                        self._store_is_new = True
                        self._reading.cancel()
                    self._view.replace(kvs)
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                case Changes(events):
                    for event in events:
                        self._view.saw(event)
            self._view.tell()

    async def _read_floor(self) -> None:
        """Read the cursor, and go on from there."""
        found = await self._group.known_cursor()
        self._view.take_floor(found)
        self._reader.since = found.create_revision
        self._reader.move(max(self._reader.position, self._view.floor))

    # ── the floor ───────────────────────────────────────────────────────────────────────────────

    def _done_at_floor(self) -> list[str]:
        found: list[str] = []
        for name in self._view.ahead:
            if name in self._view.waiting or self._desk.has(name) or len(found) == FLOOR_STEP:
                break
            found.append(name)
        return found

    async def _move_floor(self) -> None:
        """Move the floor over those that are done; if somebody else was faster, take that in."""
        names = self._done_at_floor()
        if not names:
            return
        floor = self._view.ahead[names[-1]]
        keys, group = self._group.keys, self._group.name
        spent = [DeleteRange(KeyRange.one(keys.progress(group, name))) for name in names]
        one = KeyRange.one(self._group.cursor_key)
        change = Change(
            (Put(one.key, Cursor(*floor, shared=True).to_json()), *spent, *self._forget_trimmed()),
            (),
            (Compare.modified_at(one.key, self._view.cursor_revision),),
            (Range(one),),
        )
        outcome = await commit(self._space.sessions, self._space.keys, fit(change))
        if isinstance(outcome, Committed):
            self._view.moved_floor(floor, names, outcome.revision)
            return
        found = found_in(outcome.reads[0])
        if not found:
            raise self._group.deleted()
        self._view.take_floor(found[0])

    def _forget_trimmed(self) -> list[Txn]:
        """Return what deletes the progress of messages that are gone: no floor will ever pass them."""
        keys, group = self._group.keys, self._group.name
        return [
            Txn(
                (Compare.absent(keys.message(name)), Compare.absent(keys.claim(group, name))),
                (DeleteRange(KeyRange.one(keys.progress(group, name))),),
            )
            for name in self._view.unread(FORGOTTEN_TOGETHER)
        ]

    async def _close(self) -> None:
        """Give back what was not acknowledged, and move the floor, in about two seconds."""
        await self._desk.close()
        session = self._space.sessions.session
        if session is not None and not session.lease.is_lost():
            with (
                trio.move_on_at(session.clean_up_deadline(), shield=True),
                suppress(EtcdError, SessionLostError),
            ):
                await self._move_floor()
