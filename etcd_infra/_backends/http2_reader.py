"""
Bytes into HTTP/2 frames: cut anywhere, with blocks of headers put together again.

Source: RFC 9113, 4.1, 4.3, 5.5, 6.2 and 6.10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from etcd_infra._backends import http2_frames as h2
from etcd_infra._backends.http2_frames import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterator

# What a peer may make us keep of a block of headers that does not end.
_HEADER_BLOCK_LIMIT: Final = 128 * 1024
_CONTINUATION_LIMIT: Final = 64
_PRIORITY_BYTES: Final = 5
_BLOCK_FLAGS: Final = h2.END_HEADERS | h2.PADDED | h2.HAS_PRIORITY


class ConnectionFaultError(Exception):
    """The peer broke the protocol; the connection is of no use any more."""

    def __init__(self, code: ErrorCode, details: str) -> None:
        super().__init__(details)
        self.code = code


# A frame as it came: its type, known or not, but never CONTINUATION; its flags, of HEADERS those of its first
# part; its stream, 0 for the connection; its payload. A HEADERS frame carries its whole block, without padding
# and priority. A bare tuple, since there are three to each answer.
Frame: TypeAlias = tuple[int, int, int, bytes]


class _Block:
    """A block of headers whose end has not come yet."""

    def __init__(self, flags: int, stream_id: int, beginning: bytes) -> None:
        self.flags = flags
        self.stream_id = stream_id
        self.content = bytearray(beginning)
        self.continuations = 0


class FrameReader:
    """Reads what one server sends."""

    def __init__(self) -> None:
        self._rest = b""
        self._block: _Block | None = None
        self._has_begun = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """
        Take bytes; yield the frames that are complete now.

        Raises:
            ConnectionFaultError: what comes next is no frame of a server.
        """
        data = self._rest + data if self._rest else data
        at, end = 0, len(data)
        while end - at >= h2.HEAD_BYTES:
            length_and_kind, flags, stream_id = h2.HEAD.unpack_from(data, at)
            length, kind = length_and_kind >> 8, length_and_kind & 0xFF
            if length > h2.SMALLEST_MAX_FRAME:
                raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            begin = at + h2.HEAD_BYTES
            if end - begin < length:
                break
            at = begin + length
            frame = kind, flags, stream_id & h2.LARGEST_STREAM_ID, data[begin:at]
            is_whole = kind == h2.DATA or (kind == h2.HEADERS and flags & _BLOCK_FLAGS == h2.END_HEADERS)
            if not is_whole or self._block is not None or not self._has_begun:
                frame = self._whole(frame)
            if frame is not None:
                yield frame
        self._rest = data[at:]

    def _whole(self, frame: Frame) -> Frame | None:
        """Return what is to be handled now; None while a block of headers goes on."""
        kind, flags, stream_id, payload = frame
        if not self._has_begun and kind != h2.SETTINGS:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "the server did not begin with SETTINGS")
        self._has_begun = True
        block = self._block
        if block is not None:
            if kind != h2.CONTINUATION or stream_id != block.stream_id:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "a block of headers was interrupted")
            return self._continue(block, flags, payload)
        if kind == h2.CONTINUATION:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        if kind != h2.HEADERS or flags & _BLOCK_FLAGS == h2.END_HEADERS:
            return frame
        return self._begin_block(flags, stream_id, payload)

    def _begin_block(self, flags: int, stream_id: int, payload: bytes) -> Frame | None:
        content = unpadded(flags, payload)
        if flags & h2.HAS_PRIORITY:
            if len(content) < _PRIORITY_BYTES:
                raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "HEADERS without room for a priority")
            content = content[_PRIORITY_BYTES:]
        if flags & h2.END_HEADERS:
            return h2.HEADERS, flags, stream_id, content
        self._block = _Block(flags, stream_id, content)
        return None

    def _continue(self, block: _Block, flags: int, payload: bytes) -> Frame | None:
        block.content += payload
        block.continuations += 1
        if len(block.content) > _HEADER_BLOCK_LIMIT or block.continuations > _CONTINUATION_LIMIT:
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "a block of headers without end")
        if not flags & h2.END_HEADERS:
            return None
        self._block = None
        return h2.HEADERS, block.flags, block.stream_id, bytes(block.content)


def unpadded(flags: int, payload: bytes) -> bytes:
    """Return a frame's content without its padding."""
    if not flags & h2.PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]
