"""TLS: which files, and connections that are secured with what is in them at that moment."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from os import stat_result

_HTTP2: Final = "h2"


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """
    Files for TLS, in PEM; read again for each new connection, so that they may be replaced at any time.

    Attributes:
        ca: Certificates to trust; None: the system's (over grpcio: those that come with the package).
        cert: Our own certificate, for mutual TLS.
        key: Its private key, not encrypted.
        server_name: What the server's certificate must name; None: the endpoint's host.

    Raises:
        ValueError: one of `cert` and `key` is given without the other; or `server_name` is no name of a host.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError(f"a certificate goes with its key: cert={self.cert!r}, key={self.key!r}")
        if self.server_name is not None:
            _check_host(self.server_name)

    @property
    def files(self) -> tuple[str, ...]:
        """Those that are named."""
        return tuple(name for name in (self.ca, self.cert, self.key) if name is not None)

    def stamp(self) -> tuple[object, ...]:
        """
        Return what is another value once a file was replaced.

        Raises:
            OSError: one is not there.
        """
        return tuple(_identity(Path(name).stat()) for name in self.files)

    def context(self, protocol: str = _HTTP2) -> ssl.SSLContext:
        """
        Read the files.

        Args:
            protocol: What to speak over TLS, by its name in ALPN.

        Raises:
            OSError: one can not be read, or does not hold what it should (`ssl.SSLError`).
        """
        context = ssl.create_default_context(cafile=self.ca)
        if self.cert is not None:
            # Without a password, so that nobody is asked for one on the terminal.
            context.load_cert_chain(self.cert, self.key, password="")
        context.set_alpn_protocols([protocol])
        return context


def check_readable(tls: TlsConfig) -> None:
    """
    Refuse files that are of no use.

    Raises:
        ValueError: one can not be read, or does not hold what it should.
    """
    try:
        tls.context()
    except OSError as error:
        raise ValueError(f"the files of {tls} can not be used: {error}") from error


async def secured(
    transport: trio.abc.Stream, tls: TlsConfig, host: str, protocol: str = _HTTP2
) -> trio.abc.Stream:
    """
    Secure a connection, and agree on what to speak; close it if that fails.

    Raises:
        OSError, trio.BrokenResourceError: the files, the server's certificate or the server are no good.

    Cancellation:
        The connection is closed.
    """
    try:
        stream = trio.SSLStream(
            transport, tls.context(protocol), server_hostname=tls.server_name or host, https_compatible=True
        )
        await stream.do_handshake()
        _check_protocol(stream, protocol)
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
    return stream


def _check_host(name: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=name)
    except (ValueError, TypeError) as error:
        # TypeError: a NUL byte.
        raise ValueError(f"server_name={name!r} is no name of a host: {error}") from error


def _check_protocol(stream: trio.SSLStream[trio.abc.Stream], protocol: str) -> None:
    agreed = stream.selected_alpn_protocol()
    if agreed != protocol and (agreed is not None or protocol == _HTTP2):
        raise ssl.SSLError(f"the server does not speak {protocol} over TLS")


def _identity(found: stat_result) -> tuple[int, ...]:
    return found.st_mtime_ns, found.st_size, found.st_ino
