"""
A number of permits; whoever has one may work, whoever waits is served first come, first served.

Keys
    ``{ns}semaphore/{name}/queue/{lease}-{n}``   who waits: a line as a lock's.
    ``{ns}semaphore/{name}/holder/{lease}-{n}``  who has a permit.
    ``{ns}semaphore/{name}/permits``             how many there are; without a lease.

Algorithm
    1. Join the queue and come first in it, as for a lock: only the head of the queue looks for a permit.
    2. Count the holders, at one revision. If there is a permit left: ``[I am the head, no holder came since,
       the permits are the same] → [put holder, delete my place in the queue]``. Else wait until a holder goes.
    3. An attempt does the same without a place in the queue, if nobody is in it.
    4. The number of permits is written by whoever finds the semaphore idle, and compared by everybody else.

Guarantees
    Never more holders than permits. One release wakes one waiter, however many wait. A fence is proof of the
    own permit, and tokens grow in the order in which permits were given.

Does not guarantee
    That no more than so many *act*: as with a lock, that is what the fence is for.

Source
    Apache Curator's ``InterProcessSemaphoreV2`` (a lock in front of counted leases).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Operator, Put, Range, Target, Txn
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._lock_like import LockLike
from etcd_infra._primitives._reads import unchanged_since
from etcd_infra._primitives._turn import ask, come_first, listening
from etcd_infra._primitives._waitqueue import NotAdmittedError, Spot
from etcd_infra._primitives._who import introduce
from etcd_infra._primitives.semaphore_info import SemaphoreInfo, inspect_semaphore
from etcd_infra.errors import ConflictError

if TYPE_CHECKING:
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._etcd.model import KeyValue, Op
    from etcd_infra._primitives._hold import Hold
    from etcd_infra._primitives._waitqueue import Place
    from etcd_infra._session.current import SessionSource
    from etcd_infra._session.session import Session


class Semaphore(LockLike):
    """
    The semaphore `name` with `permits` permits; each is taken, held, lost and given back as a `Lock` is.

    Raises (on taking):
        ConflictError: it is in use with another number of permits.

    Args:
        sessions: A session, or what replaces it when it is lost.
        keys: The namespace's key layout.
        name: Non-empty, at most 512 bytes.
        permits: At least 1.
    """

    def __init__(self, sessions: SessionSource, keys: Keys, name: str, permits: int) -> None:
        if type(permits) is not int:
            msg = f"permits must be an int, not {permits!r}"
            raise TypeError(msg)
        if permits < 1:
            msg = f"permits must be at least 1, not {permits}"
            raise ValueError(msg)
        super().__init__(sessions, keys, name)
        self.permits = permits
        self._queue = Spot(keys.semaphores, keys.semaphore_queue(name))
        self._permits_key = keys.semaphore_permits(name)

    def __repr__(self) -> str:
        return f"<Semaphore {self.name!r} of {self.permits}>"

    def _find_spot(self) -> Spot:
        holders = self._keys.semaphore_holders(self.name)
        return Spot(self._keys.semaphores, holders, rivals=KeyRange.prefix(holders))

    async def inspect(self) -> SemaphoreInfo:
        """
        Describe who has a permit and who waits.

        Round trips:
            One.
        """
        session = await self._sessions.current()
        return await inspect_semaphore(session.backend, self._keys, self.name)

    async def _take(self, session: Session, *, wait: bool) -> Hold | None:
        who = introduce(session)
        holder = self._spot.place(session, who)
        try:
            taken = await (self._wait(session, holder, who) if wait else self._try(session, holder))
            if not taken:
                await holder.withdraw()
        except BaseException:
            await holder.leave(until=session.clean_up_deadline())
            raise
        if holder.waited or not taken:
            session.tally.lock_conflicts += 1
        return self._granted(session, holder, None) if taken else None

    async def _wait(self, session: Session, holder: Place, who: bytes) -> bool:
        moved = False
        while not moved:
            place = self._queue.place(session, who)
            try:
                await come_first(place)
                moved = await self._move(session, place, holder)
            finally:
                await place.leave(until=session.clean_up_deadline())
            holder.waited = holder.waited or place.waited
        return True

    async def _move(self, session: Session, place: Place, holder: Place) -> bool:
        """Move from the head of the queue to the holders; False: the place in the queue is gone."""
        head = (
            Compare.created_at(place.key, place.token),
            Compare(Target.CREATE, Operator.GREATER, place.line, place.token - 1),
        )
        with listening(holder) as turn:
            while True:
                await holder.watch.ready()
                turn.begin()
                free, conditions, ops, mine = await self._look(session, holder, place.key)
                if mine is None or mine.create_revision != place.token:
                    return False
                if free:
                    gone = DeleteRange(KeyRange.one(place.key))
                    try:
                        await holder.join((*head, *conditions), (gone, *ops))
                    except NotAdmittedError:
                        await holder.withdraw()
                        continue
                    place.moved_on(holder.token)
                    return True
                holder.waited = True
                await turn.wait_line_changed()

    async def _try(self, session: Session, holder: Place) -> bool:
        nobody_waits = Compare.nothing_in(KeyRange.prefix(self._queue.line))
        while True:
            free, conditions, ops, waiting = await self._look(session, holder, self._queue.line)
            if not free or waiting is not None:
                await trio.lowlevel.checkpoint()
                return False
            try:
                await holder.join((nobody_waits, *conditions), ops)
            except NotAdmittedError:
                await holder.withdraw()
                continue
            return True

    async def _look(
        self, session: Session, holder: Place, queued: bytes
    ) -> tuple[bool, tuple[Compare, ...], tuple[Op, ...], KeyValue | None]:
        """
        Count the holders; return whether a permit is free, what must still hold then, and what to write.

        And the key `queued` in the queue, or, if it is the queue's prefix, the first one in it.
        """
        queue = KeyRange.prefix(queued) if queued.endswith(b"/") else KeyRange.one(queued)
        looks = (
            Range(holder.line, keys_only=True),
            Range(KeyRange.one(self._permits_key)),
            Range(queue, keys_only=True, limit=1),
            Range(KeyRange.prefix(self._queue.line), keys_only=True, limit=2),
        )
        answer = await ask(holder, lambda: session.backend.txn(Txn(success=looks)))
        holders, stored, mine, waiting = map(found_in, answer.results)
        ops: tuple[Op, ...] = ()
        encoded = b"%d" % self.permits
        if not stored or stored[0].value != encoded:
            if stored and (holders or len(waiting) > 1):
                there = stored[0].value.decode(errors="replace")
                msg = f"{self!r} is in use with {there} permits"
                raise ConflictError(msg, self.name)
            ops = (Put(self._permits_key, encoded),)
        same = Compare.modified_at(self._permits_key, stored[0].mod_revision if stored else 0)
        conditions = (unchanged_since(holder.line, answer.revision), same)
        return len(holders) < self.permits, conditions, ops, mine[0] if mine else None
