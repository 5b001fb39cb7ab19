"""
Operations, folded: many on few keys become one put or delete per key. Pure.

etcd refuses a Txn that writes a key twice, so what the operations on one key do one after the other is
computed here, from what was read. What was read is guarded by its version; what any state will do for is not
read at all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from etcd_infra._etcd.model import Compare, DeleteRange
from etcd_infra._primitives.operations import BY_US, SAME_LEASE, Content, Delete, Operation, OperationResult
from etcd_infra.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from etcd_infra._etcd.model import KeyValue, Op
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.operations import Step


@dataclass(frozen=True, slots=True)
class Bound:
    """An operation with its full key and its encoded value; `alone`: no other one has that key."""

    operation: Operation
    target: bytes
    encoded: bytes
    alone: bool

    @property
    def is_blind(self) -> bool:
        """Whether, as the first one of its key, it can do without a look."""
        operation = self.operation
        if isinstance(operation, Delete):
            return self.alone  # etcd's answer says whether the key was there
        return operation.presumes is not None or not operation.needs_value


@dataclass(frozen=True, slots=True)
class Guard:
    """The version that a key must still have; `index`: of the operation that presumes it."""

    version: int
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Folded:
    """
    One write per key, and what it rests on.

    Attributes:
        writes: By full key, in the order in which the operations first name them.
        guards: By full key.
        results: Still without versions.
        state_keys: Those of the written keys that are state.
    """

    writes: dict[bytes, Op]
    guards: dict[bytes, Guard]
    results: tuple[OperationResult, ...]
    state_keys: tuple[bytes, ...]

    @property
    def conditions(self) -> tuple[Compare, ...]:
        """The guards as compares."""
        return tuple(Compare.modified_at(key, guard.version) for key, guard in self.guards.items())

    def results_at(self, revision: int, bound: Sequence[Bound]) -> tuple[OperationResult, ...]:
        """Fill in the versions that the keys have after a commit at `revision`."""
        return tuple(
            replace(result, version=0 if isinstance(self.writes[one.target], DeleteRange) else revision)
            for result, one in zip(self.results, bound, strict=True)
        )

    def raise_conflict(self, versions: Mapping[bytes, int], bound: Sequence[Bound]) -> None:
        """
        Look whether what an operation presumes is wrong.

        Raises:
            ConflictError: with the first such operation.
        """
        for key, guard in self.guards.items():
            found = versions[key]
            if guard.index is not None and found != guard.version:
                name = bound[guard.index].operation.key
                msg = f"operation {guard.index}: {name!r} has version {found}, not {guard.version}"
                raise ConflictError(msg, name, found, guard.index)


def bind(operations: Iterable[Operation], space: Space) -> tuple[Bound, ...]:
    """
    Render keys and values, once.

    Raises:
        TypeError, ValueError: something is no operation, no key, can not be encoded, or can never hold.
    """
    found = tuple(operations)
    for operation in found:
        if not isinstance(operation, Operation):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"a transaction consists of operations, and this is none: {operation!r}"
            raise TypeError(msg)
    targets = [operation.target(space) for operation in found]
    _refuse_impossible(found, targets)
    uses = Counter(targets)
    return tuple(
        Bound(operation, target, operation.encode(space), uses[target] == 1)
        for operation, target in zip(found, targets, strict=True)
    )


def _refuse_impossible(operations: Sequence[Operation], targets: Sequence[bytes]) -> None:
    written: set[bytes] = set()
    for index, (operation, target) in enumerate(zip(operations, targets, strict=True)):
        if operation.presumes is not None and target in written:
            msg = f"operation {index} can never hold: an earlier one writes {operation.key!r}: {operation}"
            raise ValueError(msg)
        if isinstance(operation, Delete):
            written.discard(target)
        else:
            written.add(target)


def keys_to_read(bound: Sequence[Bound]) -> tuple[bytes, ...]:
    """Name the keys whose old content matters."""
    firsts: dict[bytes, Bound] = {}
    for one in bound:
        firsts.setdefault(one.target, one)
    return tuple(target for target, one in firsts.items() if not one.is_blind)


def fold(bound: Sequence[Bound], seen: Mapping[bytes, KeyValue | None], space: Space) -> Folded:
    """
    Run the operations on what was read.

    Args:
        bound: The operations.
        seen: What was read, by full key, all of one revision; a key that is missing here was not looked at.
        space: How values become bytes.

    Raises:
        CodecError: a value that an operation builds on does not decode.
        ConflictError: an operation presumes a version that an earlier one has changed.
    """
    contents: dict[bytes, Content] = {}
    guards: dict[bytes, Guard] = {}
    results: list[OperationResult] = []
    for index, one in enumerate(bound):
        if one.target in contents:
            before: Content | None = contents[one.target]
        else:
            before = _first_content(one, seen)
            if before is not None:
                presumes = one.operation.presumes
                guards[one.target] = Guard(before.version, None if presumes is None else index)
        step = _apply(index, one, before, space)
        contents[one.target] = step.after
        results.append(OperationResult(one.operation.key, step.success, step.value, 0))
    last = {one.target: one.operation for one in bound}
    writes = {target: last[target].write(target, content, space) for target, content in contents.items()}
    state_keys = tuple(target for target, operation in last.items() if operation.is_state)
    return Folded(writes, guards, tuple(results), state_keys)


def _first_content(one: Bound, seen: Mapping[bytes, KeyValue | None]) -> Content | None:
    if (presumed := one.operation.presumes) is not None:
        return Content(b"", SAME_LEASE, presumed) if presumed else Content()
    if one.target not in seen:
        return None
    kv = seen[one.target]
    return Content() if kv is None else Content(kv.value, kv.lease, kv.mod_revision)


def _apply(index: int, one: Bound, before: Content | None, space: Space) -> Step:
    try:
        return one.operation.apply(before, one.encoded, space)
    except ConflictError as error:
        assert before is not None
        assert before.version != BY_US
        msg = f"operation {index}: {error}"
        raise ConflictError(msg, error.key, error.version, index) from None
