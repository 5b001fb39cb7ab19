"""
Between the protocol's messages and the JSON of etcd's HTTP gateway: no I/O, no Trio.

Requests are written from whole messages, never by hand: the gateway ignores a field that it does not know, so
that a slip of the pen would make another request of it. Answers are parsed, never matched as text: builds of
one version of etcd differ in blanks, in field names of errors and in HTTP status.

Source: protobuf's JSON mapping; etcd `api/etcdserverpb/gw`, in which grpc-gateway's versions 1 and 2 occur.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.status import StatusCode
from etcd_infra._backends.wire_schema import MESSAGES

if TYPE_CHECKING:
    from collections.abc import Iterator

_KINDS: Final = {"PUT": 0, "DELETE": 1}
_SHOWN: Final = 200
_NO_JSON: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)


def to_json(name: str, message: bytes) -> bytes:
    """Write the message of that name as a request's body."""
    return msgspec.json.encode(
        MessageToDict(MESSAGES[name].FromString(message), preserving_proto_field_name=True)
    )


def from_json(name: str, document: Any) -> bytes:
    """
    Make the message of that name of a parsed answer; what is absent is zero, what is unknown is left out.

    Raises:
        ChannelError: it is something else.
    """
    fields = cast("dict[str, Any]", document) if isinstance(document, dict) else None
    try:
        if name == "WatchResponse" and fields:
            _number_kinds(fields)
        message = MESSAGES[name]()
        if fields is not None:
            return ParseDict(fields, message, ignore_unknown_fields=True).SerializeToString()
    except (ParseError, AttributeError, TypeError, KeyError, RecursionError):
        pass
    # What may hold a token is not shown.
    shown = "" if name == "AuthenticateResponse" else f": {_shown(cast('object', document))}"
    raise ChannelError(StatusCode.INTERNAL, f"the answer is no {name}{shown}")


def _number_kinds(answer: dict[str, Any]) -> None:
    for event in answer.get("events") or ():
        if isinstance(kind := event.get("type"), str):
            event["type"] = _KINDS[kind]


def unwrapped(document: object) -> object:
    """
    Return what one document of a stream says.

    Raises:
        ChannelError: the call failed, or the document is no part of a stream.
    """
    fields = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    if "result" in fields:
        return fields["result"]
    raise _etcds_own(fields) or ChannelError(
        StatusCode.INTERNAL, f"no part of a stream: {_shown(cast('object', document))}"
    )


def failure(text: str, otherwise: int, *, reason: str) -> ChannelError:
    """
    Say what an answer means whose HTTP status is not 200.

    Args:
        text: Its body: etcd's own words, or those of somebody in between.
        otherwise: The code if etcd did not write it.
        reason: What the status line says.
    """
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
    except _NO_JSON:
        fields = {}
    found = _etcds_own(fields)
    return found or ChannelError(otherwise, f"HTTP status {reason!r} and not etcd's answer: {text[:_SHOWN]}")


def _etcds_own(fields: dict[str, Any]) -> ChannelError | None:
    """Find code and message: they stand in a stream's answers under "error", in others at the top."""
    error = fields["error"] if isinstance(fields.get("error"), dict) else fields
    code, details = error.get("grpc_code", error.get("code")), error.get("message", error.get("error"))
    if not isinstance(code, int) or not isinstance(details, str):
        return None
    return ChannelError(code, details)


class Documents:
    """The documents of a stream, one per line, from pieces that may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._seen = 0

    def feed(self, piece: bytes) -> Iterator[object]:
        """
        Take in a piece; yield each document that it completes.

        Raises:
            ChannelError: a line is no JSON.
        """
        self._rest += piece
        while (end := self._rest.find(b"\n", self._seen)) >= 0:
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            self._seen = 0
            if line.strip():
                yield _parsed(line)
        self._seen = len(self._rest)

    def finish(self) -> Iterator[object]:
        """
        Take in that nothing follows; yield a last document without an end of line.

        Raises:
            ChannelError: the last line is no JSON: it was cut off.
        """
        if self._rest.strip():
            yield _parsed(bytes(self._rest))
        self._rest.clear()


def _parsed(line: bytes) -> object:
    try:
        return msgspec.json.decode(line)
    except _NO_JSON as error:
        raise ChannelError(StatusCode.INTERNAL, f"a line of {len(line)} bytes that is no JSON") from error


def _shown(document: object) -> str:
    text = repr(document)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
