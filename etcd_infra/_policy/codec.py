"""How values become bytes and bytes values: a protocol, and canonical JSON."""

from __future__ import annotations

from typing import Any, Final, Protocol

import msgspec


class Codec(Protocol):
    """
    Turns values into bytes and back; for `open_coordinator(codec=…)`.

    Equal values must become equal bytes. Values of type bytes never get here: they are stored as they are.
    """

    def encode(self, value: Any, /) -> bytes:
        """
        Encode a value.

        Raises:
            TypeError, ValueError: it can not be encoded, or would not be the same when decoded.
        """
        ...

    def decode(self, data: bytes, type: Any, /) -> Any:  # noqa: A002 - what it is
        """
        Decode what `encode` made, as a value of `type`; `Any` for whatever it is.

        Raises:
            ValueError: these bytes are no such value.
        """
        ...


class CanonicalJson:
    """
    JSON with sorted keys and without spaces: equal values are equal bytes, and `etcdctl` can read them.

    Knows what msgspec knows: builtins, dataclasses, `msgspec.Struct`, enums, times, UUIDs, Decimals …
    """

    def encode(self, value: Any, /) -> bytes:
        """
        See `Codec`.

        Raises:
            TypeError: a part of it has no form in JSON.
            ValueError: it holds NaN or an infinity, contains itself, or has a lone surrogate.
        """
        try:
            encoded = _encode(value)
            # JSON has no NaN: msgspec writes null, and the number would be gone.
            if b"null" in encoded and _has_no_number(msgspec.to_builtins(value, str_keys=True)):
                msg = f"JSON has neither NaN nor infinities: {str(value)[:200]}"
                raise ValueError(msg)
        except RecursionError:
            msg = f"a value that contains itself, or is nested too deeply: {type(value).__name__}"
            raise ValueError(msg) from None
        return encoded

    def decode(self, data: bytes, type: Any, /) -> Any:  # noqa: A002
        """See `Codec`."""
        return msgspec.json.decode(data, type=type)


JSON: Final = CanonicalJson()


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, order="sorted")
    except TypeError:
        # Only keys that are strings can be sorted: ints, UUIDs, dates become strings first.
        return msgspec.json.encode(msgspec.to_builtins(value, str_keys=True), order="sorted")


def _has_no_number(value: Any) -> bool:
    match value:
        case float():
            return value - value != 0
        case dict():
            return any(map(_has_no_number, value.values()))  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        case list() | tuple():
            return any(map(_has_no_number, value))  # pyright: ignore[reportUnknownArgumentType]
        case _:
            return False
