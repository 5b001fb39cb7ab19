"""A TCP connection whose ends are both in the test's hands."""

from __future__ import annotations

import socket

import trio

from etcd_infra._backends.http2_socket import TcpStream


async def tcp_pair(*, buffer_bytes=None):
    """Connect two streams over the loopback, both ours; the system buffers little more than `buffer_bytes`."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    if buffer_bytes is not None:
        # What is accepted inherits it.
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    async with listener:
        ours = await trio.open_tcp_stream(*listener.socket.getsockname())
        theirs = await listener.accept()
    if buffer_bytes is not None:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    return TcpStream(ours), TcpStream(theirs)
