"""Many keys read at one revision, in as few round trips as etcd's limits allow."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from etcd_infra._etcd.model import KeyRange, Range, Txn, TxnResult
from etcd_infra._primitives._cas import found_in
from etcd_infra.errors import InvalidAnswerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import KeyValue, OpResult

# etcd: 128 operations are the sum of the longest lists of all levels: 64 transactions of 64 reads pass.
PER_LEVEL: Final = 64
MAX_PER_TRIP: Final = PER_LEVEL * PER_LEVEL


async def read_many(backend: Backend, keys: Sequence[bytes]) -> list[KeyValue | None]:
    """
    Read each of `keys`, all at one revision; None for those that do not exist.

    Raises:
        CompactedError: with more than 4,096 keys: the revision was compacted between two round trips.

    Round trips:
        One for each 4,096 keys.
    """
    found: list[KeyValue | None] = []
    revision = 0
    for trip in _chunks(keys, MAX_PER_TRIP):
        groups = [
            Txn(success=tuple(Range(KeyRange.one(key), revision=revision) for key in group))
            for group in _chunks(trip, PER_LEVEL)
        ]
        request = groups[0] if len(groups) == 1 else Txn(success=tuple(groups))
        answer = await backend.txn(request)
        revision = revision or answer.revision
        for group in [answer] if len(groups) == 1 else map(_nested, answer.results):
            found += [next(iter(found_in(result)), None) for result in group.results]
    return found


def _nested(result: OpResult) -> TxnResult:
    if not isinstance(result, TxnResult):
        msg = f"a nested transaction was asked for, and {result} was answered"
        raise InvalidAnswerError(msg)
    return result


def _chunks(keys: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    rest = iter(keys)
    while chunk := list(islice(rest, size)):
        yield chunk
