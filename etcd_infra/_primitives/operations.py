"""
What a transaction consists of, as plain values, and what comes of it.

An `Operation` says which key it changes, and turns what the key held into what it will hold: without I/O, so
that `_fold` can run any list of them. Another primitive adds an operation by a subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final

from etcd_infra._etcd.model import DeleteRange, KeyRange, KeyValue, Put
from etcd_infra.errors import ConflictError

if TYPE_CHECKING:
    from etcd_infra._etcd.model import Op
    from etcd_infra._primitives._space import Space

BY_US: Final = -1
"""The version of what an earlier operation of the same transaction wrote: not known before the commit."""


SAME_LEASE: Final = -1
"""The lease of a key that is known to exist, and at which nobody has looked."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a key holds between two operations; `value` None: it is absent (version 0)."""

    value: bytes | None = None
    lease: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What one operation made of a key: its content, and what the caller is told."""

    after: Content
    value: Any = None
    success: bool | None = True


@dataclass(frozen=True, slots=True)
class Operation(ABC):
    """One operation of a transaction."""

    key: str

    needs_value: ClassVar[bool] = False
    """Whether what it does depends on what the key held."""

    is_state: ClassVar[bool] = True
    """Whether it changes a state key, which a prepared transaction may have promised to change."""

    def target(self, space: Space) -> bytes:
        """Return the full key that it writes."""
        return space.keys.state(self.key)

    @property
    def presumes(self) -> int | None:
        """The version that the key must have (0: absent); None: any."""
        return None

    def encode(self, space: Space) -> bytes:
        """Encode the value that it brings, if it brings one: before anything is sent."""
        del space
        return b""

    @abstractmethod
    def apply(self, before: Content | None, encoded: bytes, space: Space) -> Step:
        """Say what the key holds after it; `before` None: nobody looked, and any state will do."""

    def write(self, target: bytes, content: Content, space: Space) -> Op:
        """Return what leaves `content` under `target`; asked of the last operation on that key."""
        del space
        if content.value is None:
            return DeleteRange(KeyRange.one(target))
        if content.lease == SAME_LEASE:
            return Put(target, content.value, ignore_lease=True)
        return Put(target, content.value, lease=content.lease)


@dataclass(frozen=True, slots=True)
class Set(Operation):
    """Give a key a value, whatever it held; the key becomes permanent, as with `state.set` without a TTL."""

    value: Any

    def encode(self, space: Space) -> bytes:
        """See `Operation`."""
        return space.encode(self.value)

    def apply(self, before: Content | None, encoded: bytes, space: Space) -> Step:
        """See `Operation`."""
        del before, space
        return Step(Content(encoded, version=BY_US), self.value)


@dataclass(frozen=True, slots=True)
class Delete(Operation):
    """Delete a key; whether it was there is the result's `success`."""

    def apply(self, before: Content | None, encoded: bytes, space: Space) -> Step:
        """See `Operation`."""
        del encoded, space
        return Step(Content(), success=before is None or before.value is not None)


@dataclass(frozen=True, slots=True)
class Increment(Operation):
    """Add to an integer; an absent key counts as 0, a leased one keeps its lease."""

    delta: int = 1
    needs_value: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_int(f"a delta of {self.key!r}", self.delta)

    def apply(self, before: Content | None, encoded: bytes, space: Space) -> Step:
        """See `Operation`."""
        del encoded
        held = before or Content()
        number = _number(held, self.key, space) + self.delta
        return Step(Content(space.encode(number), held.lease, BY_US), number)


@dataclass(frozen=True, slots=True)
class Decrement(Increment):
    """Subtract from an integer; else as `Increment`."""

    def apply(self, before: Content | None, encoded: bytes, space: Space) -> Step:
        """See `Operation`."""
        return Increment(self.key, -self.delta).apply(before, encoded, space)


@dataclass(frozen=True, slots=True)
class Cas(Operation):
    """Give a key a value if it has this version (0: if it is absent); a leased key keeps its lease."""

    value: Any
    expected_version: int = field(kw_only=True)

    def __post_init__(self) -> None:
        _check_int(f"the expected version of {self.key!r}", self.expected_version)
        if self.expected_version < 0:
            msg = f"a version is at least 0, not {self.expected_version}: {self.key!r}"
            raise ValueError(msg)

    @property
    def presumes(self) -> int | None:
        """See `Operation`."""
        return self.expected_version

    def encode(self, space: Space) -> bytes:
        """See `Operation`."""
        return space.encode(self.value)

    def apply(self, before: Content | None, encoded: bytes, space: Space) -> Step:
        """See `Operation`."""
        del space
        held = before or Content()
        if held.version != self.expected_version:
            msg = f"{self.key!r} has version {held.version}, not {self.expected_version}"
            raise ConflictError(msg, self.key, held.version)
        return Step(Content(encoded, held.lease, BY_US), self.value)


def _check_int(what: str, number: object) -> None:
    if type(number) is not int:
        msg = f"{what} must be an int, not {number!r}"
        raise TypeError(msg)


def _number(held: Content, key: str, space: Space) -> int:
    if held.value is None:
        return 0
    return space.decode(KeyValue(space.keys.state(key), held.value, mod_revision=held.version), int)


# ── what comes of it ────────────────────────────────────────────────────────────────────────────


class TransactionStatus(StrEnum):
    """
    Where a transaction stands.

    PENDING: begun, nothing is promised. PREPARED: its keys are kept for it. COMMITTED: all of it was applied,
    at one revision. ROLLED_BACK: given up by its owner. FAILED: a condition did not hold. TIMEOUT: its time was
    over. After the last three nothing was changed.
    """

    PENDING = "pending"
    PREPARED = "prepared"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled-back"
    FAILED = "failed"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class OperationResult:
    """
    What one operation did, as if the operations had run one after the other.

    Attributes:
        key: The key.
        success: False only for a `Delete` of a key that was not there, and for a `Publish` whose message id was
            published before; None if that can not be told any more (the answer was lost, and the history is
            compacted already), and for a `Publish` with an id in two phases.
        value: What the key held right after this operation; None for a `Delete`.
        version: The key's version after the whole transaction; 0 if it is absent then.
    """

    key: str
    success: bool | None
    value: Any
    version: int


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """
    A transaction that was committed.

    Attributes:
        transaction_id: Its name; random.
        status: COMMITTED.
        results: One per operation, in their order.
        revision: The store's revision at which all of it was applied: the new version of every key written.
    """

    transaction_id: str
    status: TransactionStatus
    results: tuple[OperationResult, ...]
    revision: int
