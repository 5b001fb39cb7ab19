"""
One call on an HTTP/2 connection: gRPC's framing of messages, and both of its flow-control windows.

Flow control of what comes in: the window is topped up as data arrives, except for whole messages that nobody
has taken yet. So a message of any size passes, and a slow reader holds up its own stream only.

Source: gRPC `doc/PROTOCOL-HTTP2.md` ("Length-Prefixed-Message"), RFC 9113, 5.2.
"""

from __future__ import annotations

from collections import deque
from typing import Final

STREAM_WINDOW: Final = 4 * 1024 * 1024
MESSAGE_HEAD_BYTES: Final = 5
_LONGEST_MESSAGE: Final = 2**32 - 1


class BadMessageError(Exception):
    """The bytes of an answer are no gRPC messages that we can read."""


class Stream:
    """
    What a connection knows of one call.

    Attributes:
        headers: The request's block of headers.
        id: The stream's number; 0 while the call waits for the server to allow another stream.
        send_window: Bytes that the server is ready to take.
        receive_window: Bytes that the server may still send.
        held: Bytes of whole messages that were not taken yet.
        outgoing: What was not sent yet.
        ends: The last of `outgoing` is the end of what we say.
        handed_over: All of the request was given to the network.
        is_answered: The answer's headers have come.
        is_over: There is nothing more to come.
    """

    __slots__ = (
        "_partial",
        "ends",
        "handed_over",
        "headers",
        "held",
        "id",
        "is_answered",
        "is_over",
        "outgoing",
        "receive_window",
        "send_window",
    )

    def __init__(self, headers: bytes, send_window: int) -> None:
        self.headers = headers
        self.id = 0
        self.send_window = send_window
        self.receive_window = STREAM_WINDOW
        self.held = 0
        self.outgoing: deque[bytes | memoryview] = deque()
        self.ends = False
        self.handed_over = False
        self.is_answered = False
        self.is_over = False
        self._partial = bytearray()

    def write(self, message: bytes) -> None:
        """
        Add a message to what has to be sent.

        Raises:
            ValueError: it is longer than gRPC can say.
        """
        if len(message) > _LONGEST_MESSAGE:
            raise ValueError(f"a message of {len(message)} bytes")
        self.outgoing.append(b"\0" + len(message).to_bytes(4, "big") + message)

    def take_piece(self, room: int) -> bytes:
        """Take the next bytes to be sent, at most `room`."""
        piece = self.outgoing.popleft()
        if len(piece) > room:
            view = memoryview(piece)
            self.outgoing.appendleft(view[room:])
            piece = view[:room]
        return piece if isinstance(piece, bytes) else bytes(piece)

    def read(self, data: bytes) -> list[bytes]:
        """
        Take bytes of the answer; return the messages that are complete now.

        Raises:
            BadMessageError: a message is compressed, which we did not offer.
        """
        # Nearly always one frame is one message.
        if (
            not self._partial
            and len(data) >= MESSAGE_HEAD_BYTES
            and data[0] == 0
            and int.from_bytes(data[1:5], "big") == len(data) - MESSAGE_HEAD_BYTES
        ):
            self.held += len(data)
            return [data[MESSAGE_HEAD_BYTES:]]
        self._partial += data
        return self._complete_messages()

    @property
    def is_complete(self) -> bool:
        """Whether every byte of the request was put among what is to be written, or is there already."""
        return self.id > 0 and self.ends and not self.outgoing

    @property
    def has_partial_message(self) -> bool:
        """Whether the answer stands within a message."""
        return bool(self._partial)

    def due_credit(self) -> int:
        """Return by how much to widen the window now, if it is worth a frame, and count it as done."""
        credit = STREAM_WINDOW - self.receive_window - self.held
        if credit < STREAM_WINDOW // 2:
            return 0
        self.receive_window += credit
        return credit

    def _complete_messages(self) -> list[bytes]:
        messages: list[bytes] = []
        partial = self._partial
        at = 0
        while len(partial) - at >= MESSAGE_HEAD_BYTES:
            if partial[at] != 0:
                raise BadMessageError(f"the server sent a message with the compression flag {partial[at]}")
            begin = at + MESSAGE_HEAD_BYTES
            end = begin + int.from_bytes(partial[at + 1 : begin], "big")
            if end > len(partial):
                break
            messages.append(bytes(memoryview(partial)[begin:end]))
            at = end
        del partial[:at]
        self.held += sum(map(len, messages)) + len(messages) * MESSAGE_HEAD_BYTES
        return messages
