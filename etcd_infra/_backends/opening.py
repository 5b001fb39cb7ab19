"""
Open a backend over the network: endpoints and options in, a running backend out.

Everything that can be wrong with the arguments is said at the call, before anything is sent. What a transport
can not do yet is refused; nothing is ever silently plain.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

import trio

from etcd_infra._backends.endpoints import Endpoint, Endpoints
from etcd_infra._backends.rotated_channel import RotatedChannel
from etcd_infra._backends.tls import TlsConfig, check_readable
from etcd_infra._etcd.background import open_background

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._backends.channel import Channel
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.background import Background

DEFAULT_PORT: Final = 2379


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
        endpoints: "http://host:port" or "https://host:port", or several, as a list or separated by commas; all
            of one kind. A bare "host" or "host:port" means http, with `tls` https; the port is 2379 if it is
            left out. IPv6 addresses stand in brackets.
        transport: "http2", on Trio itself, without threads; "grpcio", by that package; or "gateway",
            etcd's JSON over HTTP/1.1, for networks where gRPC does not pass.
        tls: Certificates; None: https trusts the system's. Read again for each new connection.
        username: Who we are, if etcd asks for it.
        password: Its proof; a token is got for it when it is needed.
        dial_timeout: Seconds for one attempt to connect, more than 0.
        call_timeout: Seconds that a call may take before it fails, more than 0.

    Raises:
        ValueError: an endpoint is malformed, certificates can not be used, or something is asked for that can
            not be done.
        TypeError: an endpoint is no str, or `tls` no `TlsConfig`.
    """
    if transport not in _TRANSPORTS:
        raise ValueError(f"this transport is not supported: {transport!r}; choose one of {sorted(_TRANSPORTS)}")
    if (username is None) != (password is None):
        raise ValueError("a password goes with a username; only one of them was given")
    for name, seconds in (("dial_timeout", dial_timeout), ("call_timeout", call_timeout)):
        if not seconds > 0:
            raise ValueError(f"{name} must be more than 0 seconds: {seconds!r}")
    parsed = parse_endpoints(endpoints)
    secure = _tls_for(parsed, tls)
    login = None if username is None or password is None else (username, password)
    road = partial(_TRANSPORTS[transport], dial_timeout, secure)
    return _opened(parsed, road, login, call_timeout=call_timeout)


def _tls_for(endpoints: Sequence[Endpoint], tls: TlsConfig | None) -> TlsConfig | None:
    """Say how connections are secured: all alike, and never silently plain."""
    if tls is not None and not isinstance(tls, TlsConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"tls must be a TlsConfig, not {tls!r}")
    said = {endpoint.secure for endpoint in endpoints}
    if tls is None and True not in said:
        return None
    if False in said:
        plain = next(endpoint for endpoint in endpoints if endpoint.secure is False)
        raise ValueError(f"http://{plain} would not be secured, while TLS is asked for")
    tls = tls or TlsConfig()
    check_readable(tls)
    return tls


def environment_options(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """
    Return the options of `open_etcd` that the environment sets: user, password, transport and TLS files.

    Args:
        environment: Where ``ETCD_INFRA_USERNAME``, ``_PASSWORD``, ``_TRANSPORT``, ``_CACERT``, ``_CERT`` and
            ``_KEY`` are looked up; what is empty is not set.

    Raises:
        ValueError: a certificate is named without its key, or the other way round.
    """
    options: dict[str, Any] = {}
    for option in ("username", "password", "transport"):
        if value := environment.get(f"ETCD_INFRA_{option.upper()}"):
            options[option] = value
    files = {
        field: environment.get(f"ETCD_INFRA_{variable}") or None
        for field, variable in (("ca", "CACERT"), ("cert", "CERT"), ("key", "KEY"))
    }
    if any(files.values()):
        options["tls"] = TlsConfig(**files)
    return options


def parse_endpoints(endpoints: str | Sequence[str]) -> tuple[Endpoint, ...]:
    """
    Read what a user or the environment says; each endpoint once, in the order given.

    Raises:
        ValueError: there is none, or one is malformed.
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
    if url.scheme not in {"http", "https"} or url.path not in {"", "/"} or url.query or url.fragment:
        raise ValueError(f"an endpoint must look like http://host:port: {text!r}")
    try:
        port = DEFAULT_PORT if url.port is None else url.port
    except ValueError as error:
        raise ValueError(f"the port of an endpoint must be a number from 1 to 65535: {text!r}") from error
    if not url.hostname or not port or any(char.isspace() for char in text):
        raise ValueError(f"an endpoint must look like http://host:port: {text!r}")
    return Endpoint(url.hostname, port, url.scheme == "https" if "://" in text else None)


def _grpcio(dial_timeout: float, tls: TlsConfig | None) -> _Connect:
    from etcd_infra._backends.grpcio_channel import GrpcioChannel

    def connect(endpoint: Endpoint, background: Background) -> Channel:
        make = partial(GrpcioChannel, str(endpoint), dial_timeout=dial_timeout, tls=tls)
        # grpcio reads certificates once per channel.
        return make() if tls is None else RotatedChannel(make, tls.stamp, background)

    return connect


def _http2(dial_timeout: float, tls: TlsConfig | None) -> _Connect:
    from etcd_infra._backends.http2_channel import Http2Channel

    return lambda endpoint, background: Http2Channel(
        endpoint, dial_timeout=dial_timeout, background=background, tls=tls
    )


def _gateway(dial_timeout: float, tls: TlsConfig | None) -> _Connect:
    from etcd_infra._backends.gateway import GatewayChannel

    def connect(endpoint: Endpoint, background: Background) -> Channel:
        make = partial(GatewayChannel, endpoint, dial_timeout=dial_timeout, tls=tls)
        # Its connections are kept and used again.
        return make() if tls is None else RotatedChannel(make, tls.stamp, background)

    return connect


_Connect: TypeAlias = "Callable[[Endpoint, Background], Channel]"
_TRANSPORTS: Final = {"http2": _http2, "grpcio": _grpcio, "gateway": _gateway}


@asynccontextmanager
async def _opened(
    endpoints: tuple[Endpoint, ...],
    transport: Callable[[], _Connect],
    login: tuple[str, str] | None,
    *,
    call_timeout: float,
) -> AsyncGenerator[Backend]:
    # The costly imports come now, while nothing is running yet that they could hold up.
    from etcd_infra._backends.authentication import TokenChannel, Tokens
    from etcd_infra._backends.rpc import RpcBackend

    connect = transport()
    holder: Endpoints | None = None
    try:
        async with open_background() as background:
            tokens = None if login is None else Tokens(*login, background, time_limit=call_timeout)

            def channel_to(endpoint: Endpoint) -> Channel:
                channel = connect(endpoint, background)
                return channel if tokens is None else TokenChannel(channel, tokens)

            holder = Endpoints(endpoints, channel_to)
            yield RpcBackend(holder, background, call_timeout=call_timeout, draw=random.Random().random)
    finally:
        if holder is not None:
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await holder.aclose()
