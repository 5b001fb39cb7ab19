"""
The first phase of a two-phase transaction: its keys are kept for it, and what it will write is settled.

Keys
    ``{ns}txn/{id}``      the record (see `_record`), on the transaction's own lease, which nobody renews.
    ``{ns}intent/{key}``  the id, on that lease: no writer of this library changes the state key meanwhile.

Algorithm
    Read the keys, fold the operations (see `_fold`), then ``[slot, versions as read, no intent] → [put record,
    put intents, put slot]``. Others' intents are waited for; changed keys are read again.

Guarantees
    All keys are promised at one revision, or none. What the commit will write is within etcd's budget.

Does not guarantee
    That the lease outlives the commit: the verdict finds out.

Source
    J. Gray, "Notes on Data Base Operating Systems" (1978).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import KeyValue, Put
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._budget import check_txn, fit
from etcd_infra._primitives._cas import Committed, commit
from etcd_infra._primitives._fold import bind, fold
from etcd_infra._primitives._folded import change_of, read_at_once, versions_in
from etcd_infra._primitives._record import Record, verdict_request
from etcd_infra._primitives.operations import TransactionStatus
from etcd_infra._session.granting import grant
from etcd_infra._session.own_lease import OwnLease

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._primitives._cas import Change
    from etcd_infra._primitives._fold import Bound, Folded
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.operations import Operation
    from etcd_infra._session.session import Session


@dataclass(frozen=True, slots=True)
class Promise:
    """What was prepared: the record's key and revision, its content, and what the commit will write."""

    kv: KeyValue
    record: Record
    bound: Sequence[Bound]
    folded: Folded


class Promising:
    """
    A promise that is to be made.

    Args:
        space: Where.
        session: Whose owner's name and clock the record shows.
        transaction_id: The transaction's name.
        operations: What it will do.
        ttl: Whole seconds after which anybody may decide on TIMEOUT.

    Raises:
        InvalidRequestError, TypeError, ValueError: as in `execute`; nothing was sent.
    """

    def __init__(
        self, space: Space, session: Session, transaction_id: str, operations: Sequence[Operation], ttl: int
    ) -> None:
        self._space = space
        self._session = session
        self._transaction_id = transaction_id
        self._ttl = ttl
        self._bound = bind(operations, space)
        self._targets = tuple(dict.fromkeys(one.target for one in self._bound))
        # Whatever will be read: what is over the budget is so already.
        self._request(fold(self._bound, dict.fromkeys(self._targets), space), lease=1)

    async def make(self, lease: int) -> Promise:
        """
        Make the promise, on a lease.

        Raises:
            ConflictError, CodecError, InvalidRequestError, EtcdError: as in `execute`; nothing is promised.

        Cancellation:
            Promised or not, or still to be for a moment; the end of the lease takes it back.

        Round trips:
            Two, and two more for each conflict.
        """
        space, bound = self._space, self._bound
        failures = 0
        while True:
            folded = fold(bound, await read_at_once(space, self._targets), space)
            record, change = self._request(folded, lease)
            outcome = await commit(space.sessions, space.keys, change)
            if isinstance(outcome, Committed):
                key = space.keys.transaction(self._transaction_id)
                return Promise(KeyValue(key, mod_revision=outcome.revision, lease=lease), record, bound, folded)
            folded.raise_conflict(versions_in(folded, outcome.reads), bound)
            await trio.sleep(delay(failures, space.random.random()))
            failures += 1

    def _request(self, folded: Folded, lease: int) -> tuple[Record, Change]:
        """Render the promise, if it and the commit after it are within etcd's budget."""
        keys, session = self._space.keys, self._session
        names = [name for target in folded.writes if (name := keys.parse_state(target)) is not None]
        record = Record(
            TransactionStatus.PREPARED, tuple(names), session.node_id, session.clock.wall(), self._ttl
        )
        note = self._transaction_id.encode()
        kept = Put(keys.transaction(self._transaction_id), record.to_json(record.status), lease=lease)
        intents = [Put(keys.intent_of(keys.state(name)), note, lease=lease) for name in names]
        change = fit(replace(change_of(folded, note, None), ops=(kept, *intents)))
        kv = KeyValue(kept.key, lease=lease)
        status = TransactionStatus.COMMITTED
        writes, conditions = tuple(folded.writes.values()), folded.conditions
        check_txn(verdict_request(keys, kv, record, status, writes=writes, conditions=conditions))
        return record, change


async def lease_of_its_own(space: Space, ttl: int) -> OwnLease:
    """
    Grant a lease that nobody renews, with the session of this moment to look after it.

    Raises:
        SessionLostError: there will be no session any more.
        EtcdError: etcd refuses.

    Cancellation:
        The lease is revoked, in two seconds at most.

    Round trips:
        One; one more for each lost answer, or lost session.
    """
    own: OwnLease | None = None
    while own is None:
        session = await space.sessions.current()
        with session.tether():  # one that was lost meanwhile can look after nothing
            lease = await grant(session.backend, session.clock, session.random, ttl=ttl)
            own = OwnLease(session, lease)
    own.stop()
    return own
