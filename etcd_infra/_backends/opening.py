"""
Open a backend over the network: endpoints and options in, a running backend out.

Everything that can be wrong with the arguments is said at the call, before anything is sent. What a transport
can not do yet is refused; nothing is ever silently plain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import urlsplit

import trio

from etcd_infra._backends.endpoints import Endpoint, Endpoints
from etcd_infra._etcd.background import open_background

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._backends.channel import Channel
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.background import Background

DEFAULT_PORT: Final = 2379


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """
    Files for TLS, in PEM.

    Attributes:
        ca: Certificates to trust; None: the system's.
        cert: Our own certificate, for mutual TLS.
        key: Its private key.
        server_name: What the server's certificate must name; None: the endpoint's host.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None


_CLOSE_SECONDS: Final = 5.0


def open_etcd(  # noqa: PLR0913 - all but the first are named
    endpoints: str | Sequence[str],
    *,
    transport: str = "http2",
    tls: TlsConfig | None = None,
    username: str | None = None,
    password: str | None = None,
    dial_timeout: float = 2.0,
    call_timeout: float = 5.0,
) -> AbstractAsyncContextManager[Backend]:
    """
    Open a backend to an etcd cluster; it must be entered.

    Entering sends nothing: connections are made when they are first used, and again whenever they broke.
    Leaving ends every call and every watch.

    Args:
        endpoints: "http://host:port", or several, as a list or separated by commas. A bare "host" or
            "host:port" means http; the port is 2379 if it is left out. IPv6 addresses stand in brackets.
        transport: "http2", on Trio itself, without threads; or "grpcio", by the package of that name.
        tls: Not supported yet by this transport.
        username: Not supported yet by this transport.
        password: Not supported yet by this transport.
        dial_timeout: Seconds for one attempt to connect, more than 0.
        call_timeout: Seconds that a call may take before it fails, more than 0.

    Raises:
        ValueError: an endpoint is malformed, or something is asked for that can not be done.
        TypeError: an endpoint is no str.
    """
    if transport not in _TRANSPORTS:
        raise ValueError(f"this transport is not supported: {transport!r}; choose one of {sorted(_TRANSPORTS)}")
    if tls is not None:
        raise ValueError(f"transport {transport!r} does not support tls yet")
    if username is not None or password is not None:
        raise ValueError(f"transport {transport!r} does not support username and password yet")
    for name, seconds in (("dial_timeout", dial_timeout), ("call_timeout", call_timeout)):
        if not seconds > 0:
            raise ValueError(f"{name} must be more than 0 seconds: {seconds!r}")
    return _opened(parse_endpoints(endpoints), transport, dial_timeout=dial_timeout, call_timeout=call_timeout)


def parse_endpoints(endpoints: str | Sequence[str]) -> tuple[Endpoint, ...]:
    """
    Read what a user or the environment says; each endpoint once, in the order given.

    Raises:
        ValueError: there is none, or one is malformed or asks for https.
        TypeError: one is no str.
    """
    if not isinstance(endpoints, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"endpoints must be a str or a sequence of them, not {endpoints!r}")
    texts = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    for text in texts:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"an endpoint must be a str, not {text!r}")
        if "@" in text:
            # Not shown: it holds a password, whose own commas and slashes would lead any parser astray.
            raise ValueError("an endpoint must not carry a user name or password")
    # "a,,b" and "a," are slips of the pen that leave no doubt; nothing at all is a mistake.
    parts = [part.strip() for text in texts for part in text.split(",")]
    parsed = tuple(dict.fromkeys(_parse_endpoint(part) for part in parts if part))
    if not parsed:
        raise ValueError(f"no endpoint given: {endpoints!r}")
    return parsed


def _parse_endpoint(text: str) -> Endpoint:
    url = urlsplit(text if "://" in text else f"http://{text}")
    if url.scheme == "https":
        raise ValueError(f"https is not supported yet: {text!r}")
    if url.scheme != "http" or url.path not in {"", "/"} or url.query or url.fragment:
        raise ValueError(f"an endpoint must look like http://host:port: {text!r}")
    try:
        port = DEFAULT_PORT if url.port is None else url.port
    except ValueError as error:
        raise ValueError(f"the port of an endpoint must be a number from 1 to 65535: {text!r}") from error
    if not url.hostname or not port or any(char.isspace() for char in text):
        raise ValueError(f"an endpoint must look like http://host:port: {text!r}")
    return Endpoint(url.hostname, port)


def _grpcio() -> _Connect:
    from etcd_infra._backends.grpcio_channel import GrpcioChannel

    return lambda endpoint, dial_timeout, _: GrpcioChannel(str(endpoint), dial_timeout=dial_timeout)


def _http2() -> _Connect:
    from etcd_infra._backends.http2_channel import Http2Channel

    return lambda endpoint, dial_timeout, background: Http2Channel(
        endpoint, dial_timeout=dial_timeout, background=background
    )


_Connect: TypeAlias = "Callable[[Endpoint, float, Background], Channel]"
_TRANSPORTS: Final[Mapping[str, Callable[[], _Connect]]] = {"http2": _http2, "grpcio": _grpcio}


@asynccontextmanager
async def _opened(
    endpoints: tuple[Endpoint, ...], transport: str, *, dial_timeout: float, call_timeout: float
) -> AsyncGenerator[Backend]:
    # The costly imports come now, while nothing is running yet that they could hold up.
    from etcd_infra._backends.rpc import RpcBackend

    connect = _TRANSPORTS[transport]()
    holder: Endpoints | None = None
    try:
        async with open_background() as background:
            holder = Endpoints(endpoints, lambda endpoint: connect(endpoint, dial_timeout, background))
            yield RpcBackend(holder, background, call_timeout=call_timeout, draw=random.Random().random)
    finally:
        if holder is not None:
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await holder.aclose()
