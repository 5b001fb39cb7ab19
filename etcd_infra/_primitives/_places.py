"""
One place in each of several lines, taken by one Txn.

Whoever joins so is ahead of another one in all the lines that both stand in, or in none: so they never wait
for each other in a ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import Compare, Range, SortTarget, Txn
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._turn import ask, end_of, wait_turn
from etcd_infra._primitives._waitqueue import NotAdmittedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from etcd_infra._primitives._waitqueue import Place
    from etcd_infra._session.key_watch import Guarded


class Places:
    """
    Places of one session, each in a line of its own.

    Attributes:
        token: The create revision of all their keys.
        waited: Whether somebody was ahead.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._first, *self._others = places
        self._places = tuple(places)
        self.token = 0
        self.waited = False

    async def come_first(self) -> bool:
        """
        Stand in all lines, from one revision on, and wait until it is my turn in each; return True.

        Raises, Cancellation:
            As `_turn.come_first`; one of the places gone is all lost.

        Round trips:
            Two if nobody is ahead anywhere; otherwise one more for each predecessor seen, and one at the end.
        """
        try:
            await self._join(())
        except NotAdmittedError:
            # An earlier copy of the join was applied, and its first key is gone; or the store went back.
            raise await end_of(self._first) from None
        while not await self._look():
            self.waited = True
            await self._wait_turns()
        return True

    async def _wait_turns(self) -> None:
        """Wait for one turn after the other, or until one of my keys is gone."""
        with trio.CancelScope() as waiting:
            # While one turn is waited for, the other keys may go.
            guarded = self.guard(waiting.cancel)
            try:
                for place in self._places:
                    if not place.is_first:
                        await wait_turn(place)
            finally:
                for one in guarded:
                    one.forget()

    async def try_join(self) -> bool:
        """
        Stand in all lines if nobody stands in any; return whether that worked.

        Raises, Cancellation, Round trips:
            As `come_first`. After False no late copy will ever join.
        """
        try:
            await self._join(tuple(Compare.nothing_in(place.line) for place in self._places))
            if await self._look():
                return True
        except NotAdmittedError:
            pass
        for place in self._places:  # the first one makes late copies stale for all
            await place.withdraw()
        return False

    async def _join(self, conditions: tuple[Compare, ...]) -> None:
        absent = tuple(Compare.absent(place.key) for place in self._others)
        puts = tuple(place.put for place in self._others)
        # Read, so that group commit never lets two in one line have one create revision.
        looks = tuple(Range(place.line, keys_only=True, limit=1) for place in self._others)
        try:
            await self._first.join((*absent, *conditions), (*puts, *looks))
        finally:
            for place in self._others:
                place.share_fate(self._first)
        self.token = self._first.token

    async def _look(self) -> bool:
        """
        Look who is first in each line, at one revision; return whether it is always me.

        Raises:
            LockLostError: one of my keys is gone.
            SessionLostError: they went with the session.
        """
        looks = [
            Range(place.line, sort_by=SortTarget.CREATE, keys_only=True, limit=1) for place in self._places
        ]
        backend = self._first.session.backend
        answer = await ask(self._first, lambda: backend.txn(Txn(self.proof, tuple(looks))))
        # Invariant: nobody is granted anything without its own keys having been seen, all at one revision.
        if not answer.succeeded:
            raise await end_of(self._first)
        for place, found in zip(self._places, answer.results, strict=True):
            kvs = found_in(found)
            place.is_first = bool(kvs) and (kvs[0].key, kvs[0].create_revision) == (place.key, self.token)
        return all(place.is_first for place in self._places)

    async def leave(self, *, until: float) -> bool | None:
        """As `Place.leave`; False if one of the keys was gone."""
        answers: list[bool | None] = []

        async def leave(place: Place) -> None:
            answers.append(await place.leave(until=until))

        # The first one makes late copies stale for all.
        await leave(self._first)
        with trio.CancelScope(shield=True):  # each of them ends in time
            async with trio.open_nursery() as nursery:
                for place in self._others:
                    nursery.start_soon(leave, place)
        return False if False in answers else None if None in answers else True

    def guard(self, gone: Callable[[], None]) -> tuple[Guarded, ...]:
        """As `Place.guard`, for each of the keys."""
        return tuple(guarded for place in self._places for guarded in place.guard(gone))

    async def is_there(self) -> bool:
        """Look whether all keys are there still; one round trip."""
        return (await self._first.session.backend.txn(Txn(self.proof))).succeeded

    @property
    def proof(self) -> tuple[Compare, ...]:
        """What is true only while all keys are there."""
        return tuple(Compare.created_at(place.key, self.token) for place in self._places)
