"""The judge of the proving ground is able to condemn: hand-made logs and histories, each with one thing wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from etcd_infra._backends.memory_history import Commit
from etcd_infra.abc import Event, KeyValue
from tests.helpers.proving.line_history import Ledger, check, hand_overs, late_leavers, waits

LINE = b"ns/lock/job/"
ONE, TWO = LINE + b"a-1", LINE + b"b-1"


def quiet(begin, end):
    """Nothing is ever broken here."""
    return begin <= end


@dataclass
class Scene:
    """A history that is written by hand, and logs beside it."""

    commits: list = field(default_factory=list)
    logs: dict = field(default_factory=lambda: {"one": [], "two": []})
    revision: int = 1

    def commit(self, event):
        """Append one revision; return it."""
        self.revision += 1
        self.commits.append(Commit(self.revision, (event(self.revision),)))
        return self.revision

    def join(self, key, node):
        """Stand in line."""
        value = json.dumps({"node": node}).encode()
        return self.commit(lambda revision: Event.put(KeyValue(key, value, revision, revision, 1, 7)))

    def leave(self, key):
        """Leave the line."""
        return self.commit(lambda revision: Event.deleted(key, mod_revision=revision))

    def write(self, worker, token, which, op=1):
        """Write the register."""
        said = {"worker": worker, "op": op, "line": LINE.decode(), "token": token, "which": which}
        value = json.dumps(said).encode()
        return self.commit(lambda revision: Event.put(KeyValue(b"ns/register/lock/job", value, 2, revision, 2)))

    def log(self, worker, event, op=1, at=None, **facts):
        """Log a step."""
        step = {"event": event, "op": op, "at": float(self.revision if at is None else at), **facts}
        self.logs[worker].append(step)

    def wrong(self):
        """Judge."""
        return check(self.commits, self.logs, "ns", quiet)


def turn(scene, worker, key, *, token=None, leaves=True):
    """Play one whole turn."""
    scene.log(worker, "call", lock="job", revision=scene.revision)
    created = scene.join(key, worker)
    token = token or created
    scene.log(worker, "granted", lock="job", token=token, lines=[LINE.decode()])
    for which in ("first", "second"):
        facts = {"lock": "job", "token": token, "which": which}
        scene.log(worker, "written", revision=scene.write(worker, token, which), **facts)
    if leaves:
        scene.leave(key)
    scene.log(worker, "return", outcome="released")
    scene.log(worker, "done", op=2, revision=scene.revision)
    return token


@pytest.fixture
def scene():
    """Two processes that took one turn each, one after the other."""
    made = Scene()
    turn(made, "one", ONE)
    return made


def test_good_history_is_accepted(scene):
    """Two turns, one after the other, are right."""
    turn(scene, "two", TWO)
    assert [] == scene.wrong()
    assert 1 == len(hand_overs(scene.commits, "ns"))


def test_write_of_a_former_owner_is_told(scene):
    """A write under a token whose key is gone is a violation of L1, and interleaves."""
    token = turn(scene, "two", TWO, leaves=False)
    scene.write("one", token - 5, "late")
    assert any(text.startswith("L1") for text in scene.wrong())
    assert any("wrote after" in text for text in scene.wrong())


def test_write_of_a_waiter_is_told(scene):
    """Who is granted a lock while somebody else stands before it is told by L1 and L3."""
    scene.join(LINE + b"c-1", "three")
    turn(scene, "two", TWO)
    found = scene.wrong()
    assert any(text.startswith("L1") for text in found)
    assert any(text.startswith("L3") for text in found)


def test_token_that_goes_back_is_told(scene):
    """Two grants under one token are a violation of L2."""
    turn(scene, "two", TWO, token=2)
    assert any(text.startswith("L2") for text in scene.wrong())


def test_place_that_comes_back_is_told(scene):
    """A place that is made a second time is a violation of L8."""
    scene.join(ONE, "one")
    assert any(text.startswith("L8") for text in scene.wrong())


def test_place_left_behind_is_told(scene):
    """An operation that ended well in quiet times and left its place in line is a violation of L6."""
    turn(scene, "two", TWO, leaves=False)
    assert any(text.startswith("L6") for text in scene.wrong())
    assert [TWO] == late_leavers(scene.logs, Ledger(scene.commits))


def test_write_applied_twice_is_told(scene):
    """One write that the history shows twice is wrong."""
    scene.logs["one"].clear()
    scene.write("one", 2, "second")
    assert any("applied twice" in text for text in scene.wrong())


@pytest.mark.parametrize("said", ["refused", "failed"])
def test_applied_write_that_was_called_undone_is_told(scene, said):
    """A write that the history shows was not refused, and did not fail."""
    for step in scene.logs["one"]:
        if step["event"] == "written" and step["which"] == "second":
            step["event"] = said
    assert any("was reported as" in text for text in scene.wrong())


def test_lost_write_that_was_acknowledged_is_told(scene):
    """A write that was acknowledged is in the history at the revision of its answer."""
    scene.log("one", "written", lock="job", token=2, which="late", revision=99)
    assert any("the history has it at None" in text for text in scene.wrong())


def test_refusal_without_a_reason_is_told(scene):
    """A fenced write is refused only after its key is gone."""
    token = turn(scene, "two", TWO, leaves=False)
    scene.log("two", "refused", lock="job", token=token, which="late", revision=scene.revision)
    assert any("was refused at" in text for text in scene.wrong())


def test_wait_is_measured_from_the_turn():
    """Who waited is told so many seconds after the one ahead had gone; who did not wait is not counted."""
    scene = Scene()
    scene.join(ONE, "one")
    token = scene.join(TWO, "two")
    gone = scene.leave(ONE)
    scene.log("one", "granted", lock="job", token=2, lines=[LINE.decode()], at=2)
    scene.log("two", "granted", lock="job", token=token, lines=[LINE.decode()], at=gone + 0.25)
    times = {commit.revision: float(commit.revision) for commit in scene.commits}
    assert [0.25] == waits(scene.commits, scene.logs, times, "ns", quiet)


# ── semaphores, read-write locks, several locks at once ─────────────────────────────────────────


def semaphore_of_one(scene, *steps):
    """Play what happens to a semaphore: ``+q-a`` joins the queue, ``-h-a`` gives a permit back, several at once."""
    prefix = b"ns/semaphore/job/"
    scene.commit(lambda revision: Event.put(KeyValue(prefix + b"permits", b"1", revision, revision, 1)))
    for step in steps:
        scene.revision += 1
        events = []
        for word in step.split():
            key = prefix + {"q": b"queue/", "h": b"holder/"}[word[1]] + word[3:].encode()
            value = json.dumps({"node": word[3:]}).encode()
            put = KeyValue(key, value, scene.revision, scene.revision, 1, 7)
            events.append(Event.put(put) if word[0] == "+" else Event.deleted(key, mod_revision=scene.revision))
        scene.commits.append(Commit(scene.revision, tuple(events)))


@pytest.mark.parametrize(
    ("steps", "invariant"),
    [
        (("+q-a", "-q-a +h-a", "+q-b", "-h-a", "-q-b +h-b"), ""),
        (("+h-a", "-h-a", "+h-b"), ""),
        (("+q-a", "-q-a +h-a", "+q-b", "-q-b +h-b"), "permits"),
        (("+h-a +h-b",), "permits"),
        (("+q-a", "+q-b", "-q-b +h-b"), "queue"),
        (("+q-a", "+h-b"), "queue"),
    ],
)
def test_permits_are_counted_and_given_in_order(steps, invariant):
    """A permit too many, or given past the queue's head, is told."""
    scene = Scene()
    semaphore_of_one(scene, *steps)
    wrong = scene.wrong()
    assert bool(wrong) is bool(invariant)
    assert all(text.startswith(invariant) for text in wrong)


def test_permits_that_change_in_use_are_told():
    """The number of permits changes only while nobody holds one."""
    scene = Scene()
    semaphore_of_one(scene, "+h-a")
    scene.commit(lambda revision: Event.put(KeyValue(b"ns/semaphore/job/permits", b"2", 2, revision, 2)))
    assert any("is in use" in text for text in scene.wrong())


@pytest.mark.parametrize(("second", "wrong"), [("read-b", False), ("write-b", True)])
def test_writer_beside_a_reader_is_told(second, wrong):
    """Who is granted a read-write lock beside a reader must be one, too."""
    scene = Scene()
    for name, worker in (("read-a", "one"), (second, "two")):
        scene.log(worker, "call", revision=scene.revision)
        token = scene.join(b"ns/rwlock/job/" + name.encode(), worker)
        scene.log(worker, "granted", token=token, lines=["ns/rwlock/job/"])
        scene.log(worker, "return", outcome="released")
        scene.log(worker, "late", revision=scene.revision)
    assert wrong is any(text.startswith("L3") for text in scene.wrong())


@pytest.mark.parametrize("leaves", [False, True])
def test_half_of_two_locks_is_told(leaves):
    """Two locks that were never owned at one revision were not owned together."""
    scene = Scene()
    one, other = b"ns/lock/a/x-1", b"ns/lock/b/x-2"
    ahead = scene.join(b"ns/lock/b/w-1", "two")
    scene.revision += 1
    value = json.dumps({"node": "one"}).encode()
    token = scene.revision
    puts = [Event.put(KeyValue(key, value, token, token, 1, 7)) for key in (one, other)]
    scene.commits.append(Commit(token, tuple(puts)))
    if leaves:
        scene.leave(one)
    scene.leave(b"ns/lock/b/w-1")
    scene.log("one", "granted", token=token, lines=["ns/lock/a/", "ns/lock/b/"])
    assert ahead < token
    assert leaves is any(text.startswith("whole") for text in scene.wrong())
