"""
A line ordered by create revision: join it, leave it.

Keys
    ``{line}{lease}-{n}``  one place; the value says who stands there. ``n`` is never used twice.

Algorithm
    1. Join: ``[mod(session)==generation, absent(mine)] → [put mine, the line's last two keys] else [look]``.
       Alone in line: it is my turn, after one round trip. The token is the create revision of my key.
    2. Otherwise wait, see `_turn`.
    3. Leave: ``[created(mine)==token] → [delete mine]``; while a copy of the join is without an answer
       ``[mod(session)==generation] → [put session, delete mine]``, which kills that copy for ever.
    4. If the next in line waits in this process, the owner's leaving Txn reads its key, too: found, it is
       granted at once, without a round trip of its own.

Guarantees
    Tokens grow strictly from owner to owner. Cancelled at any point it leaves no key behind, at once or by
    the session's janitor, and no late copy of a join ever comes back after leaving.

Does not guarantee
    That the owner still is one when it acts: writes carry the fence.

Source
    etcd ``client/v3/concurrency/key.go``. There a late copy of a join may come back.
"""

# Over the budget of 250 lines: joining and leaving share the bookkeeping of unanswered copies.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.keys import place
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    DeleteRangeResult,
    KeyRange,
    Op,
    OpResult,
    Put,
    Range,
    RangeResult,
    SortTarget,
    Txn,
    TxnResult,
)
from etcd_infra._policy.backoff import delay
from etcd_infra.errors import (
    EtcdError,
    InvalidAnswerError,
    LeaseNotFoundError,
    LockLostError,
    OutcomeUnknownError,
    SessionLostError,
    StoreResetError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._session.keepalive import LivingLease
    from etcd_infra._session.key_watch import Guarded, KeyWatch
    from etcd_infra._session.session import Session


@dataclass(frozen=True, slots=True)
class Spot:
    """
    Where, and as what, one stands in line.

    Attributes:
        prefix: Of all lines of this kind: what is watched.
        line: The line's prefix.
        role: What the key's name begins with.
        rivals: Those keys of the line that must be waited for if they are ahead; None: all.
    """

    prefix: bytes
    line: bytes
    role: bytes = b""
    rivals: KeyRange | None = None

    def watch(self, session: Session) -> KeyWatch:
        """Return the session's watch on lines of this kind."""
        return session.key_watch(self.prefix)

    def place(self, session: Session, value: bytes, lease: LivingLease | None = None) -> Place:
        """Return a new place of a session, not in line yet."""
        return Place(session, self, value, lease)


class NotAdmittedError(Exception):
    """The conditions of a join do not hold: not in line, and no copy of the join will be."""


class Place:
    """
    One place in a line.

    Args:
        session: Whose place it is.
        spot: Where it is.
        value: Who stands there.
        lease: What it hangs on; None: the session's.

    Attributes:
        key: Unique to this place, for ever.
        token: The key's create revision; 0 while not in line.
        is_first: Whether it is known to be this place's turn.
        ahead: Who was directly ahead when it joined, if the join's answer told.
        waited: Whether somebody was ahead.
    """

    def __init__(self, session: Session, spot: Spot, value: bytes, lease: LivingLease | None = None) -> None:
        self.watch = spot.watch(session)
        self.session = session
        self.lease = lease or session.lease
        self.line = KeyRange.prefix(spot.line)
        self.rivals = spot.rivals or self.line
        # Read, so that group commit never lets two in one line have one create revision, not even those that
        # do not wait for each other.
        whole = Range(self.line, keys_only=True, limit=1)
        self._apart: tuple[Op, ...] = () if self.rivals == self.line else (whole,)
        # With several owners at a time, who goes need not be the one that the next in line waits for.
        self._has_heirs = spot.rivals is None
        self._value = value
        self._unanswered = 0  # the highest generation that a copy without an answer compares
        self.key = place(spot.line, self.lease.id, session.next_number(), role=spot.role)
        self.token = 0
        self.is_first = False
        self.ahead: KeyValue | None = None
        self.waited = False
        session.janitor.known_keys.add(self.key)

    def guard(self, gone: Callable[[], None]) -> tuple[Guarded, ...]:
        """Call `gone` if my key ends, until the guard is told to `forget`."""
        return (self.watch.guard(self.key, self.token, gone),)

    async def is_there(self) -> bool:
        """Look whether my key is there still; one round trip."""
        found = await self.session.backend.get(self.key)
        return found is not None and found.create_revision == self.token

    def share_fate(self, other: Place) -> None:
        """Take in that my key was put by the Txn by which `other` joined, or may be still."""
        self.token, self._unanswered = other.token, other._unanswered

    @property
    def put(self) -> Put:
        """What joining writes."""
        return Put(self.key, self._value, lease=self.lease.id)

    # ── joining ─────────────────────────────────────────────────────────────────────────────────

    async def join(self, conditions: tuple[Compare, ...] = (), also: tuple[Op, ...] = ()) -> bool:
        """
        Stand in line; return whether it is my turn already.

        Args:
            conditions: What must hold when the place is taken.
            also: What is done in the same Txn.

        Raises:
            NotAdmittedError: the conditions do not hold. If they may come true again, a copy without an answer
                may still join: see `withdraw`.
            SessionLostError, StorageFullError, EtcdError: not in line, or not any more.

        Cancellation:
            Perhaps in line: call `leave`.

        Round trips:
            One.
        """
        # etcd: sorting reads the whole line; so does its Go client's join.
        last_two = Range(self.rivals, sort_by=SortTarget.CREATE, descending=True, keys_only=True, limit=2)
        answer = await self._enter(conditions, (*also, last_two), (last_two,))
        if not self.token and conditions:
            raise NotAdmittedError
        if not self.token:
            # Nothing but a generation from the future refuses an unconditional join for good.
            self.session.lose(StoreResetError(f"the store is behind our own session key: {answer}"))
            self.session.check()
        others = [kv for kv in _found(answer.results[-1]).kvs if kv.key != self.key]
        self.is_first = not others
        if others and answer.succeeded:
            self.ahead = others[0]
        return self.is_first

    async def try_join(self) -> bool:
        """
        Stand in line if nobody does; return whether that worked.

        Raises, Cancellation, Round trips:
            As `join`. After False there is nothing to leave, and no late copy will ever join.
        """
        first = Range(self.rivals, sort_by=SortTarget.CREATE, keys_only=True, limit=1)
        answer = await self._enter((Compare.nothing_in(self.rivals),), (), (first,))
        # Race: a copy of this may have joined first, and its key may have been written anew since, by
        # somebody else and behind others: only the line's order tells whose turn it is.
        if answer.succeeded or (self.token and self._is_nobody_ahead(_found(answer.results[-1]))):
            self.is_first = True
            return True
        # etcd: "nobody is in line" can become true again, for a copy that is still on its way: it must be
        # stale before "no" is an answer.
        await self.withdraw()
        return False

    async def withdraw(self) -> None:
        """
        Be in line no more, nor ever again: repeat until that is definite.

        Raises:
            SessionLostError: the place goes with the session.
        """
        failures = 0
        while self._unanswered or self.token:
            try:
                await self._leave()
            except EtcdError:
                self.session.check()
                await trio.sleep(delay(failures, self.session.random.random()))
                failures += 1
        self._left()

    def moved_on(self, revision: int) -> None:
        """Take in that my key was deleted at `revision`, by a Txn of this process; then `leave`."""
        self.token = 0
        self.watch.deliver_deleted(self.key, revision)

    def _is_nobody_ahead(self, first: RangeResult) -> bool:
        return not first.kvs or first.kvs[0].create_revision >= self.token

    async def _enter(
        self, conditions: tuple[Compare, ...], reads: tuple[Op, ...], looks: tuple[Op, ...]
    ) -> TxnResult:
        """Send the joining Txn until its outcome is definite."""
        self.session.janitor.known_keys.add(self.key)
        failures = 0
        while True:
            generation = await self.session.own_key.living_generation()
            answer = await self._send_join(generation, conditions, reads, looks)
            if answer is None:
                await trio.sleep(delay(failures, self.session.random.random()))
                failures += 1
            elif answer.succeeded:
                self.token = answer.revision
                return answer
            else:
                own, mine = _found(answer.results[0]), _found(answer.results[1])
                if mine.kvs:  # an earlier copy of ours was applied
                    self.token = mine.kvs[0].create_revision
                    return answer
                moved = self.session.own_key.saw(own, answer.revision)
                if not moved and generation == self.session.own_key.generation:
                    return answer  # the conditions failed

    async def _send_join(
        self, generation: int, conditions: tuple[Compare, ...], reads: tuple[Op, ...], looks: tuple[Op, ...]
    ) -> TxnResult | None:
        guards = (Compare.modified_at(self.session.own_key.key, generation), Compare.absent(self.key))
        request = Txn(
            (*guards, *conditions),
            (self.put, *self._apart, *reads),
            (Range(KeyRange.one(self.session.own_key.key)), Range(KeyRange.one(self.key)), *looks),
        )
        seen = self.session.lease.highest_revision
        unanswered, self._unanswered = self._unanswered, generation
        try:
            answer = await self.session.backend.txn(request)
        except OutcomeUnknownError:
            return None
        except UnavailableError:
            self._unanswered = unanswered
            return None
        except LeaseNotFoundError as error:
            self._unanswered = unanswered
            self.lease.lose(SessionLostError(f"lease {self.lease.id:x} does not exist any more"))
            self.session.check()
            msg = f"the lock's own lease ended before its key was written: {self.lease.error}"
            raise LockLostError(msg) from error
        except EtcdError:
            self._unanswered = unanswered
            raise
        self._unanswered = unanswered
        self.session.lease.saw_revision(answer.revision, at_least=seen)
        self.session.check()
        return answer

    # ── leaving ─────────────────────────────────────────────────────────────────────────────────

    async def leave(self, *, until: float) -> bool | None:
        """
        Leave the line, shielded, until Trio's time `until` at most; what is left then, the janitor does.

        Returns:
            Whether my key was still there; None if that is not known.

        Cancellation:
            Is delivered at the caller's next checkpoint; the line is left all the same.

        Round trips:
            One.
        """
        unclear = False
        failures = 0
        with trio.move_on_at(until, shield=True):
            await trio.lowlevel.checkpoint_if_cancelled()
            while not self.session.lease.is_lost() and not self.lease.is_lost():
                try:
                    return await self._leave() or (None if unclear else False)
                except EtcdError as error:
                    unclear = unclear or isinstance(error, OutcomeUnknownError)
                    await trio.sleep(delay(failures, self.session.random.random()))
                    failures += 1
        if self.lease.is_lost():
            self._left()
        else:
            self.session.clean_up_ran_out()
            self.session.janitor.take_over(self._leave)
        return None

    async def _leave(self) -> bool:
        """Leave; return whether my key was there. An `EtcdError` means that nothing is definite."""
        there = False
        if self._unanswered:
            there = await self._outdate()
        if self.token:
            there = await self._hand_over()
        self._left()
        return there

    async def _hand_over(self) -> bool:
        """Delete my key; if it was the owner's, and the next in line is in this process, grant it its turn."""
        heir = self.watch.heir_of(self.key) if self.is_first and self._has_heirs else None
        mine = Compare.created_at(self.key, self.token)
        looks = (Range(KeyRange.one(heir.key), keys_only=True),) if heir is not None else ()
        request = Txn((mine,), (DeleteRange(KeyRange.one(self.key)), *looks))
        answer = await self.session.backend.txn(request)
        if answer.succeeded:
            if heir is not None:
                heir.inherit(_found(answer.results[1]))
            # Whoever waits in this process need not wait for the event as well.
            self.watch.deliver_deleted(self.key, answer.revision)
        return answer.succeeded

    async def _outdate(self) -> bool:
        """
        Make every copy without an answer stale; return whether my key was deleted on the way.

        Afterwards `token` is what a read showed that no copy can change any more.
        """
        own_key = self.session.own_key
        looked = False
        while self._unanswered >= own_key.generation > 0:
            answer = await own_key.move(self.key)
            if answer.succeeded:
                deleted = answer.results[0]
                self._unanswered = self.token = 0
                return isinstance(deleted, DeleteRangeResult) and deleted.deleted > 0
            self._see(_found(answer.results[1]))
            looked = True
        if not looked:
            self._see(await self.session.backend.range(Range(KeyRange.one(self.key))))
        self._unanswered = 0
        return False

    def _see(self, mine: RangeResult) -> None:
        self.token = mine.kvs[0].create_revision if mine.kvs else 0

    def _left(self) -> None:
        self.session.janitor.known_keys.discard(self.key)
        self.token = 0


def _found(result: OpResult) -> RangeResult:
    if not isinstance(result, RangeResult):
        msg = f"a range was asked for, and {result} was answered"
        raise InvalidAnswerError(msg)
    return result
