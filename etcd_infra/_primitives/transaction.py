"""
Several operations on several keys, all at one revision or not at all.

Keys
    ``{ns}state/{key}``  what is changed; see `state`.

Algorithm
    1. Read, in one Txn, the keys whose old value matters: those that begin with an increment or decrement.
    2. Fold the operations into one put or delete per key (see `_fold`).
    3. ``[slot, fence, version of each key read or presumed, no intent] → [writes, put slot] else [versions]``.
    4. Refused: a version that an operation presumes is wrong: `ConflictError`. Only a key that was read has
       changed: wait a little, and read again.

Guarantees
    Atomic and strictly serializable; applied at most once, whatever happens to answers. What is written rests
    on exactly what was read.

Does not guarantee
    Progress on a key that many write without pause: each conflict is tried again, with full jitter, as long
    as the caller's scope allows.

Source
    The optimistic loop is that of etcd's Go ``client/v3/concurrency/stm.go``; folding and slot are ours.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import DeleteRange, DeleteRangeResult, KeyRange, Range, Txn, TxnResult
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._budget import MAX_OPS, fit
from etcd_infra._primitives._cas import Committed, commit, found_in
from etcd_infra._primitives._fold import bind, fold, keys_to_read
from etcd_infra._primitives._folded import change_of, flat, read_at_once, versions_in
from etcd_infra._primitives._many import read_many
from etcd_infra._primitives.operations import TransactionResult, TransactionStatus
from etcd_infra.errors import EtcdError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from etcd_infra._etcd.model import Op, OpResult
    from etcd_infra._primitives._fold import Bound, Folded
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.fence import Fence
    from etcd_infra._primitives.operations import Operation

logger = logging.getLogger("etcd_infra.transaction")


async def execute(
    space: Space, operations: Iterable[Operation], *, fence: Fence | None = None
) -> TransactionResult:
    """
    Apply all operations at one revision, or none of them.

    Operations on the same key act one after the other.

    Args:
        space: Where.
        operations: `Set`, `Delete`, `Increment`, `Decrement`, `Cas`, `Publish`, in any number and order.
        fence: A proof that must hold, too.

    Raises:
        ConflictError: the version that a `Cas` presumes is not there; it names the operation's `index`,
            `key` and the present `version`. Nothing was written.
        CodecError: an increment met a value that is no integer; nothing was written.
        FencedError: the fence is dead; nothing was written.
        InvalidRequestError: over etcd's budget of operations or bytes; nothing was sent.
        OutcomeUnknownError: the session ended while an answer was missing.
        TypeError, ValueError: an operation makes no sense; nothing was sent.

    Cancellation:
        Applied as a whole or not at all, or still to be for a moment; the session's janitor settles it.

    Round trips:
        One; with increments or decrements two, and two more for each conflict. One more for each lost answer.
    """
    bound = bind(operations, space)
    sent = sum(not one.operation.is_state for one in bound)
    space.tally.state_operations += len(bound) - sent
    name = f"{space.random.getrandbits(64):016x}"
    wanted = keys_to_read(bound)
    # Whatever will be read: what is over the budget is so already.
    fit(change_of(fold(bound, dict.fromkeys(wanted), space), name.encode(), fence))
    failures = 0
    while True:
        seen = await read_at_once(space, wanted)
        folded = fold(bound, seen, space)
        change = fit(change_of(folded, name.encode(), fence))
        outcome = await commit(space.sessions, space.keys, change)
        if isinstance(outcome, Committed):
            space.tally.messages_sent += sent
            folded = await _told(space, folded, bound, change.ops, outcome)
            results = folded.results_at(outcome.revision, bound)
            return TransactionResult(name, TransactionStatus.COMMITTED, results, outcome.revision)
        folded.raise_conflict(versions_in(folded, outcome.reads), bound)
        await trio.sleep(delay(failures, space.random.random()))
        failures += 1


async def _told(
    space: Space, folded: Folded, bound: Sequence[Bound], ops: Sequence[Op], outcome: Committed
) -> Folded:
    """Fill in which keys that were deleted without a look were there, and which messages are new."""
    answers: dict[bytes, OpResult] = {}
    if outcome.results:
        answers = dict(zip(folded.writes, flat(ops, outcome.results), strict=True))
    deleted = {one.target for one in bound if _is_blind_delete(folded, one)}
    published = {
        target: write.compare[0].range.key for target, write in folded.writes.items() if isinstance(write, Txn)
    }
    told: dict[bytes, bool] = {}
    if answers:
        for target in (*deleted, *published):
            done = answers[target]
            told[target] = (isinstance(done, DeleteRangeResult) and done.deleted > 0) or (
                isinstance(done, TxnResult) and done.succeeded
            )
    else:
        told = await _was_there(space, sorted(deleted), outcome.revision - 1)
        told |= await _is_new(space, published, outcome.revision)
    results = list(folded.results)
    for index, one in enumerate(bound):
        if one.target in deleted or one.target in published:
            results[index] = replace(results[index], success=told.get(one.target))
    return replace(folded, results=tuple(results))


def _is_blind_delete(folded: Folded, one: Bound) -> bool:
    return one.alone and one.target not in folded.guards and isinstance(folded.writes[one.target], DeleteRange)


async def _is_new(space: Space, markers: Mapping[bytes, bytes], revision: int) -> dict[bytes, bool]:
    """Look which messages a commit whose answer was lost has published: their markers are as old as it."""
    try:
        found = await read_many(space.backend, list(markers.values())) if markers else []
    except EtcdError as error:
        logger.info("which messages of a transaction are new can not be told: %s", error)
        return {}
    kvs = zip(markers, found, strict=True)
    return {target: kv.create_revision == revision for target, kv in kvs if kv is not None}


async def _was_there(space: Space, targets: Sequence[bytes], revision: int) -> dict[bytes, bool]:
    """Look into the past, since the answer that would have told was lost; empty if there is no way any more."""
    found: dict[bytes, bool] = {}
    try:
        for at in range(0, len(targets), MAX_OPS):
            some = targets[at : at + MAX_OPS]
            reads = tuple(Range(KeyRange.one(key), revision=revision, keys_only=True) for key in some)
            answer = await space.backend.txn(Txn(success=reads))
            found |= {key: bool(found_in(one)) for key, one in zip(some, answer.results, strict=True)}
    except EtcdError as error:
        logger.info("which keys a transaction deleted can not be told: %s", error)
    return found
