"""
A backend over any gRPC channel: which call to make, where, and what its failure means.

One attempt per call: what may be repeated is repeated by a wrapper above. `UnavailableError` is raised for a
write only when the request was certainly not applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import trio

from etcd_infra._backends import wire
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.request_check import check_grant, check_txn_request
from etcd_infra._backends.status import read_error, write_error
from etcd_infra._backends.watch_cursor import WatchCursor
from etcd_infra._backends.watching import Watching
from etcd_infra._etcd.backend import Backend
from etcd_infra._etcd.model import DeleteRange, KeyRange, Put, Range, Txn, WatchRequest
from etcd_infra.errors import InvalidAnswerError, OutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._backends.channel import Metadata
    from etcd_infra._backends.endpoints import Endpoints
    from etcd_infra._etcd.backend import WatchStream
    from etcd_infra._etcd.background import Background
    from etcd_infra._etcd.model import LeaseGrant, LeaseRenewal, LeaseTimeToLive, RangeResult, Status, TxnResult

T = TypeVar("T")

# A caller that gave up after this long without an answer tells as much about a member as our own deadline.
SUSPECT_SECONDS: Final = 1.0

_RANGE: Final = "/etcdserverpb.KV/Range"
_PUT: Final = "/etcdserverpb.KV/Put"
_DELETE_RANGE: Final = "/etcdserverpb.KV/DeleteRange"
_TXN: Final = "/etcdserverpb.KV/Txn"
_COMPACT: Final = "/etcdserverpb.KV/Compact"
_GRANT: Final = "/etcdserverpb.Lease/LeaseGrant"
_REVOKE: Final = "/etcdserverpb.Lease/LeaseRevoke"
_KEEP_ALIVE: Final = "/etcdserverpb.Lease/LeaseKeepAlive"
_TIME_TO_LIVE: Final = "/etcdserverpb.Lease/LeaseTimeToLive"
_LEASES: Final = "/etcdserverpb.Lease/LeaseLeases"
_STATUS: Final = "/etcdserverpb.Maintenance/Status"


class RpcBackend(Backend):
    """
    Etcd over gRPC.

    Args:
        endpoints: The members.
        nursery: Where the watches' streams are served; its end ends them.
        call_timeout: Seconds that a call may take.
        draw: A random number in [0, 1), for back-off.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        nursery: trio.Nursery | Background,
        *,
        call_timeout: float,
        draw: Callable[[], float],
    ) -> None:
        self._endpoints = endpoints
        self._call_timeout = call_timeout
        self._watching = Watching(
            endpoints, nursery, read_revision=self._read_revision, draw=draw, patience=call_timeout
        )

    def __repr__(self) -> str:
        return f"<RpcBackend {self._endpoints!r}>"

    async def range(self, request: Range, /) -> RangeResult:
        """Implement `Backend.range`."""
        # A serializable read is there for the time without a leader.
        metadata = () if request.serializable else wire.HAS_LEADER
        return wire.decode_range(await self._read(_RANGE, wire.encode_range(request), metadata=metadata))

    async def txn(self, request: Txn, /) -> TxnResult:
        """Implement `Backend.txn`."""
        # etcd: the same written as a Txn costs the server a good deal more. (What keeps a value or a lease is
        # checked in another order there.) There is nothing in it that could need `check_txn_request`.
        alone = None if request.compare or request.failure or len(request.success) != 1 else request.success[0]
        if isinstance(alone, Put) and not (alone.ignore_value or alone.ignore_lease):
            return await self._write(_PUT, wire.encode_put(alone), wire.decode_put, request)
        if isinstance(alone, DeleteRange):
            encoded = wire.encode_delete_range(alone)
            return await self._write(_DELETE_RANGE, encoded, wire.decode_delete_range, request)
        check_txn_request(request)
        if request.is_read_only:
            return wire.decode_txn(await self._read(_TXN, wire.encode_txn(request)), request)
        return await self._write(
            _TXN, wire.encode_txn(request), lambda answer: wire.decode_txn(answer, request), request
        )

    def watch(  # noqa: PLR0913 - as the waist has it
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
        """Implement `Backend.watch`."""
        request = WatchRequest(range, start_revision, prev_kv, no_put, no_delete, progress_notify)
        cursor = WatchCursor(request, from_now=coordination)
        return self._watching.open(cursor, coordination=coordination)

    async def compact(self, revision: int, /) -> int:
        """Implement `Backend.compact`."""
        return await self._write(
            _COMPACT,
            wire.encode_compact(revision),
            lambda answer: wire.decode_revision("CompactionResponse", answer),
            f"a compaction at {revision}",
        )

    async def lease_grant(self, ttl: int, /, *, lease: int = 0) -> LeaseGrant:
        """Implement `Backend.lease_grant`."""
        check_grant(ttl, lease)
        return await self._write(
            _GRANT,
            wire.encode_lease_grant(ttl, lease),
            wire.decode_lease_grant,
            f"the grant of lease {lease:x}",
        )

    async def lease_keep_alive(self, lease: int, /) -> LeaseRenewal:
        """Implement `Backend.lease_keep_alive`."""
        # etcd: a stream of one request is answered once and ended. Each renewal has a deadline of its own
        # then, and is never stuck behind another one on a member that has lost the leader.
        answer = await self._read(_KEEP_ALIVE, wire.encode_lease(lease), rotate=True)
        return wire.decode_lease_keep_alive(answer, lease)

    async def lease_revoke(self, lease: int, /) -> int:
        """Implement `Backend.lease_revoke`."""
        return await self._write(
            _REVOKE,
            wire.encode_lease(lease),
            lambda answer: wire.decode_revision("LeaseRevokeResponse", answer),
            f"the revocation of lease {lease:x}",
        )

    async def lease_time_to_live(self, lease: int, /, *, keys: bool = False) -> LeaseTimeToLive:
        """Implement `Backend.lease_time_to_live`."""
        answer = await self._read(_TIME_TO_LIVE, wire.encode_lease_time_to_live(lease, keys=keys))
        return wire.decode_lease_time_to_live(answer, lease)

    async def lease_list(self) -> tuple[int, ...]:
        """Implement `Backend.lease_list`."""
        return wire.decode_lease_list(await self._read(_LEASES, b""))

    async def status(self) -> Status:
        """Implement `Backend.status`."""
        return wire.decode_status(await self._read(_STATUS, b"", metadata=()))

    async def _read_revision(self) -> int:
        # etcd: a linearizable read is answered at a revision that a quorum stands behind; of no key at all.
        return (await self.range(Range(KeyRange.one(b"\0"), count_only=True))).revision

    async def _read(
        self, method: str, request: bytes, *, metadata: Metadata = wire.HAS_LEADER, rotate: bool = False
    ) -> bytes:
        try:
            return await self._unary(method, request, metadata=metadata, rotate=rotate)
        except ChannelError as error:
            raise read_error(error.code, error.details) from error

    async def _write(self, method: str, request: bytes, decode: Callable[[bytes], T], subject: Txn | str) -> T:
        """Send what may change something; `subject` is for the message if its outcome is unknown."""
        try:
            return decode(await self._unary(method, request, metadata=wire.HAS_LEADER))
        except ChannelError as error:
            summary, keys = _described(subject)
            raise write_error(
                error.code,
                error.details,
                never_sent=error.never_sent,
                sent_bytes=len(request),
                summary=summary,
                keys=keys,
            ) from error
        except InvalidAnswerError as error:
            # Whatever the answer was meant to say, the request may well have been applied.
            summary, keys = _described(subject)
            raise OutcomeUnknownError(f"{summary} that makes sense ({error})", keys) from error

    async def _unary(self, method: str, request: bytes, *, metadata: Metadata, rotate: bool = False) -> bytes:
        policy = self._endpoints.policy
        began = trio.current_time()
        endpoint = policy.rotate(began) if rotate else policy.choose(began)
        channel = self._endpoints.channel(endpoint)
        try:
            answer = await channel.unary(method, request, time_limit=self._call_timeout, metadata=metadata)
        except ChannelError as error:
            if error.blames_endpoint:
                self._blame(endpoint)
            else:
                policy.succeeded(endpoint)
            raise
        except trio.Cancelled:
            if trio.current_time() - began >= SUSPECT_SECONDS:
                self._blame(endpoint)
            raise
        policy.succeeded(endpoint)
        self._watching.keep_stream()
        return answer

    def _blame(self, endpoint: int) -> None:
        self._endpoints.policy.failed(endpoint, trio.current_time())
        self._watching.leave(endpoint)


def _described(subject: Txn | str) -> tuple[str, tuple[bytes, ...]]:
    if isinstance(subject, str):
        return subject, ()
    keys = subject.written_keys
    first, *others = keys
    return f"a Txn that writes {f'{first!r} and {len(others)} more' if others else repr(first)}", keys
