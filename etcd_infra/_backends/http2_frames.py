"""
HTTP/2 frames as bytes: the numbers of RFC 9113, and builders for the frames that a gRPC client sends.

Source: RFC 9113, sections 4, 6 and 7.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES: Final = 9
DEFAULT_WINDOW: Final = 65_535
LARGEST_WINDOW: Final = 2**31 - 1
LARGEST_STREAM_ID: Final = 2**31 - 1
SMALLEST_MAX_FRAME: Final = 16_384
LARGEST_MAX_FRAME: Final = 2**24 - 1

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6


class ErrorCode(IntEnum):
    """Why a stream or a connection was ended."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


def error_name(code: int) -> str:
    """Return an error code's name, or its number if it has none."""
    return ErrorCode(code).name if code in _CODES else f"error {code}"


_CODES: Final = frozenset(ErrorCode)
_LONGEST_FAREWELL: Final = 200
# Length and type (24 and 8 bits), flags, stream.
HEAD: Final = struct.Struct(">IBI")
_U32: Final = struct.Struct(">I")
_SETTING: Final = struct.Struct(">HI")


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """Build any frame."""
    return HEAD.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def header_frames(stream_id: int, block: bytes, max_frame: int) -> bytes:
    """Build a HEADERS frame, and CONTINUATION frames if the block is too long for one."""
    if len(block) <= max_frame:
        return frame(HEADERS, END_HEADERS, stream_id, block)
    pieces = [block[at : at + max_frame] for at in range(0, len(block), max_frame)]
    first, *middle, last = pieces
    return b"".join(
        (
            frame(HEADERS, 0, stream_id, first),
            *(frame(CONTINUATION, 0, stream_id, piece) for piece in middle),
            frame(CONTINUATION, END_HEADERS, stream_id, last),
        )
    )


def settings(values: Mapping[int, int]) -> bytes:
    """Build a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in values.items()))


def settings_ack() -> bytes:
    """Build the acknowledgement of a SETTINGS frame."""
    return frame(SETTINGS, ACK, 0, b"")


def window_update(stream_id: int, increment: int) -> bytes:
    """Build a WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, _U32.pack(increment))


def rst_stream(stream_id: int, code: int) -> bytes:
    """Build a RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, _U32.pack(code))


def ping(payload: bytes, *, ack: bool = False) -> bytes:
    """Build a PING frame with 8 bytes of payload."""
    return frame(PING, ACK if ack else 0, 0, payload)


def goaway(code: int, details: str) -> bytes:
    """Build a GOAWAY frame; a client has accepted no stream of the server's."""
    return frame(GOAWAY, 0, 0, _U32.pack(0) + _U32.pack(code) + details.encode()[:_LONGEST_FAREWELL])


def read_u32(payload: bytes, at: int = 0) -> int:
    """Read an unsigned number of four bytes."""
    return _U32.unpack_from(payload, at)[0]


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Read the pairs of a SETTINGS frame, in their order; later ones count."""
    return list(_SETTING.iter_unpack(payload))
