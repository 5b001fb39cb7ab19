"""The gateway's JSON: what is absent is zero, errors in every shape, and pieces that are cut anywhere."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcd_infra._backends import wire
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.gateway_json import Documents, failure, from_json, to_json, unwrapped
from etcd_infra._backends.status import StatusCode
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    EventKind,
    KeyRange,
    Operator,
    Put,
    Range,
    Target,
    Txn,
    WatchRequest,
)
from etcd_infra.errors import InvalidAnswerError

HEADER = {"header": {"revision": "7", "cluster_id": "18446744073709551615"}}

# ── requests ────────────────────────────────────────────────────────────────────────────────────

KEYS = st.binary(min_size=1, max_size=4)
RANGES = st.builds(KeyRange, KEYS, st.sampled_from([b"", b"\0", b"\xff\xff\xff\xff\xff"]))
COMPARES = st.one_of(
    st.builds(
        Compare,
        st.sampled_from([Target.VERSION, Target.CREATE, Target.MOD, Target.LEASE]),
        st.sampled_from(Operator),
        RANGES,
        st.integers(0, 2**63 - 1),
    ),
    st.builds(Compare, st.just(Target.VALUE), st.sampled_from(Operator), RANGES, st.binary()),
)
OPS = st.one_of(
    st.builds(Put, KEYS, st.binary(), lease=st.integers(0, 2**63 - 1), prev_kv=st.booleans()),
    st.builds(Range, RANGES, limit=st.integers(0, 9), descending=st.booleans(), keys_only=st.booleans()),
    st.builds(DeleteRange, RANGES, prev_kv=st.booleans()),
)
TXNS = st.recursive(
    st.builds(Txn, st.tuples(COMPARES), st.tuples(OPS), st.tuples(OPS)),
    lambda inner: st.builds(Txn, st.tuples(COMPARES), st.tuples(inner, OPS), st.tuples()),
    max_leaves=3,
)


@given(TXNS)
def test_nothing_of_a_txn_is_lost_in_json(request):
    """Keys of any bytes, numbers of 64 bits, compares with 0, nested Txns: all of it comes back the same."""
    message = wire.encode_txn(request)
    document = json.loads(to_json("TxnRequest", message))
    assert message == from_json("TxnRequest", document)


def test_requests_are_written_as_the_gateway_reads_them():
    """Names as in the protocol, bytes in the standard base64 alphabet, long numbers as strings."""
    create = wire.encode_watch_create(WatchRequest(KeyRange.prefix(b"\xfb\xff"), 5, no_put=True), 3)
    asked = json.loads(to_json("WatchRequest", create))
    assert asked == {
        "create_request": {
            "key": "+/8=",
            "range_end": "/A==",
            "start_revision": "5",
            "filters": [0],
            "watch_id": "3",
            "fragment": True,
        }
    }
    compare = Txn((Compare.modified_at(b"k", 0),))
    asked = json.loads(to_json("TxnRequest", wire.encode_txn(compare)))
    assert asked["compare"] == [{"result": 0, "target": 2, "key": "aw==", "mod_revision": "0"}] or (
        asked["compare"] == [{"target": 2, "key": "aw==", "mod_revision": "0"}]
    )
    login = json.loads(to_json("AuthenticateRequest", wire.encode_authenticate("alice", "pass wörd")))
    assert login == {"name": "alice", "password": "pass wörd"}


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def test_what_is_absent_is_zero():
    """The gateway leaves out zeros, false, and empty lists; a lease without TTL does not exist."""
    found = wire.decode_range(from_json("RangeResponse", HEADER))
    assert ((), 0, False) == (found.kvs, found.count, found.more)
    put = Txn(failure=(Put(b"k", b""),))
    answer = from_json("TxnResponse", {**HEADER, "responses": [{"response_put": {}}]})
    assert not wire.decode_txn(answer, put).succeeded
    renewed = from_json("LeaseKeepAliveResponse", {**HEADER, "ID": "5"})
    assert 0 == wire.decode_lease_keep_alive(renewed, 5).ttl
    events = [{"kv": {"key": "aw==", "mod_revision": "7"}}, {"type": "DELETE", "kv": {"mod_revision": "7"}}]
    watch_id, answer = wire.decode_watch(from_json("WatchResponse", {**HEADER, "events": events}))
    assert (0, [EventKind.PUT, EventKind.DELETE]) == (watch_id, [event.kind for event in answer.events])
    _, compacted = wire.decode_watch(from_json("WatchResponse", {"canceled": True, "compact_revision": "9"}))
    assert (0, 9) == (compacted.revision, compacted.compact_revision)
    with pytest.raises(InvalidAnswerError, match="no revision"):
        wire.decode_range(from_json("RangeResponse", {}))


def test_numbers_come_as_strings_or_as_numbers():
    """Long numbers come as strings by the mapping, and as numbers from who does not know it; null is absent."""
    for revision in ("9007199254740993", 9007199254740993):
        found = wire.decode_range(from_json("RangeResponse", {"header": {"revision": revision}, "kvs": None}))
        assert 9007199254740993 == found.revision


@pytest.mark.parametrize(
    "document",
    [
        None,
        5,
        "text",
        [],
        {"header": 3},
        {"kvs": {}},
        {"count": "many"},
        {"more": "yes"},
    ],
)
def test_what_is_no_such_answer_is_refused(document):
    """Whatever is not the message is one documented error."""
    with pytest.raises(ChannelError, match="no RangeResponse") as caught:
        from_json("RangeResponse", document)
    assert StatusCode.INTERNAL == caught.value.code


@pytest.mark.parametrize("events", [{}, 5, [5], [{"type": "MOVE"}], [{"type": []}]])
def test_what_is_no_event_is_refused(events):
    """An event of a kind that nobody knows is not taken for a put."""
    with pytest.raises(ChannelError, match="no WatchResponse"):
        from_json("WatchResponse", {"events": events} if events else {"events": 5})


# ── errors ──────────────────────────────────────────────────────────────────────────────────────

TEXT = "etcdserver: requested lease not found"


@pytest.mark.parametrize(
    "body",
    [
        {"error": TEXT, "code": 5, "message": TEXT},
        {"error": TEXT, "code": 5},
        {"code": 5, "message": TEXT, "details": []},
        {"error": {"grpc_code": 5, "http_code": 404, "message": TEXT, "http_status": "Not Found"}},
        {"error": {"code": 5, "message": TEXT}},
    ],
)
def test_errors_of_every_build_are_understood(body):
    """Code and message are etcd's own, whatever the HTTP status was and whichever gateway wrote them."""
    error = failure(json.dumps(body, indent=1), StatusCode.UNKNOWN, reason="Bad Request")
    assert (5, TEXT) == (error.code, error.details)


def test_words_of_somebody_in_between_are_not_etcds():
    """A proxy's page has the code of its HTTP status, and none of etcd's texts."""
    for text in ("<html>no leader</html>", "[1]", '"no"', '{"message":"x"}', '{"code":"5","message":"x"}', ""):
        error = failure(text, StatusCode.UNAVAILABLE, reason="Bad Gateway")
        assert StatusCode.UNAVAILABLE == error.code
        assert not error.details.startswith("etcdserver")


def test_documents_of_a_stream_say_what_they_are():
    """A result is unwrapped; an error in either shape is raised; anything else is refused."""
    assert {"x": 1} == unwrapped({"result": {"x": 1}})
    for error in ({"grpc_code": 14, "message": "etcdserver: no leader"}, {"code": 14, "message": TEXT}):
        with pytest.raises(ChannelError) as caught:
            unwrapped({"error": error})
        assert (14, error["message"]) == (caught.value.code, caught.value.details)
    for nonsense in ({}, [], 5, {"error": 5}, {"error": {}}, {"error": {"code": "x", "message": 5}}):
        with pytest.raises(ChannelError) as caught:
            unwrapped(nonsense)
        assert StatusCode.INTERNAL == caught.value.code


# ── pieces ──────────────────────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(pieces):
    """Read all documents of these pieces."""
    documents = Documents()
    found = [document for piece in pieces for document in documents.feed(piece)]
    return [*found, *documents.finish()]


@given(st.lists(JSON, max_size=5), st.lists(st.integers(0, 200)), st.booleans())
def test_any_chunking_gives_the_same_documents(documents, cuts, last_line_ends):
    """Documents are one per line, whatever the pieces; blank lines, and a missing last one, say nothing."""
    text = b"\n\n".join(json.dumps(document).encode() for document in documents)
    text += b"\n" if last_line_ends else b""
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert documents == read(pieces)


@given(st.lists(st.binary()))
def test_garbage_gives_documents_or_a_channel_error(pieces):
    """Nothing but the documented error comes of whatever bytes."""
    with suppress(ChannelError):
        read(pieces)


@pytest.mark.parametrize("line", [b'{"x": "\xff"}', b"[" * 100_000, b"{", b"nan"])
def test_what_is_no_json_is_refused(line):
    """Text that is no UTF-8, and nesting without end, are the documented error like any other rubbish."""
    with pytest.raises(ChannelError, match="no JSON"):
        read([line + b"\n"])
    assert StatusCode.UNAVAILABLE == failure(line.decode("latin-1"), StatusCode.UNAVAILABLE, reason="x").code


def test_answer_with_a_token_is_not_shown():
    """An answer to user and password that does not decode is not part of the error."""
    with pytest.raises(ChannelError) as caught:
        from_json("AuthenticateResponse", {"token": "secret", "header": 5})
    assert "secret" not in str(caught.value)


def test_long_lines_in_small_pieces_take_no_quadratic_time():
    """A document of 8 MB in pieces of 700 bytes is searched once for its end."""
    line = json.dumps({"result": "x" * 8_000_000}).encode() + b"\n"
    documents = Documents()
    pieces = [line[at : at + 700] for at in range(0, len(line), 700)]
    assert 1 == sum(1 for piece in pieces for _ in documents.feed(piece))
