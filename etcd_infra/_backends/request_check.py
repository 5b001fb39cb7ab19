"""What every backend refuses by itself, before a server could misunderstand it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._etcd.model import Range, Target, Txn
from etcd_infra.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from etcd_infra._etcd.model import Compare


def check_txn_request(request: Txn) -> None:
    """
    Refuse a transaction that can not mean what it says.

    Raises:
        TypeError: a compare's operand is not of its target's type.
        InvalidRequestError: it may write, and reads at an old revision.
    """
    for compare in _compares(request):
        wanted = bytes if compare.target is Target.VALUE else int
        if type(compare.operand) is not wanted:
            raise TypeError(f"{compare.target.name} compares with {wanted.__name__}: {compare.operand!r}")
    if not request.is_read_only:
        refuse_old_reads(request)


def refuse_old_reads(request: Txn) -> None:
    """Refuse a writing transaction that reads at a revision."""
    # etcd: before 3.5.17 a compacted revision inside a writing Txn could apply it in part (#18667), and the
    # Txn's own revision is "future" there: it never means what was intended.
    for op in request.success + request.failure:
        if isinstance(op, Txn):
            refuse_old_reads(op)
        elif isinstance(op, Range) and op.revision > 0:
            raise InvalidRequestError(f"a Txn that writes must not read at a revision: {op}")


def check_grant(ttl: int, lease: int) -> None:
    """
    Refuse what is no whole number of seconds, and ids that no client should choose.

    Raises:
        TypeError: the TTL is no int.
        ValueError: the id is negative.
    """
    if type(ttl) is not int:
        raise TypeError(f"a TTL is whole seconds, an int, not {ttl!r}")
    if lease < 0:
        raise ValueError(f"a lease id must not be negative: {lease}")


def _compares(request: Txn) -> Iterator[Compare]:
    yield from request.compare
    for op in request.success + request.failure:
        if isinstance(op, Txn):
            yield from _compares(op)
