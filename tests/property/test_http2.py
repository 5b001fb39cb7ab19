"""HTTP/2 as bytes: how they are cut does not matter, and no bytes do harm."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from etcd_infra._backends import http2_frames as h2
from etcd_infra._backends.http2_protocol import Http2Protocol, MessageReceived, StreamEnded
from tests.helpers.http2_server import FIRST, HEADERS, OK, block, data, greeted, headers, message

CALLS = 4
IDS = st.sampled_from([1, 3, 5, 7])
payloads = st.one_of(st.binary(max_size=50), st.integers(0, 40_000).map(bytes))
FAILED = (("grpc-status", "9"), ("grpc-message", "no%21"))


def continued(stream_id, fields, cuts, *, ends):
    """Headers in a HEADERS frame and CONTINUATION frames, cut anywhere."""
    encoded = block(*fields)
    places = sorted(cut % (len(encoded) + 1) for cut in cuts)
    pieces = [encoded[a:b] for a, b in zip([0, *places], [*places, len(encoded)], strict=True)]
    flags = [h2.END_STREAM if ends else 0, *[0] * (len(pieces) - 1)]
    flags[-1] |= h2.END_HEADERS
    kinds = [h2.HEADERS, *[h2.CONTINUATION] * (len(pieces) - 1)]
    return b"".join(h2.frame(k, f, stream_id, p) for k, f, p in zip(kinds, flags, pieces, strict=True))


def padded(kind, flags, stream_id, payload, padding):
    """A frame with padding; headers have a priority before what they say."""
    priority = bytes(5) if flags & h2.HAS_PRIORITY else b""
    return h2.frame(kind, flags | h2.PADDED, stream_id, bytes([padding]) + priority + payload + bytes(padding))


CUTS = st.lists(st.integers(0, 200), min_size=1, max_size=4)
PADDING = st.integers(0, 255)
frame_of_a_server = st.one_of(
    st.builds(lambda i, cuts: continued(i, FIRST, cuts, ends=False), IDS, CUTS),
    st.builds(lambda i, cuts: continued(i, FAILED, cuts, ends=True), IDS, CUTS),
    st.builds(
        lambda i, n: padded(h2.HEADERS, h2.END_HEADERS | h2.HAS_PRIORITY, i, block(*FIRST), n), IDS, PADDING
    ),
    st.builds(lambda i, p, n: padded(h2.DATA, 0, i, message(p), n), IDS, st.binary(max_size=50), PADDING),
    st.builds(lambda i: h2.frame(h2.PRIORITY, 0, i, bytes(5)), IDS),
    st.builds(lambda i: headers(i, (":status", "103")), IDS),
    st.builds(lambda i: headers(i, *FIRST), IDS),
    st.builds(lambda i, ok: headers(i, *(OK if ok else FAILED), ends=True), IDS, st.booleans()),
    st.builds(lambda i: headers(i, *FIRST, *FAILED, ends=True), IDS),
    st.builds(lambda i, p: data(i, message(p)), IDS, payloads),
    st.builds(lambda i, p, q: data(i, message(p) + message(q)), IDS, payloads, payloads),
    st.builds(lambda i, p, end: data(i, p, ends=end), IDS, st.binary(max_size=9), st.booleans()),
    st.builds(h2.rst_stream, IDS, st.integers(0, 20)),
    st.builds(h2.window_update, st.sampled_from([0, 1, 3, 5, 7]), st.integers(1, 100_000)),
    st.builds(h2.ping, st.binary(min_size=8, max_size=8)),
    st.builds(h2.settings, st.dictionaries(st.sampled_from([3, 4, 5, 6, 9]), st.integers(16_384, 99_999))),
    st.builds(lambda k, p: h2.frame(k, 0, 0, p), st.integers(10, 255), st.binary(max_size=20)),
    st.builds(lambda n: h2.frame(h2.GOAWAY, 0, 0, n.to_bytes(4, "big") + bytes(4)), st.integers(0, 9)),
)
anything = st.builds(
    h2.frame,
    st.integers(0, 12),
    st.integers(0, 255),
    st.one_of(st.sampled_from([0, 1, 3, 5, 7, 9]), st.integers(0, 2**31 - 1)),
    st.binary(max_size=60),
)


def begun():
    """Return a protocol with four calls, two of them streams that stay open, and those calls."""
    protocol = greeted()
    calls = [
        protocol.call(HEADERS, b"a"),
        protocol.open(HEADERS),
        protocol.call(HEADERS, b"b"),
        protocol.open(HEADERS),
    ]
    protocol.take()
    return protocol, calls


def told(protocol, calls, chunks):
    """Return what a protocol makes of chunks, calls by number, and all that it writes."""
    events = [event for chunk in chunks if chunk for event in protocol.receive(chunk)]
    return [(type(event), calls.index(event.stream), *event[1:]) for event in events], protocol.take()


@given(st.lists(frame_of_a_server, max_size=30), st.data())
@settings(max_examples=300, deadline=None)
def test_cuts_do_not_matter(said, data):
    """Any way of cutting a server's bytes gives the same events and the same answers."""
    stream = b"".join(said)
    whole = told(*begun(), [stream])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    assert whole == told(*begun(), pieces)


@given(st.lists(frame_of_a_server, max_size=6))
@settings(max_examples=60, deadline=None)
def test_byte_by_byte_is_the_same(said):
    """Even single bytes give the same events."""
    stream = b"".join(said)
    assert told(*begun(), [stream]) == told(*begun(), [stream[at : at + 1] for at in range(len(stream))])


@given(st.lists(st.one_of(frame_of_a_server, anything, st.binary(max_size=40)), max_size=40))
@settings(max_examples=500, deadline=None)
def test_garbage_ends_every_call_once_at_most(said):
    """Whatever bytes come, nothing raises, each call ends once at most, and none hears anything after its end."""
    protocol, calls = begun()
    over = set()
    for chunk in said:
        for event in protocol.receive(chunk) if chunk else []:
            assert event.stream not in over
            assert isinstance(event, MessageReceived | StreamEnded)
            if isinstance(event, StreamEnded):
                over.add(event.stream)
    assert protocol.open_calls == len(calls) - len(over)
    over |= {event.stream for event in protocol.receive(b"")}
    assert set(calls) == over


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_peer_that_speaks_no_http2_is_harmless(said):
    """A peer of another kind can do no more than end the connection."""
    protocol = Http2Protocol()
    stream = protocol.call(HEADERS, b"x")
    protocol.take()
    events = [*protocol.receive(said or b"x"), *protocol.receive(b"")]
    assert [(StreamEnded, stream)] == [(type(event), event.stream) for event in events]
