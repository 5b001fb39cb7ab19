"""Transactions that are broken in one way each: the mistakes that transaction layers make; see `broken`."""

from __future__ import annotations

from dataclasses import replace

from etcd_infra._etcd.model import KeyRange, Range, Txn
from etcd_infra._primitives import _cas, _intents, _record, _state_reading, stm, transaction, two_phase
from etcd_infra._primitives._reads import Reads
from etcd_infra._primitives._record import Verdict, verdict_request
from etcd_infra._primitives.operations import TransactionStatus
from etcd_infra._session.slots import Slots
from etcd_infra.errors import OutcomeUnknownError, UnavailableError
from tests.simulation.broken import replaced


def reads_are_not_compared():
    """The commit compares nothing: whoever read first and wrote last wins."""
    return replaced(Reads, "conditions", lambda _self: ())


def ranges_are_not_compared():
    """The commit compares the keys that were found, not the range: what came in between is a phantom."""
    conditions = Reads.conditions

    def keys_only(self):
        return conditions(self)[: len(self._keys)]

    return replaced(Reads, "conditions", keys_only)


def blind_writes_are_not_compared():
    """At the strictest level the keys that were written and not read are not compared."""
    return replaced(Reads, "unwritten_since", lambda _self, _keys: ())


def each_read_is_of_now():
    """The reads of one run are of one revision each."""
    fetch = Reads._fetch

    async def of_now(self, request):
        self._one_snapshot = False
        return await fetch(self, request)

    return replaced(Reads, "_fetch", of_now)


def nothing_is_validated():
    """A run that wrote nothing returns what it read, whatever became of it."""

    async def valid(space, conditions, fence):
        del conditions, fence
        await space.sessions.current()
        return True

    return replaced(stm, "_still_hold", valid)


def increments_in_two_steps():
    """`execute` reads, computes, and writes without comparing what it read."""
    change_of = transaction.change_of
    return replaced(transaction, "change_of", lambda *given: replace(change_of(*given), conditions=()))


def intents_are_overlooked():
    """Writers do not look for intents: what was promised is overwritten."""
    return replaced(_cas, "_spans", lambda _intents: [])


def impatient():
    """A transaction that is met undecided is given up at once."""
    is_resolved = _intents._Waiter.is_resolved

    async def at_once(self):
        self._since = replace(self._since, monotonic=self._since.monotonic - 100)
        return await is_resolved(self)

    return replaced(_intents._Waiter, "is_resolved", at_once)


def verdict_is_not_compared():
    """A verdict does not compare the record: a second one undoes the first."""

    def always(keys, prepared, record, status, **given):
        request = verdict_request(keys, prepared, record, status, **given)
        return Txn((), request.success, request.failure)

    return replaced(_record, "verdict_request", always)


def unknown_commit_is_failure():
    """A commit without an answer is reported as TIMEOUT if its record is gone."""
    decide = _record.decide

    async def hopeless(session, prepared, record, status, **given):
        try:
            return await decide(session, prepared, record, status, **given)
        except OutcomeUnknownError:
            return Verdict(TransactionStatus.TIMEOUT)

    return replaced(two_phase, "decide", hopeless)


def unknown_is_failure():
    """A write without an answer is reported as one that failed."""
    really_send = Slots._send

    async def send(self, slot, request, write):
        answer = await really_send(self, slot, request, write)
        if answer is None:
            slot.dirty = write.unanswered = False
            msg = "no answer"
            raise UnavailableError(msg)
        return answer

    return replaced(Slots, "_send", send)


def reads_one_by_one():
    """`get_many` reads one key after the other."""

    async def read_many(backend, keys):
        found = [(await backend.range(Range(KeyRange.one(key)))).kvs for key in keys]
        return [kvs[0] if kvs else None for kvs in found]

    return replaced(_state_reading, "read_many", read_many)


BROKEN = (
    reads_are_not_compared,
    ranges_are_not_compared,
    blind_writes_are_not_compared,
    each_read_is_of_now,
    nothing_is_validated,
    increments_in_two_steps,
    intents_are_overlooked,
    impatient,
    verdict_is_not_compared,
    unknown_commit_is_failure,
    unknown_is_failure,
    reads_one_by_one,
)
