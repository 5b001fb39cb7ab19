"""
A line ordered by create revision: join it, wait for the one ahead, leave it.

Keys
    ``{line}{lease}-{n}``  one place; the value says who stands there. ``n`` is never used twice.

Algorithm
    1. Join: ``[mod(session)==generation, absent(mine)] → [put mine, the line's first two keys] else [look]``.
       Alone in line: it is my turn, after one round trip. The token is the create revision of my key.
    2. Listen to the line, then look who is ahead: the two keys with the largest create revision up to mine.
    3. Listen to that one key only, so that one release wakes one waiter; when it goes, look again. My turn
       is granted only by a look that shows my own key.
    4. Leave: ``[created(mine)==token] → [delete mine]``; while a copy of the join is without an answer
       ``[mod(session)==generation] → [put session, delete mine]``, which kills that copy for ever.

Guarantees
    Tokens grow strictly from owner to owner. Cancelled at any point it leaves no key behind, at once or by
    the session's janitor, and no late copy of a join ever comes back after leaving.

Does not guarantee
    That the owner still is one when it acts: writes carry the fence.

Source
    etcd ``client/v3/concurrency/mutex.go`` and ``key.go``. There a late copy of a join may come back, and
    a waiter whose key is gone waits on.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.keys import place
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    DeleteRangeResult,
    KeyRange,
    KeyValue,
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
    StorageFullError,
    UnavailableError,
)

if TYPE_CHECKING:
    from typing import Self

    from etcd_infra._session.keepalive import LivingLease
    from etcd_infra._session.key_watch import KeyWatch
    from etcd_infra._session.session import Session


class Place:
    """
    One place in a line.

    Attributes:
        key: Unique to this place, for ever.
        token: The key's create revision; 0 while not in line.
        waited: Whether somebody was ahead.
    """

    def __init__(
        self, session: Session, watch: KeyWatch, line: bytes, value: bytes, lease: LivingLease | None = None
    ) -> None:
        self._session = session
        self.watch = watch
        self._line = KeyRange.prefix(line)
        self._value = value
        self._lease = lease or session.lease
        self._unanswered = 0  # the highest generation that a copy without an answer compares
        self.key = place(line, self._lease.id, session.next_number())
        self.token = 0
        self.waited = False
        session.janitor.known_keys.add(self.key)

    # ── joining ─────────────────────────────────────────────────────────────────────────────────

    async def join(self) -> bool:
        """
        Stand in line; return whether it is my turn already.

        Raises:
            SessionLostError, StorageFullError, EtcdError: not in line, or not any more.

        Cancellation:
            Perhaps in line: call `leave`.

        Round trips:
            One.
        """
        first_two = Range(self._line, keys_only=True, limit=2)
        answer = await self._enter((), (first_two,), (first_two,))
        return _found(answer.results[-1]).count == 1

    async def try_join(self) -> bool:
        """
        Stand in line if nobody does; return whether that worked.

        Raises, Cancellation, Round trips:
            As `join`. After False there is nothing to leave, and no late copy will ever join.
        """
        first = Range(self._line, keys_only=True, limit=1)
        await self._enter((Compare.nothing_in(self._line),), (), (first,))
        if self.token:
            return True
        # etcd: "nobody is in line" can become true again, for a copy that is still on its way: it must be
        # stale before "no" is an answer.
        failures = 0
        while self._unanswered:
            try:
                await self._leave()
            except EtcdError:
                await trio.sleep(delay(failures, self._session.random.random()))
                failures += 1
        self._left()
        return False

    async def _enter(
        self, conditions: tuple[Compare, ...], reads: tuple[Op, ...], looks: tuple[Op, ...]
    ) -> TxnResult:
        """Send the joining Txn until its outcome is definite."""
        failures = 0
        while True:
            generation = await self._session.living_generation()
            answer = await self._send_join(generation, conditions, reads, looks)
            if answer is None:
                await trio.sleep(delay(failures, self._session.random.random()))
                failures += 1
            elif answer.succeeded:
                self.token = answer.revision
                return answer
            else:
                own, mine = _found(answer.results[0]), _found(answer.results[1])
                if mine.kvs:  # an earlier copy of ours was applied
                    self.token = mine.kvs[0].create_revision
                    return answer
                if not self._session.saw_key(own, answer.revision) and generation == self._session.generation:
                    return answer  # the conditions failed

    async def _send_join(
        self, generation: int, conditions: tuple[Compare, ...], reads: tuple[Op, ...], looks: tuple[Op, ...]
    ) -> TxnResult | None:
        guards = (Compare.modified_at(self._session.key, generation), Compare.absent(self.key))
        request = Txn(
            (*guards, *conditions),
            (Put(self.key, self._value, lease=self._lease.id), *reads),
            (Range(KeyRange.one(self._session.key)), Range(KeyRange.one(self.key)), *looks),
        )
        unanswered, self._unanswered = self._unanswered, generation
        try:
            answer = await self._session.backend.txn(request)
        except OutcomeUnknownError:
            return None
        except UnavailableError:
            self._unanswered = unanswered
            return None
        except LeaseNotFoundError as error:
            self._unanswered = unanswered
            self._lease.lose(SessionLostError(f"lease {self._lease.id:x} does not exist any more"))
            self._session.check()
            msg = f"the lock's own lease ended before its key was written: {self._lease.error}"
            raise LockLostError(msg) from error
        except EtcdError:
            self._unanswered = unanswered
            raise
        self._unanswered = unanswered
        return answer

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────

    async def wait_first(self) -> None:
        """
        Wait until it is my turn.

        Raises:
            LockLostError: my place was deleted.
            SessionLostError: my place went with its lease.

        Cancellation:
            Still in line: call `leave`.

        Round trips:
            One, plus one per predecessor seen.
        """
        self.waited = True
        with _Turn(self.watch) as turn:
            turn.listen(self.key)
            while True:
                turn.listen(self._line.key)
                await self.watch.ready()
                turn.begin()
                ahead = await self._look()
                if ahead is None:
                    return
                # Race: whoever is ahead may have gone between the look and this line; as long as the
                # whole line is listened to, that is known.
                turn.listen(ahead.key)
                turn.ignore(self._line.key)
                await turn.wait_deleted(self.key, ahead.key)
                turn.ignore(ahead.key)

    async def _look(self) -> KeyValue | None:
        """Return who is directly ahead of me, None if it is my turn."""
        up_to_me = Range(
            self._line,
            max_create_revision=self.token,
            sort_by=SortTarget.CREATE,
            descending=True,
            keys_only=True,
            limit=2,
        )
        kvs = (await self._session.backend.range(up_to_me)).kvs
        # Invariant: nobody is granted anything without having seen its own key (etcd #11456).
        if not kvs or kvs[0].key != self.key or kvs[0].create_revision != self.token:
            self.token = 0
            with suppress(EtcdError):
                await self._lease.renew()
            msg = f"the place {self.key!r} in line was deleted"
            raise LockLostError(msg)
        return kvs[1] if len(kvs) > 1 else None

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
            await trio.lowlevel.checkpoint()
            while not self._session.lease.is_lost() and not self._lease.is_lost():
                try:
                    return await self._leave() or (None if unclear else False)
                except EtcdError as error:
                    unclear = unclear or isinstance(error, OutcomeUnknownError)
                    await trio.sleep(delay(failures, self._session.random.random()))
                    failures += 1
        if not self._lease.is_lost():
            self._session.janitor.take_over(self._leave)
        return None

    async def _leave(self) -> bool:
        """Leave; return whether my key was there. An `EtcdError` means that nothing is definite."""
        there = False
        if self._unanswered:
            there = await self._outdate()
        if self.token:
            mine = Compare.created_at(self.key, self.token)
            answer = await self._session.backend.txn(Txn((mine,), (DeleteRange(KeyRange.one(self.key)),)))
            there = answer.succeeded
            if there:
                # Whoever waits in this process need not wait for the event as well.
                self.watch.deliver_deleted(self.key, answer.revision)
        self._left()
        return there

    async def _outdate(self) -> bool:
        """
        Make every copy without an answer stale; return whether my key was deleted on the way.

        Afterwards `token` is what a read showed that no copy can change any more.
        """
        looked = False
        while self._unanswered >= self._session.generation > 0:
            answer = await self._move_generation()
            if answer.succeeded:
                deleted = answer.results[0]
                self._unanswered = self.token = 0
                return isinstance(deleted, DeleteRangeResult) and deleted.deleted > 0
            self._session.saw_key(_found(answer.results[0]), answer.revision)
            self._see(_found(answer.results[1]))
            looked = True
        if not looked:
            self._see(await self._session.backend.range(Range(KeyRange.one(self.key))))
        self._unanswered = 0
        return False

    async def _move_generation(self) -> TxnResult:
        session_key = KeyRange.one(self._session.key)
        generation = Compare.modified_at(self._session.key, self._session.generation)
        delete_mine = DeleteRange(KeyRange.one(self.key))
        looks = (Range(session_key), Range(KeyRange.one(self.key)))
        rewrite = Put(self._session.key, self._session.info, lease=self._session.lease.id)
        try:
            answer = await self._session.backend.txn(Txn((generation,), (delete_mine, rewrite), looks))
        except StorageFullError:
            # etcd: NOSPACE refuses every Txn with a put; deleting the session key moves the generation, too.
            forget = DeleteRange(session_key)
            answer = await self._session.backend.txn(Txn((generation,), (delete_mine, forget), looks))
            if answer.succeeded:
                self._session.saw_key(RangeResult(), answer.revision)
        else:
            if answer.succeeded:
                self._session.wrote_key(answer.revision)
        return answer

    def _see(self, mine: RangeResult) -> None:
        self.token = mine.kvs[0].create_revision if mine.kvs else 0

    def _left(self) -> None:
        self._session.janitor.known_keys.discard(self.key)
        self.token = 0


class _Turn:
    """What a waiter was told since it last looked."""

    def __init__(self, watch: KeyWatch) -> None:
        self._watch = watch
        self._names: set[bytes] = set()
        self._deleted: set[bytes] = set()
        self._look_again = False
        self._told = trio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in tuple(self._names):
            self.ignore(name)

    def listen(self, name: bytes) -> None:
        self._names.add(name)
        self._watch.listen(name, self)

    def ignore(self, name: bytes) -> None:
        self._names.discard(name)
        self._watch.ignore(name, self)

    def begin(self) -> None:
        """Forget what a look from now on will show anyway."""
        self._deleted.clear()
        self._look_again = False

    async def wait_deleted(self, *keys: bytes) -> None:
        """Wait until one of `keys` was deleted since `begin`, or that can not be told."""
        while not self._look_again and self._deleted.isdisjoint(keys):
            self._told = trio.Event()
            await self._told.wait()
        await trio.lowlevel.checkpoint_if_cancelled()

    def key_deleted(self, key: bytes, revision: int) -> None:  # noqa: ARG002
        self._deleted.add(key)
        self._told.set()

    def read_again(self) -> None:
        self._look_again = True
        self._told.set()


def _found(result: OpResult) -> RangeResult:
    if not isinstance(result, RangeResult):
        msg = f"a range was asked for, and {result} was answered"
        raise InvalidAnswerError(msg)
    return result
