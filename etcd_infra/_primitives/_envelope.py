"""
What is stored of a message, and where it stands in its topic's order. Pure.

The order is (revision, name): a name grows within its publisher, so that several messages of one Txn come in
the order in which they were published, whether they are read from a watch or from a range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from etcd_infra._etcd.keys import last_segment
from etcd_infra.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

    from etcd_infra._etcd.model import KeyValue

_COUNTER_BITS: Final = 16
_PUBLISHER_BITS: Final = 48


class Position(NamedTuple):
    """A place in a topic's order; what comes after it is larger."""

    revision: int
    name: str = ""


class Names:
    """
    Names for the messages of one publisher: they grow, and begin with the time.

    Args:
        random: 48 bits are drawn with the first name, so that no two publishers make the same one.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._suffix = ""
        self._last = 0

    def next(self, now: float) -> str:
        """Return a name that was never used; `now` in Unix seconds, and it may go back."""
        if not self._suffix:
            self._suffix = f"-{self._random.getrandbits(_PUBLISHER_BITS):0{_PUBLISHER_BITS // 4}x}"
        self._last = max(int(now * 1000) << _COUNTER_BITS, self._last + 1)
        return f"{self._last:016x}{self._suffix}"


def time_of(name: str) -> float:
    """Return when a message was published, in Unix seconds by its publisher's clock; 0 for a foreign name."""
    try:
        return (int(name.partition("-")[0], 16) >> _COUNTER_BITS) / 1000
    except ValueError:
        return 0.0


class Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """
    What is known of a message beside its payload.

    Attributes:
        node: The publisher's node id.
        at: Unix seconds by the publisher's clock.
        mode: The delivery mode.
        id: The id that the publisher chose; empty: the message's name is its id.
        raw: The payload was bytes.
        group: The only group that it is for; empty: everybody.
        dead: The name of the dead letter that it is a copy of.
    """

    node: str
    at: float
    mode: str
    id: str = ""
    raw: bool = False
    group: str = ""
    dead: str = ""


def pack(head: Head, payload: bytes) -> bytes:
    """Render a message: one line of JSON, then the payload as it is."""
    return msgspec.json.encode(head) + b"\n" + payload


@dataclass(frozen=True)
class Record:
    """
    A message as it is stored.

    Attributes:
        position: Its place in the order.
        index: How many messages of its topic and revision come before it.
    """

    position: Position
    index: int
    value: bytes

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.position.name

    @cached_property
    def head(self) -> Head:
        """
        What is known beside the payload.

        Raises:
            CodecError: no publisher of this library wrote it.
        """
        try:
            return msgspec.json.decode(self.value.partition(b"\n")[0], type=Head)
        except msgspec.DecodeError as error:
            msg = f"what stands under {self.name!r} is no message: {error}"
            raise CodecError(msg, self.name, self.position.revision) from error

    @property
    def payload(self) -> bytes:
        """The encoded payload."""
        return self.value.partition(b"\n")[2]


def in_order(kvs: Iterable[KeyValue]) -> list[Record]:
    """Put messages into their order; all of a revision must be among them."""
    values = {Position(kv.create_revision, last_segment(kv.key)): kv.value for kv in kvs}
    return [replace(record, value=values[record.position]) for record in numbered(sorted(values))]


def numbered(positions: Iterable[Position]) -> list[Record]:
    """Give messages, in order and without values, their indices; all of a revision must be among them."""
    records: list[Record] = []
    for position in positions:
        last = records[-1] if records else None
        index = last.index + 1 if last and last.position.revision == position.revision else 0
        records.append(Record(position, index, b""))
    return records
