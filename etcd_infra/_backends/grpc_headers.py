"""
gRPC's headers: those of a request as an HPACK block, those of an answer as the few facts that count.

No dynamic table is used in either direction, so that a block's bytes mean the same each time and can be
remembered: a unary call of etcd costs two look-ups instead of two decodings.

Source: gRPC `doc/PROTOCOL-HTTP2.md` and `doc/http-grpc-status-mapping.md`, RFC 7541.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import unquote

from hpack import Decoder, Encoder, HPACKError

from etcd_infra._backends.status import StatusCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from etcd_infra._backends.channel import Metadata

HEADER_LIST_LIMIT: Final = 64 * 1024
_MEMORY: Final = 256
_PREFIX_LIMIT: Final = 0x7F
_REMEMBERED_BYTES: Final = 1024
_LONGEST_TIMEOUT: Final = 99_999_999
_HTTP_OK: Final = 200
_HTTP_INFORMATIONAL: Final = range(100, 200)

_STATUS_OF_HTTP: Final[Mapping[int, StatusCode]] = {
    400: StatusCode.INTERNAL,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.UNIMPLEMENTED,
    429: StatusCode.UNAVAILABLE,
    502: StatusCode.UNAVAILABLE,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.UNAVAILABLE,
}


class BadHeadersError(Exception):
    """The bytes are no header block, or one that is too long."""


class Status(NamedTuple):
    """How a call ended, in gRPC's words."""

    code: int
    details: str


class AnswerHeaders(NamedTuple):
    """
    What a block of headers says, be it at the beginning of an answer or at its end.

    Attributes:
        informational: An HTTP status of 1xx: the answer's own headers are still to come.
        refusal: Why these can not be the first headers of a gRPC answer; None if they can.
        status: gRPC's status, if it is there.
    """

    informational: bool
    refusal: Status | None
    status: Status | None


class RequestHeaders:
    """Header blocks of requests to one authority."""

    def __init__(self, authority: str, *, scheme: str = "http") -> None:
        self._authority = authority
        self._scheme = scheme
        self._blocks: dict[tuple[str, float | None, Metadata], bytes] = {}

    def block(self, method: str, time_limit: float | None, metadata: Metadata) -> bytes:
        """
        Return the block for a call.

        Args:
            method: "/package.Service/Method".
            time_limit: Seconds that the server may take; None: for ever.
            metadata: Headers, in lower case.
        """
        key = method, time_limit, metadata
        block = self._blocks.get(key)
        if block is None:
            if len(self._blocks) >= _MEMORY:
                self._blocks.clear()
            block = self._blocks[key] = self._encode(method, time_limit, metadata)
        return block

    def _encode(self, method: str, time_limit: float | None, metadata: Metadata) -> bytes:
        headers = [
            (":method", "POST"),
            (":scheme", self._scheme),
            (":path", method),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "etcd-infra"),
        ]
        if time_limit is not None:
            headers.append(("grpc-timeout", timeout_text(time_limit)))
        # "Sensitive" fields stay out of every table on the way.
        block = Encoder().encode((name, value, True) for name, value in headers)
        # Not by the package: it logs what it encodes, and a token is a secret.
        return block + b"".join(_never_indexed(name) + _text(value) for name, value in metadata)


def _never_indexed(name: str) -> bytes:
    # RFC 7541, 6.2.3: a literal with a new name, to be kept out of every table.
    return b"\x10" + _text(name)


def _text(text: str) -> bytes:
    # RFC 7541, 5.2 and 5.1: a length with a prefix of seven bits, and the octets as they are.
    octets = text.encode()
    if len(octets) < _PREFIX_LIMIT:
        return bytes([len(octets)]) + octets
    length, rest = bytearray([_PREFIX_LIMIT]), len(octets) - _PREFIX_LIMIT
    while rest >= 0x80:  # noqa: PLR2004
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*length, rest]) + octets


def timeout_text(seconds: float) -> str:
    """Write a time limit as gRPC does: at most eight digits and a unit, and so three years at most."""
    seconds = min(seconds, _LONGEST_TIMEOUT)
    milliseconds = max(1, ceil(seconds * 1000))
    return f"{milliseconds}m" if milliseconds <= _LONGEST_TIMEOUT else f"{ceil(seconds)}S"


class AnswerHeadersDecoder:
    """Reads the header blocks of one connection; the peer was told to use no dynamic table."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=HEADER_LIST_LIMIT)
        self._decoder.header_table_size = 0
        self._decoder.max_allowed_table_size = 0
        self._known: dict[bytes, AnswerHeaders] = {}

    def decode(self, block: bytes) -> AnswerHeaders:
        """
        Read a block.

        Raises:
            BadHeadersError: it can not be read, or is too long; the connection is of no use any more.
        """
        known = self._known.get(block)
        if known is None:
            known = _read(self._fields(block))
            if len(block) <= _REMEMBERED_BYTES:
                if len(self._known) >= _MEMORY:
                    self._known.clear()
                self._known[block] = known
        return known

    def _fields(self, block: bytes) -> dict[bytes, bytes]:
        try:
            return {bytes(name): bytes(value) for name, value in self._decoder.decode(block, raw=True)}
        except HPACKError as error:
            # Not the package's own text: it repeats the block, which may be long.
            raise BadHeadersError(f"no block of headers ({type(error).__name__})") from None


def _read(fields: dict[bytes, bytes]) -> AnswerHeaders:
    http = _number(fields.get(b":status", b""))
    status = None
    if b"grpc-status" in fields:
        code = _number(fields[b"grpc-status"])
        details = unquote(fields.get(b"grpc-message", b"").decode("ascii", "replace"), errors="replace")
        status = Status(StatusCode.UNKNOWN if code is None else code, details)
    return AnswerHeaders(http in _HTTP_INFORMATIONAL, _refusal(http, fields), status)


def _refusal(http: int | None, fields: dict[bytes, bytes]) -> Status | None:
    if http is None:
        return Status(StatusCode.INTERNAL, "an answer without an HTTP status")
    if http != _HTTP_OK:
        return Status(
            _STATUS_OF_HTTP.get(http, StatusCode.UNKNOWN), f"HTTP status {http} instead of a gRPC answer"
        )
    content = fields.get(b"content-type", b"")
    if content != b"application/grpc" and not content.startswith((b"application/grpc+", b"application/grpc;")):
        return Status(StatusCode.UNKNOWN, f"an answer of type {content[:100]!r} instead of gRPC")
    if fields.get(b"grpc-encoding", b"identity") != b"identity":
        return Status(StatusCode.INTERNAL, f"an answer in the encoding {fields[b'grpc-encoding'][:100]!r}")
    return None


def _number(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) <= 3 else None  # noqa: PLR2004 - both statuses are short
