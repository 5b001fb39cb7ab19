"""The ten verbs as a simulated process has them: each a message there, and an answer back, perhaps."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import trio

from etcd_infra._backends.request_check import check_grant, check_txn_request
from etcd_infra._backends.watch_cursor import WatchCursor
from etcd_infra._etcd.backend import Backend
from etcd_infra._etcd.model import Status, WatchRequest
from etcd_infra.errors import EtcdError, OutcomeUnknownError, UnavailableError
from etcd_infra.testing.simulation.network import CALL_TIMEOUT, Call, Network
from etcd_infra.testing.simulation.watch import SimulatedWatch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._backends.memory_store import Store
    from etcd_infra._etcd.backend import WatchStream
    from etcd_infra._etcd.model import (
        KeyRange,
        LeaseGrant,
        LeaseRenewal,
        LeaseTimeToLive,
        Range,
        RangeResult,
        Txn,
        TxnResult,
    )
    from etcd_infra.testing.simulation.process import SimulatedProcess

T = TypeVar("T")
_MEMBER = 1


class SimulatedBackend(Backend):
    """One simulated process's way to the simulated etcd; calls end after five seconds without an answer."""

    def __init__(self, process: SimulatedProcess, network: Network) -> None:
        self._process = process
        self._network = network

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._process.id}>"

    @property
    def _store(self) -> Store:
        return self._network.server.store

    async def _call(
        self,
        verb: str,
        request: object,
        apply: Callable[[float], T],
        unanswered: Callable[[], EtcdError] | None,
    ) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        writes = unanswered is not None
        call = Call(self._process, verb, request, apply, unanswered or _unavailable, writes=writes)
        self._network.send(call)
        return cast("T", await trio.lowlevel.wait_task_rescheduled(cast("Any", call.abort)))

    async def range(self, request: Range, /) -> RangeResult:
        """Read keys."""
        return await self._call("range", request, partial(self._store.range, request), None)

    async def txn(self, request: Txn, /) -> TxnResult:
        """Evaluate the compares and apply one branch."""
        check_txn_request(request)
        unknown = partial(OutcomeUnknownError, "a transaction", request.written_keys)
        unanswered = None if request.is_read_only else unknown
        return await self._call("txn", request, partial(self._store.txn, request), unanswered)

    def watch(  # noqa: PLR0913
        self,
        range: KeyRange,  # noqa: A002
        /,
        *,
        start_revision: int = 0,
        prev_kv: bool = False,
        no_put: bool = False,
        no_delete: bool = False,
        progress_notify: bool = False,
        coordination: bool = False,
    ) -> AbstractAsyncContextManager[WatchStream]:
        """Watch keys."""
        request = WatchRequest(range, start_revision, prev_kv, no_put, no_delete, progress_notify)
        return self._open_watch(WatchCursor(request, from_now=coordination))

    @asynccontextmanager
    async def _open_watch(self, cursor: WatchCursor) -> AsyncGenerator[WatchStream]:
        stream = SimulatedWatch(self._process, self._network, cursor)
        self._process.watches[stream] = None
        try:
            await stream.open()
            yield stream
        finally:
            del self._process.watches[stream]
            stream.close()

    async def compact(self, revision: int, /) -> int:
        """Forget the history before `revision`."""
        unknown = partial(OutcomeUnknownError, f"a compaction at {revision}", ())
        return await self._call("compact", revision, partial(self._store.compact, revision), unknown)

    async def lease_grant(self, ttl: int, /, *, lease: int = 0) -> LeaseGrant:
        """Grant a lease."""
        check_grant(ttl, lease)
        unknown = partial(OutcomeUnknownError, "a lease grant", ())
        return await self._call("lease_grant", lease, partial(self._store.lease_grant, ttl, lease), unknown)

    async def lease_keep_alive(self, lease: int, /) -> LeaseRenewal:
        """Renew a lease."""
        return await self._call("lease_keep_alive", lease, partial(self._store.lease_keep_alive, lease), None)

    async def lease_revoke(self, lease: int, /) -> int:
        """End a lease."""
        unknown = partial(OutcomeUnknownError, "a lease revoke", ())
        return await self._call("lease_revoke", lease, partial(self._store.lease_revoke, lease), unknown)

    async def lease_time_to_live(self, lease: int, /, *, keys: bool = False) -> LeaseTimeToLive:
        """Ask what is left of a lease."""
        ask = partial(self._store.lease_time_to_live, lease, keys=keys)
        return await self._call("lease_time_to_live", lease, ask, None)

    async def lease_list(self) -> tuple[int, ...]:
        """List the ids of all leases."""
        return await self._call("lease_list", None, self._store.lease_list, None)

    async def status(self) -> Status:
        """Describe the one simulated member."""
        return await self._call("status", None, self._status, None)

    def _status(self, now: float) -> Status:
        self._store.advance(now)
        return Status("3.5.30", _MEMBER, _MEMBER, self._store.revision, raft_term=2)


def _unavailable() -> UnavailableError:
    return UnavailableError(f"no answer from etcd within {CALL_TIMEOUT} s")
