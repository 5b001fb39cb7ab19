"""
What etcd refuses without looking at its data: the shape of a request.

Pure functions over request values. Source: etcd `server/etcdserver/api/v3rpc/key.go`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._backends.request_check import check_writes
from etcd_infra._etcd.model import Put, Range, Txn
from etcd_infra.errors import InvalidRequestError

if TYPE_CHECKING:
    from etcd_infra._etcd.model import Compare, Op

MAX_OPS = 128
MAX_REQUEST_BYTES = 1536 * 1024
MAX_MESSAGE_BYTES = MAX_REQUEST_BYTES + 512 * 1024
_BYTES_PER_OP = 16  # tags, lengths and numbers around an operation's own bytes, roughly


def check_range(request: Range) -> None:
    """Refuse a read without a key."""
    if not request.range.key:
        raise InvalidRequestError("etcdserver: key is not provided")


def check_txn(txn: Txn, max_ops: int = MAX_OPS) -> None:
    """
    Refuse what a transaction must not look like, in the branch not taken, too.

    Raises:
        InvalidRequestError: a key is missing, a list is too long, a key would be written twice, or a value
            or lease is given and ignored at once.
    """
    _check_parts(txn, max_ops)
    check_writes(txn.success)
    check_writes(txn.failure)


def check_size(txn: Txn) -> None:
    """
    Refuse what is too large to be replicated.

    Raises:
        InvalidRequestError: by the transport's limit first, then by etcd's own.
    """
    size = _txn_size(txn)
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequestError(
            f"grpc: received message larger than max ({size} vs. {MAX_MESSAGE_BYTES})",
        )
    if size > MAX_REQUEST_BYTES and not txn.is_read_only:
        raise InvalidRequestError("etcdserver: request is too large")


def has_put(txn: Txn) -> bool:
    """Say whether some branch puts; nested transactions do not count."""
    # etcd: the quota looks at a Txn's own puts only, so a nested one passes (`quota.go`, `costTxnReq`).
    return any(isinstance(op, Put) for op in txn.success + txn.failure)


def _check_parts(txn: Txn, max_ops: int) -> None:
    longest = max(len(txn.compare), len(txn.success), len(txn.failure))
    if longest > max_ops:
        raise InvalidRequestError("etcdserver: too many operations in txn request")
    for compare in txn.compare:
        if not compare.range.key:
            raise InvalidRequestError("etcdserver: key is not provided")
    for op in txn.success + txn.failure:
        _check_op(op, max_ops - longest)


def _check_op(op: Op, max_ops: int) -> None:
    if isinstance(op, Txn):
        # etcd: each nested Txn gets what its parent's longest list leaves, by itself.
        _check_parts(op, max_ops)
    elif isinstance(op, Put):
        _check_put(op)
    elif not op.range.key:
        raise InvalidRequestError("etcdserver: key is not provided")


def _check_put(put: Put) -> None:
    if not put.key:
        raise InvalidRequestError("etcdserver: key is not provided")
    if put.ignore_value and put.value:
        raise InvalidRequestError("etcdserver: value is provided")
    if put.ignore_lease and put.lease:
        raise InvalidRequestError("etcdserver: lease is provided")


# ── size ────────────────────────────────────────────────────────────────────────────────────────


def _txn_size(txn: Txn) -> int:
    return (
        sum(_compare_size(compare) for compare in txn.compare)
        + sum(_op_size(op) for op in txn.success)
        + sum(_op_size(op) for op in txn.failure)
    )


def _compare_size(compare: Compare) -> int:
    operand = len(compare.operand) if isinstance(compare.operand, bytes) else 0
    return _BYTES_PER_OP + len(compare.range.key) + len(compare.range.end) + operand


def _op_size(op: Op) -> int:
    if isinstance(op, Txn):
        return _BYTES_PER_OP + _txn_size(op)
    if isinstance(op, Put):
        return _BYTES_PER_OP + len(op.key) + len(op.value)
    return _BYTES_PER_OP + len(op.range.key) + len(op.range.end)
