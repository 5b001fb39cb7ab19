"""The key layout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcd_infra._etcd.keys import Keys, decode_segment, encode_segment, place, place_lease

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        ("orders:prod", "orders:prod"),
        ("a/b", "a%2Fb"),
        ("100%", "100%25"),
        ("a\x00\n\x7f", "a%00%0A%7F"),
        ("grün", "grün"),
        ("%2F", "%252F"),
    ],
)
def test_segments_are_legible(name, segment):
    """Only `%`, `/` and control characters are encoded."""
    assert segment == encode_segment(name)


@given(NAMES)
def test_segments_come_back(name):
    """Decoding undoes encoding, and a segment has no slash."""
    assert name == decode_segment(encode_segment(name))
    assert "/" not in encode_segment(name)


@given(NAMES, NAMES, NAMES)
def test_no_lines_keys_are_anothers(namespace, one, other):
    """The keys of two locks are never mixed up, whatever their names."""
    keys = Keys(namespace)
    key = place(keys.lock_line(one), 255, 1)
    assert (one == other) == key.startswith(keys.lock_line(other))
    assert one == keys.parse_lock(key)


@pytest.mark.parametrize(
    ("name", "error"), [("", ValueError), ("é" * 257, ValueError), (7, TypeError), (b"x", TypeError)]
)
def test_bad_names_are_refused(name, error):
    """Empty, over-long and non-str names are refused with the name in the text."""
    with pytest.raises(error):
        encode_segment(name)
    if name != "":
        with pytest.raises(error):
            Keys(name)


def test_layout():
    """The layout is the documented one."""
    keys = Keys("my ns/1")
    assert b"my ns%2F1/epoch" == keys.epoch
    assert b"my ns%2F1/session/ff" == keys.session(255)
    assert b"my ns%2F1/session/ff/op/3" == keys.slot(255, 3)
    assert b"my ns%2F1/lock/job/ff-12" == place(keys.lock_line("job"), 255, 12)
    assert b"my ns%2F1/state/a/b" == keys.state("a/b")
    assert b"session/1" == Keys("").session(1)
    with pytest.raises(ValueError, match="empty"):
        keys.state("")


def test_keys_are_read_back():
    """Sessions and places name their lease; foreign keys are recognised as such."""
    keys = Keys("ns")
    assert 255 == keys.parse_session(b"ns/session/ff")
    assert keys.parse_session(b"ns/session/ff/op/3") is None
    assert keys.parse_session(b"other/session/ff") is None
    assert keys.parse_lock(b"ns/lock/") is None
    assert keys.parse_lock(b"ns/session/ff") is None
    assert 255 == place_lease(b"ns/lock/job/ff-1")
    assert 255 == place_lease(b"ns/lock/job/ff")
    assert place_lease(b"ns/lock/job/not-hex") is None
