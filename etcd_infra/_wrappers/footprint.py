"""What transactions touch, and which of them have nothing to do with each other; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._etcd.model import DeleteRange, Put, Range

if TYPE_CHECKING:
    from etcd_infra._etcd.model import KeyRange, Txn


class Footprint:
    """
    What a transaction touches, or several together.

    Attributes:
        weight: What it takes of etcd's budget of operations: the longest list of each level, added up.
        size: Bytes of the keys and values that it may put; 0 if it never puts.
    """

    __slots__ = ("_read", "_read_spans", "_written", "_written_spans", "size", "weight")

    def __init__(self) -> None:
        # Single keys apart from ranges: nearly all are single, and sets of bytes are compared fast.
        self._read: set[bytes] = set()
        self._written: set[bytes] = set()
        self._read_spans: list[KeyRange] = []
        self._written_spans: list[KeyRange] = []
        self.weight = 0
        self.size = 0

    @classmethod
    def of(cls, request: Txn) -> Footprint:
        """Walk through `request`, nested transactions included."""
        footprint = cls()
        footprint.weight = footprint._walk(request)
        return footprint

    def _walk(self, request: Txn) -> int:
        deepest = 0
        for compare in request.compare:
            self._reads(compare.range)
        for op in request.success + request.failure:
            if isinstance(op, Range):
                self._reads(op.range)
            elif isinstance(op, Put):
                self._written.add(op.key)
                self.size += len(op.key) + len(op.value)
            elif isinstance(op, DeleteRange):
                if op.range.end:
                    self._written_spans.append(op.range)
                else:
                    self._written.add(op.range.key)
            else:
                deepest = max(deepest, self._walk(op))
        return max(len(request.compare), len(request.success), len(request.failure)) + deepest

    def _reads(self, range_: KeyRange) -> None:
        if range_.end:
            if range_ not in self._read_spans:
                self._read_spans.append(range_)
        else:
            self._read.add(range_.key)

    def is_independent_of(self, other: Footprint) -> bool:
        """Whether neither of the two writes what the other one reads or writes."""
        return (
            self._written.isdisjoint(other._written)
            and self._written.isdisjoint(other._read)
            and self._read.isdisjoint(other._written)
            and not _meet(self._written, other._read_spans)
            and not _meet(other._written, self._read_spans)
            and not (self._written_spans and other._is_touched_by(self._written_spans))
            and not (other._written_spans and self._is_touched_by(other._written_spans))
        )

    def _is_touched_by(self, spans: list[KeyRange]) -> bool:
        touched = self._read_spans + self._written_spans
        return (
            _meet(self._read, spans)
            or _meet(self._written, spans)
            or any(_overlap(one, other) for one in spans for other in touched)
        )

    def add(self, other: Footprint) -> None:
        """Take in what another transaction touches."""
        self._read |= other._read
        self._written |= other._written
        self._read_spans += other._read_spans
        self._written_spans += other._written_spans


def _meet(keys: set[bytes], spans: list[KeyRange]) -> bool:
    for span in spans:
        for key in keys:
            if key in span:
                return True
    return False


def _overlap(one: KeyRange, other: KeyRange) -> bool:
    return (other.end == b"\0" or one.key < other.end) and (one.end == b"\0" or other.key < one.end)
