"""
Retention: one process at a time deletes a topic's oldest messages, by age and by number, in chunks.

Keys
    ``{ns}topic/{topic}/trimmer/{lease}-{n}``  a place in line (see `_waitqueue`): the first one trims.
    ``{ns}topic/{topic}/trimmed``              JSON position of the last message that was deleted.

Algorithm
    1. Stand in line. First: every few seconds look how many messages there are, and who is how far.
    2. List the oldest ones; of those take, from the oldest on, what is too old or too many, whole revisions
       only, and nothing after the slowest cursor.
    3. ``[slot, created(trimmer)==token, mod(trimmed)==seen] → [delete them, their id markers, put trimmed]``.

Guarantees
    What is deleted is always the beginning of the order, and the mark says in the same Txn how far: a reader
    that comes too late knows that it does. Without `unacknowledged=True` no message goes that a group still
    needs.

Does not guarantee
    An exact age or number: it looks now and then, and the age is counted on the publishers' clocks.

Source
    The log cleaner of Kafka; leases are no substitute: they never expire while leaders change, and the end of
    one with 100,000 keys stalls all writes for half a second.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Put, Range, SortTarget, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._budget import fit
from etcd_infra._primitives._cas import Change, commit, found_in
from etcd_infra._primitives._envelope import Position, in_order, time_of
from etcd_infra._primitives._group import Cursor
from etcd_infra._primitives._hold import Hold
from etcd_infra._primitives._trim_mark import TrimMark
from etcd_infra._primitives._turn import come_first
from etcd_infra._primitives._waitqueue import Spot
from etcd_infra._primitives._who import introduce
from etcd_infra._primitives.fence import Fence
from etcd_infra.errors import (
    CodecError,
    EtcdError,
    FencedError,
    InvalidAnswerError,
    LockLostError,
    SessionLostError,
)

if TYPE_CHECKING:
    from etcd_infra._etcd.keys import TopicKeys
    from etcd_infra._etcd.model import RangeResult
    from etcd_infra._primitives._envelope import Record
    from etcd_infra._primitives._space import Space

logger = logging.getLogger("etcd_infra.topic")

LOOK_SECONDS: Final = 5.0
CHUNK: Final = 512
LISTED_TOGETHER: Final = 4096 + CHUNK
"""More than one Txn can publish, so that a list always holds a whole revision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """
    Which messages are kept.

    Attributes:
        age: Seconds after which a message goes, by its publisher's clock; None: no age is too old.
        count: So many are kept; None: any number.
        unacknowledged: Whether messages go that some group has not acknowledged: its consumers are then told
            by a `MessagesLostError`. Otherwise a group that nobody consumes keeps everything.
    """

    age: float | None = None
    count: int | None = None
    unacknowledged: bool = False

    def __post_init__(self) -> None:
        if self.age is None and self.count is None:
            msg = "a retention needs an age= or a count=, or it keeps everything"
            raise ValueError(msg)
        if self.age is not None:
            _check("age", self.age, int | float)
        if self.count is not None:
            _check("count", self.count, int)


def _check(name: str, value: object, kinds: object) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):  # type: ignore[arg-type]
        msg = f"{name} must be a number, not {value!r}"
        raise TypeError(msg)
    if not 0 < value < inf:  # type: ignore[operator]
        msg = f"{name} must be more than 0, not {value!r}"
        raise ValueError(msg)


class Trimmer:
    """One process's offer to trim one topic."""

    def __init__(self, space: Space, topic: str, keys: TopicKeys, retention: Retention) -> None:
        self._space = space
        self._topic = topic
        self._keys = keys
        self._retention = retention

    async def run(self) -> None:
        """Wait to be the one that trims, and trim; until cancelled."""
        failures = 0
        while True:
            try:
                hold = await self._wait_turn()
                if hold is None:
                    continue
                failures = 0
                try:
                    with hold.tied():
                        await self._trim_now_and_then(hold)
                finally:
                    await hold.finish()
            except SessionLostError:
                return  # the coordinator was closed
            except (EtcdError, FencedError, CodecError) as error:
                logger.warning("topic %r is not trimmed at the moment: %s", self._topic, error)
                await trio.sleep(delay(failures, self._space.random.random()))
                failures += 1

    async def _wait_turn(self) -> Hold | None:
        session = await self._space.sessions.current()
        place = Spot(self._keys.trimmers, self._keys.trimmers).place(session, introduce(session))
        hold: Hold | None = None
        try:
            with session.tether():
                await come_first(place)
                proof = (Compare.created_at(place.key, place.token),)
                hold = Hold(
                    session, place, Fence(self._topic, place.token, session.own_key.epoch, proof), own=None
                )
        except (LockLostError, SessionLostError) as error:
            logger.info("a trimmer of %r stands in line anew: %s", self._topic, error)
        finally:
            if hold is None:
                await place.leave(until=session.clean_up_deadline())
        return hold

    async def _trim_now_and_then(self, hold: Hold) -> None:
        while True:
            while await self._trim_some(hold):
                pass
            await trio.sleep(min(LOOK_SECONDS, (self._retention.age or inf) / 4))

    async def _trim_some(self, hold: Hold) -> bool:
        """Delete one chunk; return whether there may be more to delete."""
        oldest = Range(
            KeyRange.prefix(self._keys.messages),
            sort_by=SortTarget.CREATE,
            limit=LISTED_TOGETHER,
            keys_only=True,
        )
        if self._retention.age is None:
            # Cheap while there is nothing to do, however long the topic is.
            counted = await self._space.backend.range(
                Range(KeyRange.prefix(self._keys.messages), count_only=True)
            )
            if counted.count <= (self._retention.count or 0):
                return False
        reads = (oldest, Range(KeyRange.prefix(self._keys.cursors)), Range(KeyRange.one(self._keys.trimmed)))
        answer = await self._space.backend.txn(Txn(success=reads))
        listed, cursors, mark = answer.results
        slowest = min(
            [Cursor.parse(kv).position(kv) for kv in found_in(cursors)],
            default=Position(answer.revision + 1),
        )
        spent = self._spent(_checked(listed), slowest)
        if not spent:
            return False
        last = spent[-1].position
        markers = Range(
            KeyRange.prefix(self._keys.markers), max_create_revision=last.revision, keys_only=True, limit=CHUNK
        )
        forgotten = (await self._space.backend.range(markers)).kvs
        doomed = [*[self._keys.message(record.name) for record in spent], *[kv.key for kv in forgotten]]
        seen = found_in(mark)
        change = Change(
            (
                *[DeleteRange(KeyRange.one(key)) for key in doomed],
                Put(self._keys.trimmed, msgspec.json.encode(TrimMark(last.revision, last.name))),
            ),
            (),
            (Compare.modified_at(self._keys.trimmed, seen[0].mod_revision if seen else 0),),
            fence=hold.fence,
        )
        await commit(self._space.sessions, self._space.keys, fit(change))
        return True

    def _spent(self, listed: RangeResult, slowest: Position) -> list[Record]:
        """Return what is to go, oldest first, whole revisions only."""
        retention = self._retention
        records = in_order(listed.kvs)
        if listed.more:
            # The last revision may have been cut.
            records = [record for record in records if record.position.revision < records[-1].position.revision]
        too_many = 0 if retention.count is None else max(0, listed.count - retention.count)
        too_old = -inf if retention.age is None else self._space.clock.wall() - retention.age
        spent: list[Record] = []
        for at, record in enumerate(records):
            kept = at >= too_many and time_of(record.name) > too_old
            needed = not retention.unacknowledged and record.position > slowest
            if kept or needed:
                spent = [one for one in spent if one.position.revision < record.position.revision]
                break
            if len(spent) >= CHUNK and spent[-1].position.revision < record.position.revision:
                break
            spent.append(record)
        return spent


def _checked(result: object) -> RangeResult:
    from etcd_infra._etcd.model import RangeResult

    if not isinstance(result, RangeResult):
        msg = f"a range was asked for, and {result} was answered"
        raise InvalidAnswerError(msg)
    return result
