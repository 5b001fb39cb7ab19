"""Elections that are broken in one way each; see `broken`."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import trio

from etcd_infra._etcd.model import Put, Txn
from etcd_infra._primitives._shared import _Open
from etcd_infra._primitives.election import Election
from etcd_infra._primitives.leader_watch import LeaderWatch
from etcd_infra._primitives.leadership import Leadership
from tests.simulation.broken import replaced


def resigns_before_it_stops():
    """Asked to yield, the leader deletes its key while its body still runs."""

    async def step_down(self):
        await self._place.leave(until=self._session.clean_up_deadline())
        self.ask_to_yield()

    return replaced(Leadership, "step_down", step_down)


def proposal_without_lease():
    """A proposal is put without the lease: the key outlives its leader."""

    async def write(self, value):
        await self._session.backend.txn(Txn(success=(Put(self._key, value),)))

    return replaced(Leadership, "_write", write)


def observer_orders_by_change():
    """An observer takes whoever changed last for the leader."""

    def elect(self, *, always=False):
        first = max(self._line.values(), key=lambda kv: kv.mod_revision, default=None)
        if always or first != self._first:
            self._ready.append(first)
        self._first = first

    return replaced(LeaderWatch, "_elect", elect)


def observer_overlooks_deletions():
    """An observer takes in new places only: it tells of leaders that have gone."""
    take_in = LeaderWatch._take_in

    def only_puts(self, events):
        if puts := tuple(event for event in events if not event.is_delete):
            take_in(self, puts)

    return replaced(LeaderWatch, "_take_in", only_puts)


def proposal_without_proof():
    """A proposal is put whatever became of the key: a leader that was deposed is back in line, for ever."""

    async def write(self, value):
        put = Put(self._key, value, lease=self._session.lease.id)
        await self._session.backend.txn(Txn(success=(put,)))

    return replaced(Leadership, "_write", write)


def stays_registered():
    """Whoever campaigned stays a member for as long as its session lives."""

    async def never(_self):
        await trio.lowlevel.checkpoint()

    return replaced(_Open, "close", never)


def quorum_by_hearsay():
    """A quorum that was seen once is not compared when the line is joined."""

    async def no_proof(self, _session, _view):
        await trio.lowlevel.checkpoint()
        return ()

    @contextmanager
    def both():
        with (
            replaced(Election, "_wait_quorum", no_proof),
            replaced(Election, "_on_lack", lambda *_: nullcontext()),
        ):
            yield

    return both()


BROKEN = (
    resigns_before_it_stops,
    proposal_without_lease,
    proposal_without_proof,
    observer_orders_by_change,
    observer_overlooks_deletions,
    stays_registered,
    quorum_by_hearsay,
)
