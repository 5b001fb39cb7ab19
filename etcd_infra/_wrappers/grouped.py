"""
Group commit: transactions that would queue up on their way to etcd travel together, as one.

Algorithm
    1. While none of this process's transactions is on its way, one is sent as it is.
    2. Others wait for the end of the loop's turn, so that those that an answer just woke leave together: those
       that have nothing to do with each other as one Txn of nested ones. While four are on their way, the
       next wait until one of these comes back, or for ten milliseconds.
    3. A definite refusal of a group says nothing about its members: each is sent alone, and groups are
       smaller for a while. An unknown outcome is unknown for each.

Guarantees
    What a member compares, reads or writes is not written by another one of its group, so that each is
    answered as if it had been sent alone. Two places in one line never share a group, nor a revision.

Does not guarantee
    A revision of its own for each transaction: members of a group share one.
    The very limit of etcd's quota, which does not count nested puts: so one departure in sixteen is a lone
    one, and once that is refused, all are.

Source
    Group commit of databases (D. Gawlick, D. Kinkade, "Varieties of concurrency control in IMS/VS Fast Path").
    etcd evaluates every compare of a nested Txn on the state before the whole.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.model import Txn, TxnResult
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra._wrappers.footprint import Footprint
from etcd_infra.errors import EtcdInfraError, OutcomeUnknownError, StorageFullError, UnavailableError

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.background import Background

ON_THEIR_WAY: Final = 4
PATIENCE_SECONDS: Final = 0.01
# etcd: 128 is the longest list of each level, added up; 1.5 MiB is the longest request.
GROUP_MEMBERS: Final = 32
MEMBER_WEIGHT: Final = 64
MEMBER_BYTES: Final = 16 * 1024
LONE_EVERY: Final = 16


class Grouped(Wrapping):
    """
    A backend that sends transactions together when many are on their way.

    Args:
        inner: Sends them.
        background: Where groups are carried; it must outlive every call.
        on_their_way: How many may be on their way at a time.
    """

    def __init__(self, inner: Backend, background: Background, *, on_their_way: int = ON_THEIR_WAY) -> None:
        super().__init__(inner)
        self._background = background
        self._capacity = on_their_way
        self._on_their_way = 0
        self._waiting: dict[_Member, None] = {}
        self._departures = 0
        self._boarding = False
        self._patience_runs = False
        self._members = GROUP_MEMBERS

    async def txn(self, request: Txn, /) -> TxnResult:
        """See `Backend`."""
        if request.is_read_only:
            return await self.inner.txn(request)
        if self._on_their_way:
            footprint = Footprint.of(request)
            if footprint.weight <= MEMBER_WEIGHT and footprint.size <= MEMBER_BYTES:
                return await self._travel_along(_Member(request, footprint))
        self._on_their_way += 1
        try:
            return await self.inner.txn(request)
        finally:
            self._returned()

    async def _travel_along(self, member: _Member) -> TxnResult:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._waiting[member] = None
        self._depart()
        if not self._patience_runs:
            self._patience_runs = True
            self._background.start_soon(self._run_out_of_patience)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.pop(member, None)
            member.leave()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        return member.result()

    async def _run_out_of_patience(self) -> None:
        # Those on their way may be stuck with a member of etcd that is dead.
        while self._waiting:
            waiting = next(iter(self._waiting))
            await trio.sleep(PATIENCE_SECONDS)
            if waiting in self._waiting:
                self._depart(impatient=True)
        self._patience_runs = False

    # ── departures ──────────────────────────────────────────────────────────────────────────────

    def _returned(self) -> None:
        self._on_their_way -= 1
        self._depart()

    def _depart(self, *, impatient: bool = False) -> None:
        if self._boarding or not self._waiting or (self._on_their_way >= self._capacity and not impatient):
            return
        self._boarding = True
        self._on_their_way += 1
        self._background.start_soon(self._carry)

    def _board(self) -> list[_Member]:
        self._departures += 1
        room = 1 if self._departures % LONE_EVERY == 0 else self._members
        together = Footprint()
        members: list[_Member] = []
        for member in islice(self._waiting, 2 * GROUP_MEMBERS):
            if len(members) < room and together.is_independent_of(member.footprint):
                together.add(member.footprint)
                members.append(member)
        for member in members:
            del self._waiting[member]
        return members

    async def _carry(self) -> None:
        # Whoever the latest answer woke is about to ask for the next.
        await trio.lowlevel.cancel_shielded_checkpoint()
        journey = _Journey(self._board())
        self._boarding = False
        self._depart()
        try:
            with journey.scope:
                if len(journey.members) > 1:
                    await self._send_together(journey.members)
                else:
                    await self._send_alone(journey.members)
        finally:
            for member in journey.members:
                member.end(OutcomeUnknownError("a Txn that was given up", member.request.written_keys))
            self._returned()

    async def _send_together(self, members: list[_Member]) -> None:
        try:
            answer = await self.inner.txn(Txn(success=tuple([member.request for member in members])))
            results = _results(answer, members)
        except UnavailableError as error:
            for member in members:
                member.end(UnavailableError(str(error)))
        except OutcomeUnknownError as error:
            for member in members:
                member.end(OutcomeUnknownError(error.summary, member.request.written_keys))
        except (EtcdInfraError, TypeError, ValueError):
            # Nothing was written; whose fault it is, only each alone can tell.
            self._members = max(1, self._members // 2)
            await self._send_alone(members)
        else:
            self._members = min(GROUP_MEMBERS, self._members + 1)
            for member, result in zip(members, results, strict=True):
                member.end(TxnResult(result.succeeded, result.results, answer.revision))

    async def _send_alone(self, members: list[_Member]) -> None:
        for member in members:
            try:
                answer = await self.inner.txn(member.request)
            except StorageFullError as error:
                self._members = 1
                member.end(error)
            except Exception as error:  # noqa: BLE001 - raised where the member waits
                member.end(error)
            else:
                if member.footprint.size:  # there is room for puts
                    self._members = max(2, self._members)
                member.end(answer)


class _Member:
    """One transaction that travels with others, and the task that waits for its answer."""

    __slots__ = ("_outcome", "_task", "footprint", "journey", "request")

    def __init__(self, request: Txn, footprint: Footprint) -> None:
        self.request = request
        self.footprint = footprint
        self.journey: _Journey | None = None
        self._task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        self._outcome: TxnResult | Exception | None = None

    def end(self, outcome: TxnResult | Exception) -> None:
        """Let the task go on with the first outcome there is."""
        if self._outcome is None:
            self._outcome = outcome
            if self._task is not None:
                trio.lowlevel.reschedule(self._task)

    def leave(self) -> None:
        """Note that the task was cancelled."""
        self._task = None
        if self.journey is not None:
            self.journey.left()

    def result(self) -> TxnResult:
        """Return the answer, or raise what there was instead."""
        outcome = self._outcome
        assert outcome is not None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class _Journey:
    """A group on its way; it is given up when nobody waits for it any more."""

    def __init__(self, members: list[_Member]) -> None:
        self.members = members
        self.scope = trio.CancelScope()
        self._waiting = len(members)
        for member in members:
            member.journey = self

    def left(self) -> None:
        """One of the members' tasks waits no more."""
        self._waiting -= 1
        if not self._waiting:
            self.scope.cancel()


def _results(answer: TxnResult, members: list[_Member]) -> list[TxnResult]:
    results = [result for result in answer.results if isinstance(result, TxnResult)]
    if len(results) != len(members):
        msg = f"a group of {len(members)} Txns that makes sense ({answer})"
        raise OutcomeUnknownError(msg)
    return results
