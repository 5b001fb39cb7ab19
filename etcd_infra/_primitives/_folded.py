"""Between folding and etcd: what is read before, and what was folded as one change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._etcd.model import KeyRange, Range, Txn, TxnResult
from etcd_infra._primitives._cas import Change, found_in
from etcd_infra._primitives._groups import in_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.model import KeyValue, Op, OpResult
    from etcd_infra._primitives._fold import Folded
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.fence import Fence


async def read_at_once(space: Space, wanted: Sequence[bytes]) -> dict[bytes, KeyValue | None]:
    """
    Read keys, all at one revision.

    Raises:
        EtcdError: as the backend says.

    Round trips:
        One; none for no keys.
    """
    if not wanted:
        return {}
    answer = await space.backend.txn(Txn(success=tuple(Range(KeyRange.one(key)) for key in wanted)))
    kvs = [found_in(found) for found in answer.results]
    return {key: found[0] if found else None for key, found in zip(wanted, kvs, strict=True)}


def change_of(folded: Folded, note: bytes, fence: Fence | None) -> Change:
    """Render what was folded as one change, which shows the versions if it is refused."""
    guarded = tuple(Range(KeyRange.one(key), keys_only=True) for key in folded.guards)
    return Change(
        tuple(folded.writes.values()),
        folded.state_keys,
        folded.conditions,
        reads=tuple(Txn(success=group) for group in in_groups(guarded)),
        fence=fence,
        note=note,
    )


def versions_in(folded: Folded, reads: Sequence[OpResult]) -> dict[bytes, int]:
    """Return the versions that a refusal of `change_of` shows."""
    kvs = [found_in(one) for group in reads for one in _nested(group)]
    return {key: kv[0].mod_revision if kv else 0 for key, kv in zip(folded.guards, kvs, strict=True)}


def _nested(result: OpResult) -> tuple[OpResult, ...]:
    return result.results if isinstance(result, TxnResult) else (result,)


def flat(ops: Sequence[Op], results: Sequence[OpResult]) -> list[OpResult]:
    """Undo the nesting of operations that were grouped: one result per operation."""
    found: list[OpResult] = []
    for op, result in zip(ops, results, strict=True):
        is_group = isinstance(op, Txn) and not op.compare
        found.extend(_nested(result) if is_group else (result,))
    return found
