"""Headers of requests, as any HPACK decoder reads them, and what is not to be seen of them."""

from __future__ import annotations

import logging

import pytest
from hpack import Decoder, Encoder

from etcd_infra._backends.grpc_headers import AnswerHeadersDecoder, BadHeadersError, RequestHeaders

SECRET = "sEcReT.token-1234567890"


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 300, 16_383, 16_510, 16_511, 60_000])
def test_metadata_of_any_length_arrives(length):
    """A value is what a decoder of others reads, never to be put into a table, whatever its length needs."""
    metadata = (("hasleader", "true"), ("token", "x" * length))
    found = Decoder(max_header_list_size=2**20).decode(RequestHeaders("a:1").block("/p.S/M", None, metadata))
    assert list(metadata) == [tuple(field) for field in found[-2:]]
    assert [False, False] == [field.indexable for field in found[-2:]]


def test_token_is_not_logged(caplog):
    """Neither in clear nor encoded, at any level: what the package encodes, it logs."""
    caplog.set_level(logging.DEBUG)
    RequestHeaders("a:1").block("/p.S/M", 5.0, (("token", SECRET),))
    said = caplog.text
    caplog.clear()
    encoded = Encoder().encode([("x", SECRET, True)], huffman=True).removeprefix(b"\x10\x81")[1:]
    assert SECRET not in said
    assert repr(encoded)[2:-1] not in said


def test_error_does_not_repeat_the_block():
    """A long block that is none makes a short error, in a moment."""
    with pytest.raises(BadHeadersError) as caught:
        AnswerHeadersDecoder().decode(b"\x7f" + b"\xff" * 120_000)
    assert len(str(caught.value)) < 100
