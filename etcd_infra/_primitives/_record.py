"""
The record of a two-phase transaction: what everybody knows of it, and how it is decided once.

Keys
    ``{ns}txn/{id}``      JSON status, keys, node, since, TTL; on the transaction's own lease.
    ``{ns}intent/{key}``  the id of the transaction that has promised to change the state key; on that lease.

Algorithm
    1. A verdict is ``[mod(record)==R] → [writes, delete intents, put record = verdict] else [record]``; R is
       the revision at which it was prepared, so that of all verdicts one is applied, whoever sends it.
    2. No answer: send it again. The record says what was decided, and by the verdict that was asked for
       whether it was this one.

Guarantees
    A record has one verdict, ever. Copies of a Txn that come after it change nothing.

Source
    J. Gray, L. Lamport, "Consensus on Transaction Commit" (2006): etcd is the coordinator that does not fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, KeyValue, Op, Put, Range, RangeResult, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._groups import in_groups
from etcd_infra._primitives.operations import TransactionStatus
from etcd_infra.errors import EtcdError, OutcomeUnknownError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.keys import Keys
    from etcd_infra._session.session import Session


class Record(msgspec.Struct, frozen=True):
    """
    What stands in the record.

    Attributes:
        status: PREPARED, or the verdict.
        keys: The user's keys that it will change.
        node: Who began it.
        since: Unix seconds by the beginner's clock; for people only.
        ttl: Whole seconds after which anybody may decide on TIMEOUT.
    """

    status: TransactionStatus
    keys: tuple[str, ...]
    node: str
    since: float
    ttl: int

    @classmethod
    def parse(cls, kv: KeyValue) -> Record | None:
        """Read a record; None if it is none of ours."""
        try:
            return msgspec.json.decode(kv.value, type=cls)
        except msgspec.DecodeError:
            return None

    def to_json(self, status: TransactionStatus) -> bytes:
        """Render it with another status."""
        return msgspec.json.encode(msgspec.structs.replace(self, status=status))


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    How a transaction was decided.

    Attributes:
        status: What was decided; PREPARED: `conditions` did not hold, and nothing is decided.
        revision: When, if it is known; else 0.
    """

    status: TransactionStatus
    revision: int = 0


async def decide(  # noqa: PLR0913
    session: Session,
    prepared: KeyValue,
    record: Record,
    status: TransactionStatus,
    *,
    writes: Sequence[Op] = (),
    conditions: Sequence[Compare] = (),
    earlier_copies: bool = False,
) -> Verdict:
    """
    Give a prepared transaction its verdict, unless it has one; repeat until it is known which.

    Args:
        session: Whose backend is used.
        prepared: The record as it was put by `prepare`.
        record: What stands in it.
        status: The verdict.
        writes: What it applies.
        conditions: What must hold besides.
        earlier_copies: A commit was sent before and may have been applied.

    Raises:
        OutcomeUnknownError: a commit may have been applied, and the record has ended with its lease, or etcd
            refuses the next copy.
        EtcdError: etcd refuses the request; nothing was written.

    Cancellation:
        Decided or not, or still to be for a moment; another verdict settles it.

    Round trips:
        One; one more for each answer that was lost.
    """
    request = verdict_request(session.keys, prepared, record, status, writes=writes, conditions=conditions)
    unanswered = earlier_copies
    failures = 0
    while True:
        try:
            answer = await session.backend.txn(request)
        except (OutcomeUnknownError, UnavailableError) as error:
            unanswered |= isinstance(error, OutcomeUnknownError) and bool(writes)
            await trio.sleep(delay(failures, session.random.random()))
            failures += 1
            continue
        except EtcdError as error:
            if not unanswered:
                raise
            # This copy was refused; the one without an answer may have been applied, or may still be.
            msg = f"the commit of a transaction whose next copy was refused ({error})"
            raise OutcomeUnknownError(msg, request.written_keys) from error
        if answer.succeeded:
            return Verdict(status, answer.revision)
        found = answer.results[0]
        kv = found.kvs[0] if isinstance(found, RangeResult) and found.kvs else None
        if kv is not None and (decided := Record.parse(kv)) is not None:
            return Verdict(decided.status, kv.mod_revision)
        if unanswered:
            msg = f"the commit of a transaction whose record {prepared.key!r} has ended"
            raise OutcomeUnknownError(msg, request.written_keys)
        # The lease ended, and the intents with it: no commit can be applied any more, and none was sent.
        return Verdict(TransactionStatus.TIMEOUT)


def verdict_request(  # noqa: PLR0913
    keys: Keys,
    prepared: KeyValue,
    record: Record,
    status: TransactionStatus,
    *,
    writes: Sequence[Op],
    conditions: Sequence[Compare],
) -> Txn:
    """Render a verdict."""
    intents = [keys.intent_of(keys.state(key)) for key in record.keys]
    undecided = Compare.modified_at(prepared.key, prepared.mod_revision)
    return Txn(
        (undecided, *conditions),
        (
            *[Txn(success=group) for group in in_groups(tuple(writes))],
            *[Txn(success=group) for group in in_groups([DeleteRange(KeyRange.one(key)) for key in intents])],
            Put(prepared.key, record.to_json(status), lease=prepared.lease),
        ),
        (Range(KeyRange.one(prepared.key)),),
    )
