"""What a topic's keys say of it: how much there is, and how far each group has come. Writes nothing."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.keys import last_segment
from etcd_infra._etcd.model import KeyRange, Range, SortTarget
from etcd_infra._primitives._claim import parse_progress
from etcd_infra._primitives._envelope import time_of
from etcd_infra._primitives._group import Cursor
from etcd_infra._primitives._message_names import list_positions
from etcd_infra._primitives._trim_mark import TrimMark
from etcd_infra._primitives._who import who_is
from etcd_infra.errors import CodecError

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys, TopicKeys
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._primitives._envelope import Position


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """
    One group of a topic.

    Attributes:
        name: The group.
        kind: "ordered" or "sharing"; "unreadable" if its cursor is no cursor: nothing is trimmed while it is
            there, and its lag is every message.
        lag: How many messages it has yet to acknowledge; replayed ones of other groups are counted, too.
        lag_seconds: How old the oldest of them is, by its publisher's clock; 0 if there is none.
        consumers: Node ids: of an ordered group the active one first, then who waits for its place; of a
            work-sharing one those that handle a message now.
        attempts: How often the message was begun that an ordered group is at; the most of a work-sharing one's.
        dead_letters: How many messages it has given up.
    """

    name: str
    kind: str
    lag: int
    lag_seconds: float
    consumers: tuple[str, ...]
    attempts: int
    dead_letters: int

    def __str__(self) -> str:
        consumers = ", ".join(self.consumers) or "nobody"
        dead = f", {self.dead_letters} dead" if self.dead_letters else ""
        return f"{self.name} ({self.kind}): lag {self.lag} ({self.lag_seconds:.0f} s){dead}; {consumers}"


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """
    One topic.

    Attributes:
        name: The topic.
        messages: How many are stored.
        oldest_at: Unix seconds, by its publisher's clock, of the oldest one; None if there is none.
        newest_at: Of the newest one.
        trimmed_up_to: The revision up to which messages were trimmed; 0: none ever was.
        groups: By name.
    """

    name: str
    messages: int
    oldest_at: float | None
    newest_at: float | None
    trimmed_up_to: int
    groups: tuple[GroupInfo, ...]


async def inspect_topics(
    backend: Backend, keys: Keys, name: str | None = None, *, now: float
) -> tuple[TopicInfo, ...]:
    """
    Describe every topic, or one; names alone are read of messages and dead letters.

    `now` is in Unix seconds, for ages.

    Round trips:
        One for the name of each topic; then per topic two and one for each 1,000 messages, per group three.
    """
    names = await _names(backend, keys) if name is None else [name]
    return tuple([await _describe(backend, keys.topic(one), one, now) for one in names])


async def _names(backend: Backend, keys: Keys) -> list[str]:
    """Jump from topic to topic, without reading what is in them."""
    found: list[str] = []
    rest = KeyRange.prefix(keys.topics)
    while True:
        kvs = (await backend.range(Range(rest, limit=1, keys_only=True))).kvs
        if not kvs:
            return sorted(found)
        name = keys.parse_topic(kvs[0].key)
        if name is None:
            rest = KeyRange(kvs[0].key + b"\0", rest.end)
            continue
        found.append(name)
        rest = KeyRange(KeyRange.prefix(keys.topic(name).root).end, rest.end)


async def _describe(backend: Backend, keys: TopicKeys, name: str, now: float) -> TopicInfo:
    messages, _, _ = await list_positions(backend, KeyRange.prefix(keys.messages), 0)
    cursors = (await backend.range(Range(KeyRange.prefix(keys.cursors)))).kvs
    mark = (await backend.range(Range(KeyRange.one(keys.trimmed)))).kvs
    groups = [await _group(backend, keys, kv, messages, now) for kv in cursors]
    return TopicInfo(
        name,
        messages=len(messages),
        oldest_at=time_of(messages[0].name) if messages else None,
        newest_at=time_of(messages[-1].name) if messages else None,
        trimmed_up_to=TrimMark.position_in(mark).revision,
        groups=tuple(sorted(groups, key=lambda group: group.name)),
    )


async def _group(
    backend: Backend, keys: TopicKeys, kv: KeyValue, messages: list[Position], now: float
) -> GroupInfo:
    name = keys.parse_cursor(kv.key)
    try:
        cursor = Cursor.parse(kv)
    except CodecError:
        return GroupInfo(name, "unreadable", len(messages), _age(messages, now), (), 0, 0)
    waiting = messages[bisect_right(messages, cursor.position(kv)) :]
    attempts = cursor.attempts
    line = keys.claims(name) if cursor.shared else keys.consumers(name)
    if cursor.shared:
        kept = await backend.range(Range(KeyRange.prefix(keys.progress(name, ""))))
        progress = {last_segment(one.key): parse_progress(one) for one in kept.kvs}
        waiting = [one for one in waiting if one.name not in progress or not progress[one.name].done]
        attempts = max([one.attempts for one in progress.values() if not one.done], default=0)
    there = await backend.range(Range(KeyRange.prefix(line), sort_by=SortTarget.CREATE))
    dead = await backend.range(Range(KeyRange.prefix(keys.dead_letters(name)), count_only=True))
    return GroupInfo(
        name,
        kind="sharing" if cursor.shared else "ordered",
        lag=len(waiting),
        lag_seconds=_age(waiting, now),
        consumers=tuple(dict.fromkeys(who_is(one).node for one in there.kvs)),
        attempts=attempts,
        dead_letters=dead.count,
    )


def _age(waiting: list[Position], now: float) -> float:
    return max(0.0, now - time_of(waiting[0].name)) if waiting else 0.0
