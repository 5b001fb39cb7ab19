"""
The least that one caller can cost in Python: our protocol core over a blocking socket, without Trio, threads or errors.

It is no road, since it serves one call at a time and can not be cancelled; it tells what the roads add.
"""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

from common import Race

from etcd_infra._backends import wire
from etcd_infra._backends.grpc_headers import RequestHeaders
from etcd_infra._backends.http2_protocol import Http2Protocol, StreamEnded
from etcd_infra._backends.status import StatusCode
from etcd_infra.abc import KeyRange, Put, Range


def call(connection, protocol, headers, request):
    protocol.call(headers, request)
    connection.sendall(protocol.take())
    while True:
        for event in protocol.receive(connection.recv(65_536)):
            if isinstance(event, StreamEnded):
                assert event.code == StatusCode.OK, event
                return


def main():
    race = Race()
    url = urlsplit(race.endpoint)
    headers = RequestHeaders(url.netloc)
    protocol = Http2Protocol()
    key = f"bench/{race.run_id}".encode()
    put = headers.block("/etcdserverpb.KV/Put", 30.0, wire.HAS_LEADER), wire.encode_put(Put(key, b"y" * 100))
    get = (
        headers.block("/etcdserverpb.KV/Range", 30.0, wire.HAS_LEADER),
        wire.encode_range(Range(KeyRange.one(key))),
    )
    with socket.create_connection((url.hostname, url.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(protocol.take())
        call(connection, protocol, *put)
        race.start()
        while race.goes_on():
            asked_at = time.perf_counter()
            call(connection, protocol, *(get if race.mode == "get" else put))
            race.done(0, asked_at)
        race.report()


main()
