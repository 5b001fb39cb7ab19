"""
What fits into one Txn of etcd: known before anything is sent. Pure.

etcd: 128 is the limit of the longest list of each level, added up over the levels; so compares, which can
not be nested, leave less room for writes, which can. A request has at most 1.5 MiB.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from etcd_infra._etcd.model import Put, Txn
from etcd_infra._primitives._cas import MAX_INTENT_GUARDS
from etcd_infra._primitives._groups import in_groups
from etcd_infra.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.model import Compare, Op
    from etcd_infra._primitives._cas import Change
    from etcd_infra._primitives.fence import Fence

MAX_OPS: Final = 128
MAX_REQUEST_BYTES: Final = 1536 * 1024
_OP_BYTES: Final = 40  # tags, lengths and numbers around keys and values, at most
_SLOT_BYTES: Final = 1024


def fit(change: Change) -> Change:
    """
    Arrange a change's operations so that etcd takes it.

    Raises:
        InvalidRequestError: it is over etcd's budget; nothing was sent.
    """
    # These are the lists that `commit` and the slots make of it.
    proof = len(change.fence.proof) if change.fence else 0
    spans = len(change.keys) if len(change.keys) <= MAX_INTENT_GUARDS else 1
    compares = 1 + proof + len(change.conditions) + spans
    asked = in_groups(change.conditions)
    reads = 2 + len(asked) + spans + len(change.reads)
    inner = max(proof, *map(len, asked), *[_longest(read) for read in change.reads], 0)
    groups = _groups(len(change.ops), max(compares, reads), inner)
    if groups is None:
        msg = (
            f"{len(change.ops)} writes under {len(change.conditions)} conditions are over the budget of one"
            f" transaction: etcd takes {MAX_OPS} operations, the longest list of each level added up"
        )
        raise InvalidRequestError(msg)
    fitted = replace(change, ops=_grouped(change.ops, groups))
    twice = (*change.conditions, *change.conditions)
    check_size(Txn(twice, change.ops, change.reads), sum(len(key) + _OP_BYTES for key in change.keys))
    return fitted


def check_size(request: Txn, more: int = 0) -> None:
    """
    Refuse what etcd would find too large; by at most 40 bytes per operation too early.

    Raises:
        InvalidRequestError: nothing was sent.
    """
    size = _SLOT_BYTES + more + _size(request)
    if size > MAX_REQUEST_BYTES:
        msg = f"a transaction of {size} bytes is over the budget of {MAX_REQUEST_BYTES} bytes per request"
        raise InvalidRequestError(msg)


def check_txn(request: Txn) -> None:
    """
    Refuse a whole request that etcd would.

    Raises:
        InvalidRequestError: too many operations, or too many bytes; nothing was sent.
    """
    if _depth(request) > MAX_OPS:
        msg = f"{len(request.compare)} conditions with their writes are over the budget of {MAX_OPS} operations"
        raise InvalidRequestError(msg)
    check_size(request)


def _depth(op: Op) -> int:
    """Add up the longest lists of all levels."""
    if not isinstance(op, Txn):
        return 0
    return _longest(op) + max([_depth(inner) for inner in op.success + op.failure], default=0)


def check_reads(conditions: Sequence[Compare], fence: Fence | None) -> None:
    """
    Refuse to validate more reads than fit into one Txn of compares.

    Raises:
        InvalidRequestError: nothing was sent.
    """
    proof = len(fence.proof) if fence else 0
    if 2 * proof + len(conditions) > MAX_OPS:
        msg = f"{len(conditions)} reads are over the budget of one transaction: etcd takes {MAX_OPS} compares"
        raise InvalidRequestError(msg)


def _longest(op: Op) -> int:
    return max(len(op.compare), len(op.success), len(op.failure)) if isinstance(op, Txn) else 0


def _groups(writes: int, longest: int, inner: int) -> int | None:
    """Return how many nested Txns the writes must be put into (0: none); None: there is no way."""
    if MAX_OPS - max(longest, writes + 1) >= inner:
        return 0
    for groups in range(1, MAX_OPS):
        room = MAX_OPS - max(longest, groups + 1)
        if room >= inner and groups * room >= writes:
            return groups
    return None


def _grouped(ops: Sequence[Op], groups: int) -> tuple[Op, ...]:
    if not groups:
        return tuple(ops)
    return tuple(Txn(success=group) for group in in_groups(ops, -(-len(ops) // groups)))


def _size(txn: Txn) -> int:
    compares = sum(_compare_size(compare) for compare in txn.compare)
    return compares + sum(_op_size(op) for op in txn.success + txn.failure)


def _compare_size(compare: Compare) -> int:
    return _OP_BYTES + len(compare.range.key) + len(compare.range.end)


def _op_size(op: Op) -> int:
    if isinstance(op, Txn):
        return _OP_BYTES + _size(op)
    if isinstance(op, Put):
        return _OP_BYTES + len(op.key) + len(op.value)
    return _OP_BYTES + len(op.range.key) + len(op.range.end)
