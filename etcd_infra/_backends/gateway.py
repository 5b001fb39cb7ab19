"""
A channel over etcd's HTTP gateway: gRPC's calls as JSON over HTTP/1.1, for networks where nothing else passes.

Unary calls go through etcd3gw's client, which blocks: each in a thread of Trio's, at most 32 at a time, and
renewals of leases beside those, so that a slow member never keeps a lease from being renewed. A call that is
cancelled has its connection shut down, so that its thread ends with it (while a name is looked up or a
connection is made: with that, within the dial timeout of each address). Watches need no thread: etcd3gw takes
any piece of a watch's answer for a whole document, so they are read here, each from a connection of its own.

House rules. `etcd3gw` is imported here and nowhere else, once this road is taken. Threads touch a `Call` and
nothing that belongs to Trio.

Source: etcd `Documentation/dev-guide/api_grpc_gateway.md`, etcd3gw `client.py`.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import requests as untyped_requests
import trio
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import ConnectionFailedError, ConnectionTimeoutError, Etcd3Exception

from etcd_infra._backends.channel import ByteStream, Channel, ChannelError, Metadata
from etcd_infra._backends.gateway_connections import BreakableAdapter, Call, take_part
from etcd_infra._backends.gateway_json import failure, from_json, to_json, unwrapped
from etcd_infra._backends.gateway_watch import Caller, GatewayWatchStream
from etcd_infra._backends.grpc_headers import timeout_text
from etcd_infra._backends.home import Home
from etcd_infra._backends.status import StatusCode
from etcd_infra._etcd.background import open_background

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from etcd_infra._backends.endpoints import Endpoint
    from etcd_infra._backends.tls import TlsConfig

T = TypeVar("T")

requests: Any = untyped_requests
"""It comes without type information."""

_CALLS: Final = 32
_RENEWALS: Final = 8
_LONGEST_SECONDS: Final = 86_400.0
_WATCH: Final = "/etcdserverpb.Watch/Watch"
_KEEP_ALIVE: Final = "/etcdserverpb.Lease/LeaseKeepAlive"


class _Route(NamedTuple):
    """Where a method is to be found, and what goes in and comes out."""

    path: str
    request: str
    answer: str
    in_stream: bool = False


_ROUTES: Final = {
    "/etcdserverpb.KV/Range": _Route("kv/range", "RangeRequest", "RangeResponse"),
    "/etcdserverpb.KV/Put": _Route("kv/put", "PutRequest", "PutResponse"),
    "/etcdserverpb.KV/DeleteRange": _Route("kv/deleterange", "DeleteRangeRequest", "DeleteRangeResponse"),
    "/etcdserverpb.KV/Txn": _Route("kv/txn", "TxnRequest", "TxnResponse"),
    "/etcdserverpb.KV/Compact": _Route("kv/compaction", "CompactionRequest", "CompactionResponse"),
    "/etcdserverpb.Lease/LeaseGrant": _Route("lease/grant", "LeaseGrantRequest", "LeaseGrantResponse"),
    "/etcdserverpb.Lease/LeaseRevoke": _Route("lease/revoke", "LeaseRevokeRequest", "LeaseRevokeResponse"),
    _KEEP_ALIVE: _Route("lease/keepalive", "LeaseKeepAliveRequest", "LeaseKeepAliveResponse", in_stream=True),
    "/etcdserverpb.Lease/LeaseTimeToLive": _Route(
        "lease/timetolive", "LeaseTimeToLiveRequest", "LeaseTimeToLiveResponse"
    ),
    "/etcdserverpb.Lease/LeaseLeases": _Route("lease/leases", "LeaseLeasesRequest", "LeaseLeasesResponse"),
    "/etcdserverpb.Maintenance/Status": _Route("maintenance/status", "StatusRequest", "StatusResponse"),
    "/etcdserverpb.Auth/Authenticate": _Route(
        "auth/authenticate", "AuthenticateRequest", "AuthenticateResponse"
    ),
}


class GatewayChannel(Channel):
    """
    The gateway of one member.

    Args:
        endpoint: Where it is.
        dial_timeout: Seconds that one attempt to connect may take.
        tls: Certificates, read now; None: plain text.

    Raises:
        OSError: a file of certificates can not be read.
    """

    def __init__(self, endpoint: Endpoint, *, dial_timeout: float, tls: TlsConfig | None) -> None:
        self._host = endpoint.host
        self._port = endpoint.port
        self._protocol = "http" if tls is None else "https"
        self._dial_timeout = dial_timeout
        self._home = Home()
        self._closed = False
        self._under_way: set[Call] = set()
        self._calls = trio.CapacityLimiter(_CALLS)
        self._renewals = trio.CapacityLimiter(_RENEWALS)
        context = None if tls is None else tls.context("http/1.1")
        server_name = None if tls is None else tls.server_name
        self._session = requests.Session()
        # Nothing of the environment: neither proxies nor passwords nor certificates.
        self._session.trust_env = False
        self._session.mount(
            f"{self._protocol}://", BreakableAdapter(context, server_name, most=_CALLS + _RENEWALS)
        )
        self._api_path: str | None = None
        self._caller = Caller(endpoint, dial_timeout=dial_timeout, tls=tls)

    async def unary(
        self, method: str, request: bytes, /, *, time_limit: float, metadata: Metadata = ()
    ) -> bytes:
        """Implement `Channel.unary`."""
        self._check_usable()
        route = _ROUTES[method]
        headers = _headers(metadata) | {"Grpc-Timeout": timeout_text(time_limit)}

        def post(call: Call) -> bytes:
            self._discover(call)
            client = self._client(time_limit)
            url, body = client.get_url(route.path), to_json(route.request, request)
            document = client.post(url, data=body, headers=headers, allow_redirects=False)
            return from_json(route.answer, unwrapped(document) if route.in_stream else document)

        limiter = self._renewals if method == _KEEP_ALIVE else self._calls
        return await self._in_thread(post, time_limit, limiter)

    @asynccontextmanager
    async def stream(self, method: str, /, *, metadata: Metadata = ()) -> AsyncGenerator[ByteStream]:
        """Implement `Channel.stream`, for watches."""
        assert method == _WATCH
        self._check_usable()
        if self._api_path is None:
            await self._in_thread(self._discover, 2 * self._dial_timeout, self._calls)
        path = f"{self._api_path}watch"
        async with open_background() as background:
            stream = GatewayWatchStream(background, self._caller, path, _headers(metadata))
            background.start_soon(stream.keep_pinging)
            yield stream

    async def aclose(self) -> None:
        """Implement `Channel.aclose`."""
        if not self._home.is_here:
            return
        self._closed = True
        for call in tuple(self._under_way):
            call.break_off()
        self._session.close()
        # A thread that looks up a name can not be hurried.
        while self._calls.borrowed_tokens or self._renewals.borrowed_tokens:  # noqa: ASYNC110 - no event tells
            await trio.sleep(0.01)

    def _check_usable(self) -> None:
        self._home.check()
        if self._closed:
            raise trio.ClosedResourceError("this connection to etcd was closed")

    # ── in threads ──────────────────────────────────────────────────────────────────────────────

    async def _in_thread(
        self, function: Callable[[Call], T], time_limit: float, limiter: trio.CapacityLimiter
    ) -> T:
        call = Call()
        self._under_way.add(call)
        try:
            with trio.move_on_after(time_limit):
                return await trio.to_thread.run_sync(
                    partial(_run, function, call), abandon_on_cancel=True, limiter=limiter
                )
            call.break_off()
        except trio.Cancelled:
            call.break_off()
            raise
        finally:
            self._under_way.discard(call)
        raise ChannelError(StatusCode.DEADLINE_EXCEEDED, "no answer in time", never_sent=not call.sent)

    def _client(self, time_limit: float) -> Etcd3Client:
        timeout: Any = (min(self._dial_timeout, _LONGEST_SECONDS), min(time_limit, _LONGEST_SECONDS))
        return Etcd3Client(
            self._host,
            self._port,
            self._protocol,
            timeout=timeout,
            api_path=self._api_path,
            session=self._session,
        )

    def _discover(self, call: Call) -> None:
        if self._api_path is None:
            call.asks = False
            try:
                self._api_path = self._client(self._dial_timeout).api_path
            except (AttributeError, TypeError) as error:
                raise ChannelError(
                    StatusCode.INTERNAL, f"not etcd's version: {error}", never_sent=True
                ) from error
            call.asks = True


def _run(function: Callable[[Call], T], call: Call) -> T:
    take_part(call)
    try:
        return function(call)
    except Etcd3Exception as error:
        raise _failed(error, call) from error
    except (OSError, ValueError) as error:  # all that `requests` raises, and urllib3 of names that are none
        raise _broken(error, call) from error


def _headers(metadata: Metadata) -> dict[str, str]:
    return {"Content-Type": "application/json"} | {f"Grpc-Metadata-{name}": value for name, value in metadata}


_CODES_OF_HTTP: Final[dict[type[Etcd3Exception], StatusCode]] = {
    ConnectionFailedError: StatusCode.UNAVAILABLE,
    ConnectionTimeoutError: StatusCode.UNAVAILABLE,
}


def _failed(error: Etcd3Exception, call: Call) -> ChannelError:
    cause = error.__context__
    if isinstance(cause, OSError):
        return _broken(cause, call)
    code = _CODES_OF_HTTP.get(type(error), StatusCode.UNKNOWN)
    failed = failure(error.detail_text or "", code, reason=str(error))
    failed.never_sent = not call.sent
    return failed


def _broken(error: Exception, call: Call) -> ChannelError:
    code = StatusCode.DEADLINE_EXCEEDED if isinstance(error, requests.Timeout) else StatusCode.UNAVAILABLE
    return ChannelError(code, str(error), never_sent=not call.sent)
