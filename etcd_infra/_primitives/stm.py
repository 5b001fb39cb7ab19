"""
Software transactional memory: a function that reads and writes, and takes effect at one revision or not at all.

Keys
    ``{ns}state/{key}``  what is read and changed; see `state`.

Algorithm
    1. Run the function: its first read pins a revision, all reads are of that one; its writes are kept here.
    2. ``[slot, fence, what was read is as it was, no intent] → [writes, put slot]``. A run that wrote
       nothing is validated by the compares alone.
    3. Refused: wait a little, and run the function again; the first read then fetches all that was read before.
    4. `retry`: watch what was read, from the snapshot on, and run again when it changes.

Guarantees
    By level; see `Isolation`. The function sees one snapshot in every run, also in those that come to nothing
    (down to SERIALIZABLE), its own writes included, and ranges without phantoms. Nothing of a run that was not
    committed is visible. A commit is applied at most once.

Does not guarantee
    That the function runs once: what it does outside the transaction, it may do again. Progress under
    contention is probable (full jitter), not certain; the caller's scope bounds it.

Source
    etcd ``client/v3/concurrency/stm.go`` (the levels; it has no range reads); T. Harris, S. Marlow, S. Peyton
    Jones, M. Herlihy, "Composable Memory Transactions", 2005 (`retry`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

import trio

from etcd_infra._etcd.model import DeleteRange, KeyRange, Put, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._budget import check_reads, fit
from etcd_infra._primitives._cas import Change, Committed, check_fence, commit, refuse_dead
from etcd_infra._primitives._reads import Reads
from etcd_infra._primitives._run import End, Transaction
from etcd_infra._primitives._until_changed import wait_changed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from etcd_infra._etcd.model import Compare, Op
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.fence import Fence

T = TypeVar("T")


class Isolation(StrEnum):
    """
    What may happen between a transaction's reads and its commit: the levels of etcd's Go STM.

    SERIALIZABLE_SNAPSHOT: nothing to what it read, nor to what it writes. SERIALIZABLE: nothing to what it
    read; a key that it writes without reading may have changed. REPEATABLE_READS: the same, but a run may
    see several moments before it is refused. READ_COMMITTED: anything.
    """

    SERIALIZABLE_SNAPSHOT = "serializable-snapshot"
    SERIALIZABLE = "serializable"
    REPEATABLE_READS = "repeatable-reads"
    READ_COMMITTED = "read-committed"


async def transact(
    space: Space,
    function: Callable[[Transaction], Awaitable[T]],
    isolation: Isolation = Isolation.SERIALIZABLE_SNAPSHOT,
    *,
    fence: Fence | None = None,
) -> T:
    """
    Run `function` until what it read is still true when what it wrote is applied; return what it returns.

    Args:
        space: Where.
        function: Is given a `Transaction`; may run several times. What it raises leaves as it is, and nothing
            is written.
        isolation: What may happen meanwhile.
        fence: A proof that must hold at the commit.

    Raises:
        InvalidRequestError: it read or wrote more than one Txn of etcd can take; nothing was sent.
        FencedError: the fence is dead; nothing was written.
        OutcomeUnknownError: the session ended while an answer was missing.
        ValueError, TypeError: there is no such level, or the fence guards nothing; nothing ran.

    Cancellation:
        In the function: nothing was written. At the commit: applied as a whole or not at all, or still to be
        for a moment; the session's janitor settles it.

    Round trips:
        One per key or prefix read, and one to commit or validate; after a conflict one for all keys read.
    """
    level = Isolation(isolation)
    check_fence(fence)
    one_snapshot = level in {Isolation.SERIALIZABLE_SNAPSHOT, Isolation.SERIALIZABLE}
    likely: tuple[bytes, ...] = ()
    failures = 0
    while True:
        reads = Reads(space.backend, one_snapshot=one_snapshot, likely=likely)
        run = Transaction(space, reads)
        outcome = await run.perform(function)
        if run.end is End.RETURNED:
            if await _is_valid(space, run, level, fence):
                return outcome[0]
        elif run.end is End.WAIT:
            await wait_changed(space.backend, reads.watched())
            failures = 0
        likely = reads.read_keys
        await trio.sleep(delay(failures, space.random.random()))
        failures += 1


async def _is_valid(space: Space, run: Transaction, level: Isolation, fence: Fence | None) -> bool:
    """Apply what the run wrote if what it rests on still holds; return whether it did."""
    writes = run.writes
    conditions = _conditions(run.reads, tuple(writes), level)
    if not writes and not run.publications:
        return await _still_hold(space, conditions, fence)
    ops = (*[_write(key, value) for key, value in writes.items()], *run.publications)
    change = Change(ops, tuple(writes), conditions, fence=fence)
    if not isinstance(await commit(space.sessions, space.keys, fit(change)), Committed):
        return False
    space.tally.messages_sent += len(run.publications)
    return True


def _conditions(reads: Reads, written: tuple[bytes, ...], level: Isolation) -> tuple[Compare, ...]:
    match level:
        case Isolation.READ_COMMITTED:
            return ()
        case Isolation.SERIALIZABLE_SNAPSHOT:
            return (*reads.conditions(), *reads.unwritten_since(written))
        case _:
            return reads.conditions()


def _write(key: bytes, value: bytes | None) -> Op:
    return DeleteRange(KeyRange.one(key)) if value is None else Put(key, value)


async def _still_hold(space: Space, conditions: tuple[Compare, ...], fence: Fence | None) -> bool:
    """Validate a run that wrote nothing: a read of etcd's, which leaves no trace."""
    proof = fence.proof if fence else ()
    check_reads(conditions, fence)
    if not proof and not conditions:
        await trio.lowlevel.checkpoint()
        return True
    answer = await space.backend.txn(Txn((*proof, *conditions), (), (Txn(proof),)))
    if not answer.succeeded and fence is not None:
        refuse_dead(fence, answer.results[0])
    return answer.succeeded
