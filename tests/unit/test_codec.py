"""Canonical JSON: equal values are equal bytes, and what can not come back is refused."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcd_infra import JSON, CodecError
from tests.conftest import open_infra


class Order(msgspec.Struct):
    """A typed value."""

    number: int
    paid: bool = False


@dataclasses.dataclass
class Prices:
    """A typed value whose keys are no strings."""

    by_size: dict[int, float]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, b"null"),
        ("", b'""'),
        (7, b"7"),
        (2**70, b"1180591620717411303424"),
        ({"b": 1, "a": [None, True]}, b'{"a":[null,true],"b":1}'),
        (Order(3), b'{"number":3,"paid":false}'),
        (Prices({2: 0.5, 1: 1.5}), b'{"by_size":{"1":1.5,"2":0.5}}'),
        ({"null": "null"}, b'{"null":"null"}'),
        (dt.date(2024, 2, 29), b'"2024-02-29"'),
    ],
)
def test_values_have_one_form(value, text):
    """Values become JSON with sorted keys and without spaces."""
    assert text == JSON.encode(value)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none()
VALUES = st.recursive(
    NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_encoded_comes_back(value):
    """Encoding and decoding gives the value, and the order of a dict's keys does not matter."""
    encoded = JSON.encode(value)
    assert value == JSON.decode(encoded, object)
    if isinstance(value, dict):
        assert encoded == JSON.encode(dict(reversed(value.items())))


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (math.nan, ValueError),
        (math.inf, ValueError),
        ({"a": [1, -math.inf]}, ValueError),
        (Prices({1: math.nan}), ValueError),
        ([None, math.nan], ValueError),
        ("\ud800", ValueError),
        (object(), TypeError),
        ({(1, 2): 3}, TypeError),
        (1j, TypeError),
    ],
)
async def test_values_that_would_not_come_back_are_refused(etcd, autojump_clock, value, error):
    """NaN, infinities, lone surrogates and strange objects are refused before anything is sent."""
    async with open_infra(etcd.node("one")) as infra:
        before = etcd.store.revision
        for writing in (
            infra.state.set("k", value),
            infra.state.compare_and_swap("k", value, expected_version=0),
            infra.state.compare_and_swap("k", 1, expected_value=value),
            infra.state.get_or_set("k", lambda: value),
            infra.state.update("k", lambda _: value),
        ):
            with pytest.raises(error):
                await writing
        assert before == etcd.store.revision


def test_value_that_contains_itself_is_refused():
    """A list that contains itself is a ValueError, not the end of the stack."""
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="contains itself"):
        JSON.encode(endless)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(b"", int), (b"1.5", int), (b"true", int), (b'"1"', int), (b"{", dict), (b"\xff", str), (b"{}", Order)],
)
async def test_stored_bytes_that_do_not_decode(infra, stored, wanted, autojump_clock):
    """What does not decode as the wanted type is a CodecError that carries key and version."""
    version = await infra.state.set("k", stored)
    with pytest.raises(CodecError, match="'k'") as caught:
        await infra.state.get("k", type=wanted)
    assert ("k", version) == (caught.value.key, caught.value.version)


async def test_bytes_are_stored_as_they_are(infra, autojump_clock):
    """A value of type bytes is stored raw, whatever it holds, and read so with type=bytes."""
    for raw in (b"", b"\x00\xff", b"{not json"):
        await infra.state.set("k", raw)
        assert raw == (await infra.backend.get(b"test/state/k")).value
        assert raw == (await infra.state.get("k", type=bytes)).value
        assert raw == (await infra.state.typed(bytes).get("k")).value


async def test_null_is_not_absence(infra, autojump_clock):
    """A key that stores null has an entry, an absent key has none, and both are kept apart by every method."""
    state = infra.state
    version = await state.set("null", None)
    assert None is (await state.get("null")).value
    assert None is await state.get("absent")
    assert version == (await state.get_or_set("null", lambda: 1)).version
    assert not (await state.compare_and_swap("null", 1, expected_version=0)).swapped
    assert not (await state.compare_and_swap("absent", 1, expected_value=None)).swapped
    assert (await state.compare_and_swap("null", 1, expected_value=None)).swapped
    await state.update("null", lambda _: None)
    assert None is (await state.get("null")).value


class Backwards:
    """A codec of one's own: text, backwards."""

    def encode(self, value):
        return str(value)[::-1].encode()

    def decode(self, data, type):  # noqa: A002
        text = data.decode()[::-1]
        return int(text) if type is int else text


async def test_codec_of_ones_own(etcd, autojump_clock):
    """Another codec serves state and counters alike; raw bytes do not pass through it."""
    async with open_infra(etcd.node("one"), codec=Backwards()) as infra:
        await infra.state.set("k", "abc")
        assert b"cba" == (await etcd.get(b"test/state/k")).value
        assert "abc" == (await infra.state.get("k")).value
        await infra.counter("n").add(12)
        assert b"21" == (await etcd.get(b"test/state/n")).value
        assert 12 == (await infra.state.get("n", type=int)).value
        await infra.state.set("raw", b"abc")
        assert b"abc" == (await etcd.get(b"test/state/raw")).value
