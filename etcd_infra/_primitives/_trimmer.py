"""
Retention: one process at a time deletes a topic's oldest messages, by age and by number, in chunks.

Keys
    ``{ns}topic/{topic}/trimmer/{lease}-{n}``  a place in line (see `_waitqueue`): the first one trims.
    ``{ns}topic/{topic}/trimmed``              JSON position of the last message that was deleted.

Algorithm
    1. Stand in line. First: every few seconds look how many messages there are, and who is how far.
    2. List the oldest ones, by name, which begins with the time; of those take what is too old or too many,
       whole revisions only, and nothing after the slowest cursor.
    3. ``[slot, created(trimmer)==token, mod(trimmed)==seen] → [delete them, put trimmed]``.
    4. Afterwards delete each id marker whose message is gone: ``[no such message] → [delete marker]``.

Guarantees
    The mark says in the same Txn how far messages were deleted: a reader that comes too late knows that it
    does. Without `unacknowledged=True` no message goes that a group still needs.

Does not guarantee
    An exact age or number: it looks now and then, and the age is counted on the publishers' clocks. That only
    the beginning of the order goes: a publisher whose clock is slow has its messages deleted early.

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

from etcd_infra._etcd.keys import last_segment
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    KeyRange,
    Operator,
    Put,
    Range,
    RangeResult,
    Target,
    Txn,
)
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._budget import fit
from etcd_infra._primitives._cas import Change, commit, found_in
from etcd_infra._primitives._envelope import Position, time_of
from etcd_infra._primitives._foremost import become_foremost
from etcd_infra._primitives._group import Cursor
from etcd_infra._primitives._groups import in_groups
from etcd_infra._primitives._trim_mark import TrimMark
from etcd_infra.errors import (
    CodecError,
    EtcdError,
    FencedError,
    InvalidAnswerError,
    SessionLostError,
)

if TYPE_CHECKING:
    from etcd_infra._etcd.keys import TopicKeys
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._primitives._hold import Hold
    from etcd_infra._primitives._space import Space

logger = logging.getLogger("etcd_infra.topic")

LOOK_SECONDS: Final = 5.0
CHUNK: Final = 1024
FORGOTTEN_TOGETHER: Final = 100


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
    """
    One process's offer to trim one topic.

    Attributes:
        retention: What it goes by when it is its turn.
    """

    def __init__(self, space: Space, topic: str, keys: TopicKeys, retention: Retention) -> None:
        self._space = space
        self._topic = topic
        self._keys = keys
        self.retention = retention

    async def run(self) -> None:
        """Wait to be the one that trims, and trim; until cancelled."""
        failures = 0
        while True:
            try:
                hold = await become_foremost(self._space.sessions, self._keys.trimmers, self._topic)
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

    async def _trim_now_and_then(self, hold: Hold) -> None:
        # Who trimmed before may have died before it forgot the ids.
        mark = found_in(await self._space.read(Range(KeyRange.one(self._keys.trimmed))))
        trimmed = TrimMark.position_in(mark)
        while True:
            while (last := await self._trim_some(hold)) is not None:
                trimmed = last
            if trimmed.revision:
                await self._forget_ids(hold, trimmed.revision)
            trimmed = Position(0)
            await trio.sleep(min(LOOK_SECONDS, (self.retention.age or inf) / 4))

    async def _trim_some(self, hold: Hold) -> Position | None:
        """Delete a chunk of messages; return how far, None: there was nothing to delete."""
        backend, keys = self._space.backend, self._keys
        oldest = Range(KeyRange.prefix(keys.messages), limit=CHUNK, keys_only=True)
        reads = (oldest, Range(KeyRange.prefix(keys.cursors)), Range(KeyRange.one(keys.trimmed)))
        answer = await backend.txn(Txn(success=reads))
        listed, cursors, mark = answer.results
        if not isinstance(listed, RangeResult):
            msg = f"a range was asked for, and {listed} was answered"
            raise InvalidAnswerError(msg)
        slowest = min(
            [Cursor.parse(kv).position(kv) for kv in found_in(cursors)],
            default=Position(answer.revision + 1),
        )
        spent = self._spent(listed, slowest)
        if not spent:
            return None
        seen = found_in(mark)
        last = max(TrimMark.position_in(seen), *spent)
        change = Change(
            (
                *[DeleteRange(KeyRange.one(keys.message(position.name))) for position in spent],
                Put(keys.trimmed, msgspec.json.encode(TrimMark(last.revision, last.name))),
            ),
            (),
            (
                Compare.modified_at(keys.trimmed, seen[0].mod_revision if seen else 0),
                # No group was made meanwhile that begins before.
                Compare(Target.CREATE, Operator.LESS, KeyRange.prefix(keys.cursors), answer.revision + 1),
            ),
            fence=hold.fence,
        )
        await commit(self._space.sessions, self._space.keys, fit(change))
        return last

    async def _forget_ids(self, hold: Hold, up_to: int) -> None:
        """Delete the markers of messages that were trimmed, those of revision `up_to` and before."""
        rest = KeyRange.prefix(self._keys.markers)
        while True:
            page = await self._space.backend.range(Range(rest, limit=CHUNK))
            old = [kv for kv in page.kvs if kv.create_revision <= up_to]
            for some in in_groups(old, FORGOTTEN_TOGETHER):
                change = Change(tuple(map(self._forgetting, some)), (), fence=hold.fence)
                await commit(self._space.sessions, self._space.keys, fit(change))
            if not page.more:
                return
            rest = KeyRange(page.kvs[-1].key + b"\0", rest.end)

    def _forgetting(self, marker: KeyValue) -> Txn:
        message = self._keys.messages + marker.value
        return Txn((Compare.absent(message),), (DeleteRange(KeyRange.one(marker.key)),))

    def _spent(self, listed: RangeResult, slowest: Position) -> list[Position]:
        """Return which of the oldest messages are to go."""
        retention = self.retention
        positions = [Position(kv.create_revision, last_segment(kv.key)) for kv in listed.kvs]
        too_many = 0 if retention.count is None else max(0, listed.count - retention.count)
        too_old = -inf if retention.age is None else self._space.clock.wall() - retention.age
        spent = [
            position
            for at, position in enumerate(positions)
            if (at < too_many or time_of(position.name) <= too_old)
            and (retention.unacknowledged or position <= slowest)
        ]
        # Whole revisions only, so that indices stay: not those of which something is kept, or is not listed.
        # (One that is larger than a chunk goes in parts.)
        kept = {position.revision for position in set(positions).difference(spent)}
        cut = {positions[-1].revision} if listed.more else set[int]()
        whole = [position for position in spent if position.revision not in kept | cut]
        if whole or len({position.revision for position in positions}) != 1:
            return whole
        return spent if not kept else []
