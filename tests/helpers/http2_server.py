"""The server's side of HTTP/2, frame by frame: what a test makes it say."""

from __future__ import annotations

from hpack import Encoder

from etcd_infra._backends import http2_frames as h2
from etcd_infra._backends.http2_protocol import Http2Protocol

HEADERS = b"\x83\x86"  # ":method: POST", ":scheme: http"
GREETING = h2.settings({h2.MAX_CONCURRENT_STREAMS: 100})
FIRST = ((":status", "200"), ("content-type", "application/grpc"))
OK = (("grpc-status", "0"), ("grpc-message", ""))


def block(*fields):
    """Encode headers without any table."""
    return Encoder().encode([(name, value, True) for name, value in fields])


def headers(stream_id, *fields, ends=False):
    """Build a HEADERS frame."""
    return h2.frame(h2.HEADERS, h2.END_HEADERS | (h2.END_STREAM if ends else 0), stream_id, block(*fields))


def message(payload):
    """Frame a gRPC message."""
    return b"\0" + len(payload).to_bytes(4, "big") + payload


def data(stream_id, payload, *, ends=False):
    """Build DATA frames, each as long as is allowed."""
    pieces = [payload[at : at + 16_384] for at in range(0, len(payload), 16_384)] or [b""]
    flags = [0] * (len(pieces) - 1) + [h2.END_STREAM if ends else 0]
    return b"".join(
        h2.frame(h2.DATA, flag, stream_id, piece) for flag, piece in zip(flags, pieces, strict=True)
    )


def answer(stream_id, payload):
    """Build everything that an ordinary answer consists of."""
    return headers(stream_id, *FIRST) + data(stream_id, message(payload)) + headers(stream_id, *OK, ends=True)


def greeted(**options):
    """Return a client's protocol whose server has greeted, with nothing left to write."""
    protocol = Http2Protocol(**options)
    protocol.receive(GREETING)
    protocol.take()
    return protocol


def frames(written):
    """Read frames: (kind, flags, stream id, payload)."""
    written = written.removeprefix(h2.PREFACE)
    found = []
    while written:
        length = int.from_bytes(written[:3], "big")
        found.append((written[3], written[4], int.from_bytes(written[5:9], "big"), written[9 : 9 + length]))
        written = written[9 + length :]
    return found
