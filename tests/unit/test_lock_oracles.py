"""The oracles of locks, on histories made by hand: good ones pass, bad ones are found."""

from __future__ import annotations

import pytest

from etcd_infra._backends.memory_history import Commit
from etcd_infra._etcd.model import Event, KeyValue
from etcd_infra.testing import Claim, Grant, check_fences, check_grants
from etcd_infra.testing.fences import Turn, everybody, readers_or_writer, turns

LOCKS = b"lock/"
LINE = b"lock/job/"


def history(*revisions):
    """Make commits out of texts: ``+a`` joins, ``-a`` leaves, ``a=5`` is a write of a's under token 5."""
    commits, created = [], {}
    for revision, text in enumerate(revisions, 2):
        events = []
        for word in text.split():
            if word[0] in "+-":
                key = LOCKS + (word[1:] if "/" in word else f"job/{word[1:]}").encode()
                if word[0] == "+":
                    created[key] = revision
                    events.append(Event.put(KeyValue(key, b"", revision, revision, 1)))
                else:
                    before = KeyValue(key, b"", created.pop(key), 2, 1)
                    events.append(Event.deleted(key, mod_revision=revision, prev_kv=before))
            else:
                events.append(Event.put(KeyValue(b"data", word.encode(), 2, revision, 2)))
        commits.append(Commit(revision, tuple(events)))
    return commits


def claim_of(event):
    """Read the token of a write."""
    return Claim(LINE, int(event.kv.value.partition(b"=")[2])) if event.key == b"data" else None


GOOD_WRITES = {
    "nothing": (),
    "owner writes": ("+a", "a=2"),
    "owner writes twice": ("+a", "a=2", "a=2"),
    "in turn": ("+a", "a=2", "-a", "+b", "b=5"),
    "waiter takes over": ("+a", "+b", "a=2", "-a", "b=3"),
    "middle one leaves": ("+a", "+b", "+c", "-b", "a=2", "-a", "c=4"),
    "write and release in one": ("+a", "a=2 -a"),
    "other line": ("+other/x", "+a", "a=3"),
    "longer name": ("+job2/x", "+a", "a=3"),
    "joins again": ("+a", "a=2", "-a", "+a", "a=5"),
    "release and join in one": ("+a", "-a +b", "b=3"),
}
BAD_WRITES = {
    "nobody is in line": ("a=2",),
    "after release": ("+a", "-a", "a=2"),
    "waiter writes": ("+a", "+b", "b=3"),
    "former owner": ("+a", "+b", "-a", "b=3", "a=2"),
    "token of a former life": ("+a", "-a", "+a", "a=2"),
    "token from the header": ("+a", "a=3"),
    "in the revision of its own join": ("+a a=2",),
    "skips the one ahead": ("+a", "+b", "+c", "-b", "c=4"),
    "owner of another line": ("+other/x", "+a", "a=2"),
    "one good, one bad": ("+a", "a=2 b=9"),
    "in the revision of the release ahead": ("+a", "+b", "-a b=3"),
}


@pytest.mark.parametrize("name", GOOD_WRITES)
def test_good_writes_pass(name):
    """A history in which only owners write has no violation."""
    assert [] == check_fences(history(*GOOD_WRITES[name]), LOCKS, claim_of)


@pytest.mark.parametrize("name", BAD_WRITES)
def test_bad_writes_are_found(name):
    """A write of one who is not the owner at that revision violates L1."""
    found = check_fences(history(*BAD_WRITES[name]), LOCKS, claim_of)
    assert {"L1"} == {violation.invariant for violation in found}


def grant(token, called, granted, line=LINE):
    """Make a grant."""
    return Grant(line, token, called, granted)


THREE = ("+a", "+b", "-a", "+c", "-b", "-c")  # a: 2 to 4, b: 4 to 6, c: 6 to 7
GOOD_GRANTS = {
    "none": (THREE, []),
    "in turn": (THREE, [grant(2, 1, 2), grant(3, 2, 4), grant(5, 4, 6)]),
    "told late": (THREE, [grant(2, 1, 3), grant(3, 2, 5)]),
    "told after its end": (THREE, [grant(2, 1, 5)]),
    "in any order": (THREE, [grant(5, 4, 6), grant(2, 1, 2)]),
    "told in another order": (THREE, [grant(2, 1, 6), grant(3, 2, 5)]),
    "two lines": (("+a", "+x/a"), [grant(2, 1, 2), grant(3, 2, 3, b"lock/x/")]),
    "still held": (("+a",), [grant(2, 1, 9)]),
    "some are never told": (THREE, [grant(5, 4, 7)]),
}
BAD_GRANTS = {
    "never in line": (THREE, [grant(9, 1, 9)], "L3"),
    "told too early": (THREE, [grant(3, 2, 3)], "L3"),
    "asked for after its end": (THREE, [grant(2, 5, 6)], "L3"),
    "key of another line": (THREE, [grant(2, 1, 2, b"lock/x/")], "L3"),
    "empty history": ((), [grant(2, 1, 2)], "L3"),
    "never first": (("+a", "+b", "-b"), [grant(3, 2, 4)], "L3"),
    "twice": (THREE, [grant(2, 1, 2), grant(2, 1, 3)], "L2"),
    "smaller token later": (THREE, [grant(3, 2, 4), grant(2, 5, 6)], "L2"),
    "smaller token much later": (THREE, [grant(5, 4, 6), grant(3, 2, 4), grant(2, 7, 8)], "L2"),
    "same token, asked for later": (("+a",), [grant(2, 1, 2), grant(2, 4, 5)], "L2"),
}


@pytest.mark.parametrize("name", GOOD_GRANTS)
def test_good_grants_pass(name):
    """Grants whose keys were first in line, in the order of their tokens, have no violation."""
    commits, grants = GOOD_GRANTS[name]
    assert [] == check_grants(history(*commits), LOCKS, grants)


@pytest.mark.parametrize("name", BAD_GRANTS)
def test_bad_grants_are_found(name):
    """A grant without its turn, or a token out of order, is found under its name."""
    commits, grants, invariant = BAD_GRANTS[name]
    assert invariant in {violation.invariant for violation in check_grants(history(*commits), LOCKS, grants)}


# Readers a, b, c and writers v, w; who owned the line, from when to when.
SHARED = {
    "nobody": ((), []),
    "one reads": (("+read-a", "-read-a"), [Turn(2, 2, 3)]),
    "two read": (("+read-a", "+read-b", "-read-a"), [Turn(2, 2, 4), Turn(3, 3)]),
    "one writes": (("+write-v",), [Turn(2, 2)]),
    "writer behind readers": (
        ("+read-a", "+read-b", "+write-v", "-read-a", "-read-b"),
        [Turn(2, 2, 5), Turn(3, 3, 6), Turn(4, 6)],
    ),
    "reader behind a writer that waits": (
        ("+read-a", "+write-v", "+read-b", "-read-a", "-write-v"),
        [Turn(2, 2, 5), Turn(3, 5, 6), Turn(4, 6)],
    ),
    "reader behind a writer that gives up": (
        ("+read-a", "+write-v", "+read-b", "-write-v"),
        [Turn(2, 2), Turn(4, 5)],
    ),
    "two writers": (("+write-v", "+write-w", "-write-v"), [Turn(2, 2, 4), Turn(3, 4)]),
}


@pytest.mark.parametrize("name", SHARED)
def test_owners_of_a_read_write_lock(name):
    """Readers own it together up to the first writer, a writer alone."""
    commits, owned = SHARED[name]
    assert owned == turns(history(*commits), LOCKS, rule=readers_or_writer).get(LINE, [])


def test_every_holder_of_a_semaphore_has_its_turn():
    """Among a semaphore's holders everybody may write, and nobody else."""
    commits = history("+a", "+b", "b=3", "a=2", "-a", "b=3")
    assert [] == check_fences(commits, LOCKS, claim_of, rule=everybody)
    assert [] == check_grants(commits, LOCKS, [grant(2, 1, 3), grant(3, 2, 3)], rule=everybody)
    late = check_fences(history("+a", "+b", "-a", "a=2"), LOCKS, claim_of, rule=everybody)
    assert ["L1"] == [violation.invariant for violation in late]


@pytest.mark.parametrize(
    ("commits", "wrong"),
    [
        (("+read-a", "+write-v", "v=3"), True),
        (("+write-v", "+read-a", "a=3"), True),
        (("+read-a", "+write-v", "+read-b", "b=4"), True),
        (("+write-v", "+write-w", "w=3"), True),
        (("+read-a", "+read-b", "b=3", "a=2"), False),
    ],
)
def test_writes_beside_a_writer_are_found(commits, wrong):
    """Nobody writes beside a writer, and no reader that came after one that waits."""
    assert wrong is bool(check_fences(history(*commits), LOCKS, claim_of, rule=readers_or_writer))
