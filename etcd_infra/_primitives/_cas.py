"""
One atomic change of shared keys, applied at most once: what every writer of state stands on.

Keys
    ``{ns}intent/{key}``  a prepared two-phase transaction has promised to change the state key ``key``.

Algorithm
    1. ``[slot, fence, conditions, no intent on any written key] → [change, put slot] else [slot, which of the
       fence and the conditions hold, the intents, what the caller wants to read]``.
    2. Refused: a dead fence is final; conditions that do not hold are the caller's to judge, with what was
       read at the same revision; an intent is waited for, and the change sent again.

Guarantees
    Applied at most once, whatever happens to answers (see `slots`). A refusal is definite: no copy of the
    change comes later.

Source
    The slot is ours; M. Herlihy, "Wait-free synchronization" (compare and swap as the universal primitive).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from etcd_infra._etcd.model import Compare, KeyRange, Op, OpResult, Range, RangeResult, Txn, TxnResult
from etcd_infra._primitives._groups import in_groups
from etcd_infra._primitives._intents import wait_resolved
from etcd_infra._primitives.fence import Fence
from etcd_infra.errors import FencedError, InvalidAnswerError, SessionLostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.keys import Keys
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._session.current import SessionSource

MAX_INTENT_GUARDS: Final = 8


@dataclass(frozen=True, slots=True)
class Change:
    """
    What to write, and under which conditions.

    Attributes:
        ops: Puts and deletes, all applied at one revision.
        keys: The state keys (full keys) that they write.
        conditions: What must hold, the caller's versions above all.
        reads: What a refusal is to show, at the revision of the refusal.
        fence: A proof that must hold, too.
        note: Kept in the slot: with a lost answer, all that is known of what was written.
    """

    ops: tuple[Op, ...]
    keys: tuple[bytes, ...]
    conditions: tuple[Compare, ...] = ()
    reads: tuple[Op, ...] = ()
    fence: Fence | None = None
    note: bytes = b""


@dataclass(frozen=True, slots=True)
class Committed:
    """
    The change was applied, once, at `revision`.

    Attributes:
        results: One per operation of the change; empty if the answer of the applied copy was lost.
        note: The change's note.
    """

    revision: int
    results: tuple[OpResult, ...]
    note: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """The conditions did not hold at `revision`, and no copy will be applied; `reads` are of that revision."""

    revision: int
    reads: tuple[OpResult, ...]


def check_fence(fence: Fence | None) -> None:
    """
    Refuse what guards nothing.

    Raises:
        TypeError: it is no `Fence` (a `Hold` has one).
        ValueError: it carries no proof: it was made by hand, or from JSON.
    """
    if fence is None:
        return
    if not isinstance(fence, Fence):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"fence= takes a Fence, such as a hold's `fence`, not {fence!r}"
        raise TypeError(msg)
    if not fence.proof:
        msg = f"this fence carries no proof, so it would guard nothing: {fence}"
        raise ValueError(msg)


async def commit(sessions: SessionSource, keys: Keys, change: Change) -> Committed | Refused:
    """
    Apply `change` if its conditions hold; wait while a prepared transaction has a written key.

    Raises:
        TypeError, ValueError: the fence guards nothing; nothing was sent.
        FencedError: the fence is dead; nothing was written.
        OutcomeUnknownError: the session ended while an answer was missing.
        SessionLostError: there will be no session any more; nothing was written.
        EtcdError: etcd refuses the change; nothing was written.

    Cancellation:
        Applied or not, or still to be for a moment; the session's janitor settles it.

    Round trips:
        One; one more for each answer that was lost.
    """
    check_fence(change.fence)
    proof = change.fence.proof if change.fence else ()
    intents = [keys.intent_of(key) for key in change.keys]
    asked = in_groups(change.conditions)
    request = Txn(
        (*proof, *change.conditions, *[Compare.nothing_in(span) for span in _spans(intents)]),
        change.ops,
        (
            Txn(proof),
            *[Txn(group) for group in asked],
            *[Range(span, limit=1) for span in _spans(intents)],
            *change.reads,
        ),
    )
    while True:
        session = await sessions.current()
        try:
            outcome = await session.slots.write(request, note=change.note)
        except SessionLostError:
            continue  # certainly not applied; whether there is a next session, `current` says
        if outcome.applied:
            return Committed(outcome.revision, outcome.results, outcome.note)
        fence_holds, *rest = outcome.results
        conditions_hold = all(map(_holds, rest[: len(asked)]))
        rest = rest[len(asked) :]
        if change.fence is not None:
            refuse_dead(change.fence, fence_holds)
        count = len(rest) - len(change.reads)
        if not conditions_hold:
            return Refused(outcome.revision, tuple(rest[count:]))
        for found in rest[:count]:
            for intent in found_in(found):
                await wait_resolved(session, intent)


def refuse_dead(fence: Fence, holds: OpResult) -> None:
    """
    Judge a fence by the answer to a nested Txn of its proof.

    Raises:
        FencedError: it is dead.
    """
    if not _holds(holds):
        msg = f"the fence of {fence.resource!r} (token {fence.token}) is not current any more"
        raise FencedError(msg)


def _spans(intents: Sequence[bytes]) -> list[KeyRange]:
    """
    Guard each intent by itself, or, if they are many, all by one range.

    The range may hold intents of other keys, too: the change then waits longer than it must.
    """
    if len(intents) <= MAX_INTENT_GUARDS:
        return [KeyRange.one(intent) for intent in intents]
    return [KeyRange(min(intents), max(intents) + b"\0")]


def _holds(answer: OpResult) -> bool:
    if not isinstance(answer, TxnResult):
        msg = f"a nested transaction was asked for, and {answer} was answered"
        raise InvalidAnswerError(msg)
    return answer.succeeded


def found_in(answer: OpResult) -> tuple[KeyValue, ...]:
    """Return the keys that a range found."""
    if not isinstance(answer, RangeResult):
        msg = f"a range was asked for, and {answer} was answered"
        raise InvalidAnswerError(msg)
    return answer.kvs
