"""
Connections of the `requests` package that can be broken off while a thread is waiting for their answers.

A thread that waits for an answer can not be interrupted, but what it waits for can be ended: its connection is
shut down under it. So a call that nobody waits for any more keeps no thread.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import requests.adapters
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

if TYPE_CHECKING:
    from ssl import SSLContext

_HTTPAdapter: Any = requests.adapters.HTTPAdapter
"""It comes without type information."""


class Call:
    """
    One unary call in its thread.

    Attributes:
        sent: Some of the request has left, or may have.
        asks: What leaves is the request itself, and not a question that comes before it.
    """

    def __init__(self) -> None:
        self.sent = False
        self.asks = True
        self._lock = threading.Lock()
        self._connection: Any = None
        self._broken_off = False

    def use(self, connection: Any) -> None:
        """Note on which connection it is."""
        self._connection = connection
        connection.call = self
        self._go_on()

    def begin_to_send(self) -> None:
        """Note that something leaves from now on."""
        with self._lock:
            self._go_on()
            self.sent = self.asks

    def break_off(self) -> None:
        """End it, and its thread soon after; from the Trio thread."""
        with self._lock:
            self._broken_off = True
        connection = self._connection
        # Race: an answer was read, and the connection is another call's already. (If it becomes that after this
        # look, the other call is broken off, too: it fails as if the network had broken.)
        if connection is None or connection.call is not self or connection.sock is None:
            return
        with suppress(OSError):
            # Not the method of an SSL socket, which takes its state from under the thread that reads.
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def _go_on(self) -> None:
        if self._broken_off:
            raise ConnectionAbortedError("this call was broken off")


_thread = threading.local()


def take_part(call: Call) -> None:
    """Note that this thread works for `call` from now on."""
    _thread.call = call


class _Breakable:
    """Tells the thread's `Call` which connection it is on, and when the request leaves."""

    call: Call
    sock: Any

    def connect(self) -> None:
        call: Call = _thread.call
        call.use(self)
        super().connect()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] - a mixin
        call.use(self)

    def send(self, data: Any) -> None:
        call: Call = _thread.call
        call.use(self)
        if self.sock is None:
            self.connect()
        call.begin_to_send()
        super().send(data)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] - a mixin


class _PlainConnection(_Breakable, HTTPConnection):
    pass


class _SecureConnection(_Breakable, HTTPSConnection):
    pass


class _PlainPool(HTTPConnectionPool):
    ConnectionCls: Any = _PlainConnection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls: Any = _SecureConnection


class BreakableAdapter(_HTTPAdapter):
    """Makes such connections, secured by our own context and nothing else."""

    def __init__(self, context: SSLContext | None, server_name: str | None, *, most: int) -> None:
        self._tls = {"ssl_context": context, "server_hostname": server_name, "assert_hostname": server_name}
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            pool_connections=1, pool_maxsize=most
        )

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Override requests' own."""
        if self._tls["ssl_context"] is not None:
            options |= {name: value for name, value in self._tls.items() if value is not None}
        super().init_poolmanager(*args, **options)  # pyright: ignore[reportUnknownMemberType]
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}

    def cert_verify(self, conn: Any, *_: object) -> None:
        """Override requests' own, which would trust its own list of authorities, too."""
        conn.cert_reqs = "CERT_REQUIRED"
