"""What every backend refuses by itself, before a server could misunderstand it or die of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._etcd.model import DeleteRange, Put, Range, Target, Txn
from etcd_infra.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from etcd_infra._etcd.model import Compare, KeyRange, Op


def check_txn_request(request: Txn) -> None:
    """
    Refuse a transaction that can not mean what it says.

    Raises:
        TypeError: a compare's operand is not of its target's type.
        InvalidRequestError: it may write, and reads at an old revision, or would write a key twice.
    """
    for compare in _compares(request):
        wanted = bytes if compare.target is Target.VALUE else int
        if type(compare.operand) is not wanted:
            raise TypeError(f"{compare.target.name} compares with {wanted.__name__}: {compare.operand!r}")
    if not request.is_read_only:
        refuse_old_reads(request)
        check_writes(request.success)
        check_writes(request.failure)


def refuse_old_reads(request: Txn) -> None:
    """Refuse a writing transaction that reads at a revision."""
    # etcd: before 3.5.17 a compacted revision inside a writing Txn could apply it in part (#18667), and the
    # Txn's own revision is "future" there: it never means what was intended.
    for op in request.success + request.failure:
        if isinstance(op, Txn):
            refuse_old_reads(op)
        elif isinstance(op, Range) and op.revision:
            raise InvalidRequestError(f"a Txn that writes must not read at a revision: {op}")


def check_writes(ops: Sequence[Op]) -> None:
    """
    Refuse a branch that puts a key twice, or puts what it also deletes, as etcd does.

    Raises:
        InvalidRequestError: with etcd's own text.
    """
    if len(ops) == 1 and not isinstance(ops[0], Txn):
        return
    _writes(ops)


def _writes(ops: Sequence[Op]) -> tuple[set[bytes], list[KeyRange]]:
    # etcd: its own check overlooks deletes with the open end, and what passes then is fatal. A delete of
    # all keys from "a" on and a put of "a" that ignores the value end every member at once, and again at
    # each restart (3.4.23 to 3.5.30); with an ordinary put, 3.5.30 ends at the next compaction there.
    deleted = [op.range for op in ops if isinstance(op, DeleteRange)]
    written: set[bytes] = set()
    for op in ops:
        if isinstance(op, Txn):
            # etcd: the two branches of one nested Txn exclude each other and may share keys.
            puts, deletes = _writes(op.success)
            other_puts, other_deletes = _writes(op.failure)
            _add(puts, written, deleted)
            _add(other_puts - puts, written, deleted)
            deleted += deletes + other_deletes
    for op in ops:
        if isinstance(op, Put):
            _add((op.key,), written, deleted)
    return written, deleted


def _add(keys: Iterable[bytes], written: set[bytes], deleted: Iterable[KeyRange]) -> None:
    for key in keys:
        if key in written or any(key in range_ for range_ in deleted):
            raise InvalidRequestError("etcdserver: duplicate key given in txn request")
        written.add(key)


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
