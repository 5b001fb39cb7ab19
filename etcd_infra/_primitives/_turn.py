"""
Waiting for one's turn in a line.

Algorithm
    1. Listen to the whole line, then look who is ahead: the two keys with the largest create revision up to
       mine are mine and the one directly ahead. If the line was listened to already when it was joined, the
       joining Txn's own answer is that look.
    2. Listen to that one key only, so that one release wakes one waiter; when it goes, look again.
    3. My turn is granted only by an answer that shows my own key: a look, or the leaving Txn of an owner in
       this process, which reads the key of the next in line.

Source
    etcd ``client/v3/concurrency/mutex.go``, where a waiter whose own key is gone waits on (#19597).
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from etcd_infra._etcd.model import KeyRange, KeyValue, Range, RangeResult, SortTarget, Txn, TxnResult
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._cas import found_in
from etcd_infra.errors import EtcdError, LockLostError, SessionLostError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from typing import Self

    from etcd_infra._etcd.model import Compare
    from etcd_infra._primitives._waitqueue import Place


LOOK_AGAIN_SECONDS: Final = 30.0

AnswerT = TypeVar("AnswerT", RangeResult, TxnResult)


async def come_first(place: Place, conditions: tuple[Compare, ...] = ()) -> None:
    """
    Join the line, and wait until it is the turn of `place`.

    Args:
        place: Not in line yet.
        conditions: As for `Place.join`.

    Raises:
        NotAdmittedError: the conditions do not hold.
        LockLostError: the place was deleted.
        SessionLostError: the place went with the session.
        StorageFullError, AccessDeniedError: etcd refuses; the line may not be watched.

    Cancellation:
        Perhaps in line: call `Place.leave`.

    Round trips:
        One if nobody is in line. Otherwise one more for each predecessor seen: none for one in this process,
        nor for the first one while this process watches its lines already.
    """
    is_watching = place.watch.is_open
    if not is_watching and await place.join(conditions):
        return
    with _Turn(place) as turn:
        if is_watching:
            # Listened to since before the join, its answer is as good as a look.
            turn.listen(place.line.key)
            if await place.join(conditions):
                return
        await _wait(turn, place, place.ahead if is_watching else None)


async def wait_turn(place: Place) -> None:
    """Wait until it is the turn of `place`, which is in line; else as `come_first`."""
    with _Turn(place) as turn:
        await _wait(turn, place, None)


async def _wait(turn: _Turn, place: Place, ahead: KeyValue | None) -> None:
    place.waited = True
    turn.listen(place.key)
    while not place.is_first:
        if ahead is None:
            turn.listen(place.line.key)
            await place.watch.ready()
            turn.begin()
            ahead = await _look(place)
        if ahead is None:
            place.is_first = True
            return
        # Race: whoever is ahead may have gone between the look and this line; as long as the whole
        # line is listened to, that is known.
        turn.stand_behind(ahead.key)
        turn.ignore(place.line.key)
        await turn.wait_changed()
        ahead = None


async def _look(place: Place) -> KeyValue | None:
    """Return who is directly ahead of those that must be waited for, None if nobody is."""
    up_to_me = Range(
        place.rivals,
        max_create_revision=place.token,
        sort_by=SortTarget.CREATE,
        descending=True,
        keys_only=True,
        limit=2,
    )
    found = (
        (await _read(place, up_to_me)).kvs if place.key in place.rivals else await _read_both(place, up_to_me)
    )
    # Invariant: nobody is granted anything without its own key having been seen (etcd #11456).
    if not found or found[0].key != place.key or found[0].create_revision != place.token:
        place.token = 0
        raise await end_of(place)
    return found[1] if len(found) > 1 else None


async def end_of(place: Place) -> LockLostError:
    """
    Say that a place is gone.

    Raises:
        SessionLostError: it went with the session.
    """
    # The key went with its lease, or by itself: only etcd can tell.
    with suppress(EtcdError, SessionLostError):
        await place.lease.renew()
    place.session.check()
    return LockLostError(f"the place {place.key!r} in line was deleted")


async def _read_both(place: Place, ahead: Range) -> tuple[KeyValue, ...]:
    """Read my own key, which is none of the rivals', and those ahead, at one revision."""
    own = Range(KeyRange.one(place.key), keys_only=True)
    answer = await ask(place, lambda: place.session.backend.txn(Txn(success=(own, ahead))))
    mine, rivals = map(found_in, answer.results)
    return (*mine, *rivals)


async def _read(place: Place, request: Range) -> RangeResult:
    return await ask(place, lambda: place.session.backend.range(request))


async def ask(place: Place, ask: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
    """Ask however long it takes: the place in line is worth more, and the session bounds the wait."""
    failures = 0
    while True:
        with suppress(UnavailableError):
            answer = await ask()
            # etcd: some servers answer linearizable reads with an older revision now and then (#20418). It
            # shows somebody ahead whose end was told already, and will not be told again.
            if answer.revision >= max(place.token, place.watch.told_up_to):
                return answer
        await trio.sleep(delay(failures, place.session.random.random()))
        failures += 1


@contextmanager
def listening(place: Place) -> Generator[_Turn]:
    """Listen to the whole line of `place`, for the length of a body."""
    with _Turn(place) as turn:
        turn.listen(place.line.key)
        yield turn


class _Turn:
    """One waiting place, and what it was told since it last looked."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._ahead = b""
        self._names: set[bytes] = set()
        self._deleted: set[bytes] = set()
        self._look_again = False
        self._told = trio.Event()
        self.key = place.key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._place.watch.stand_behind(self._ahead, None)
        for name in tuple(self._names):
            self.ignore(name)

    def listen(self, name: bytes) -> None:
        self._names.add(name)
        self._place.watch.listen(name, self)

    def ignore(self, name: bytes) -> None:
        self._names.discard(name)
        self._place.watch.ignore(name, self)

    def stand_behind(self, ahead: bytes) -> None:
        """Listen to the one directly ahead, and be its heir."""
        self._place.watch.stand_behind(self._ahead, None)
        self.ignore(self._ahead)
        self._ahead = ahead
        self.listen(ahead)
        self._place.watch.stand_behind(ahead, self)

    def begin(self) -> None:
        """Forget what a look from now on will show anyway."""
        self._deleted.clear()
        self._look_again = False

    async def wait_changed(self) -> None:
        """Wait until it is granted, or my key or the one ahead was deleted, or that can not be told."""
        while not (self._place.is_first or self._look_again or self._deleted & {self.key, self._ahead}):
            self._told = trio.Event()
            # etcd: some servers lose a DELETE now and then (#17529, #18089, #19179): look once in a while.
            with trio.move_on_after(LOOK_AGAIN_SECONDS) as patience:
                await self._told.wait()
            self._look_again = self._look_again or patience.cancelled_caught
        await trio.lowlevel.checkpoint_if_cancelled()

    async def wait_line_changed(self) -> None:
        """Wait until a key of the line was deleted since `begin`, or that can not be told."""
        while not (self._look_again or self._deleted):
            self._told = trio.Event()
            with trio.move_on_after(LOOK_AGAIN_SECONDS) as patience:
                await self._told.wait()
            self._look_again = self._look_again or patience.cancelled_caught
        await trio.lowlevel.checkpoint_if_cancelled()

    def inherit(self, mine: RangeResult) -> None:
        """Take in what the owner's leaving Txn read of my key: if I am in line still, it is my turn."""
        if mine.kvs and mine.kvs[0].create_revision == self._place.token:
            self._place.is_first = True
            self._told.set()

    def key_deleted(self, key: bytes, revision: int) -> None:  # noqa: ARG002
        """See `Listener`."""
        self._deleted.add(key)
        self._told.set()

    def read_again(self) -> None:
        """See `Listener`."""
        self._look_again = True
        self._told.set()
