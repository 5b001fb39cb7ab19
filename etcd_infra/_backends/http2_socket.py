"""
A TCP connection for HTTP/2: Trio's own stream, with two short cuts to the socket under it.

Why not `trio.SocketStream` alone: it tries to read before it waits, which is in vain each time when one call
follows the other, and it can not write without giving its turn up. Without both a lone call needs a turn of the
loop and two system calls less.
"""

from __future__ import annotations

import socket
from typing import Final

import trio

_READ_BYTES: Final = 256 * 1024


class TcpStream(trio.abc.Stream):
    """
    A connection that can be written to at once.

    Args:
        stream: A connection as Trio opens it; taken over.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = socket.socket(fileno=stream.socket.detach())
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._socket))

    def send_now(self, data: bytes) -> int:
        """Write what the system takes at once; return how much: 0 if something is wrong, as `send_all` says."""
        try:
            return self._socket.send(data)
        except OSError:
            return 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Implement `trio.abc.SendStream.send_all`; a cancellation leaves any part of it written."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Implement `trio.abc.SendStream.wait_send_all_might_not_block`; a cancellation leaves nothing."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Implement `trio.abc.ReceiveStream.receive_some`; a cancellation leaves everything unread."""
        if max_bytes is None and self._socket.fileno() >= 0:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(_READ_BYTES)
            except OSError:
                # Trio's way waits again, or says what is wrong.
                pass
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        """Close the connection; a cancellation leaves it closed, too."""
        await self._stream.aclose()
