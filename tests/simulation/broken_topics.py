"""Topics that are broken in one way each: the mistakes that message layers make; see `broken`."""

from __future__ import annotations

from dataclasses import replace

from etcd_infra._etcd.model import Put, Txn
from etcd_infra._primitives import _feed, _ordered_group, _reader, _trimmer
from etcd_infra._primitives._cas import commit
from etcd_infra._primitives._envelope import Position, Record
from etcd_infra._primitives._feed import Feed
from etcd_infra._primitives._group import Group
from etcd_infra._primitives._handling import Effects
from etcd_infra._primitives._ordered_group import OrderedMessages
from etcd_infra._primitives._reader import Reader
from etcd_infra._primitives._shared_desk import SharedDesk
from etcd_infra._primitives._shared_group import SharedMessages
from etcd_infra._primitives._trim_mark import TrimMark
from etcd_infra._primitives._trimmer import Trimmer
from etcd_infra._primitives.publish import Publish
from tests.simulation.broken import replaced
from tests.simulation.topics import NEWS

EVERYTHING = Position(1 << 60)


def effects_in_a_second_write():
    """A message is acknowledged first, and its effects are written afterwards."""
    acknowledge = OrderedMessages.acknowledge

    async def in_two_steps(self, handling, effects):
        if not await acknowledge(self, handling, Effects(conditions=effects.conditions)):
            return False
        change = _ordered_group.Change(effects.ops, effects.keys)
        if effects.ops:
            await commit(self._space.sessions, self._space.keys, change)
        return True

    return replaced(OrderedMessages, "acknowledge", in_two_steps)


def settled_when_handed_over():
    """Every message counts as handled once it is handed over."""
    return replaced(Group, "settles_before", lambda _self, _record: True)


def gaps_of_the_watch_are_overlooked():
    """A watch that is made anew goes on from its own beginning, as if nothing had been missed."""

    def begin_anew(self, _revision):
        self._tell()

    return replaced(Feed, "_begin_anew", begin_anew)


def position_is_a_revision():
    """A reader remembers the revision, and so skips the rest of it."""
    advance = Reader._advance

    def whole_revision(self, record):
        advance(self, record)
        self._number = None
        self._fetched.clear()
        self._listed.clear()
        self.position = Position(record.position.revision + 1)
        return record

    return replaced(Reader, "_advance", whole_revision)


def ring_reaches_too_far():
    """The ring is said to hold one message more than it does."""
    take = Feed._take

    def forgetful(self, batch):
        before = self.floor
        take(self, batch)
        self.floor = min(self.floor, before)

    return replaced(Feed, "_take", forgetful)


def trims_past_the_slowest():
    """The trimmer does not ask how far the groups are."""
    spent = Trimmer._spent

    def whatever(self, listed, slowest):
        del slowest
        return spent(self, listed, EVERYTHING)

    return replaced(Trimmer, "_spent", whatever)


def trims_without_a_mark():
    """What is trimmed leaves no mark."""

    async def commit_silently(sessions, keys, change):
        ops = tuple(op for op in change.ops if not (isinstance(op, Put) and op.key == NEWS.trimmed))
        return await commit(sessions, keys, replace(change, ops=ops))

    return replaced(_trimmer, "commit", commit_silently)


def mark_is_overlooked():
    """Readers do not look how far the topic was trimmed."""

    class Blind(TrimMark, frozen=True):
        @classmethod
        def position_in(cls, _kvs):
            return Position(0)

    return replaced(_reader, "TrimMark", Blind)


def claims_over_claims():
    """A claim is put whoever has one, and whatever came of the message."""
    return replaced(SharedDesk, "_untouched", lambda _self, _record, _seen: ())


def progress_is_not_compared():
    """A claim compares neither progress nor the floor: what is done is begun again."""
    untouched = SharedDesk._untouched

    def claims_only(self, record, seen):
        return untouched(self, record, seen)[:1]

    return replaced(SharedDesk, "_untouched", claims_only)


def floor_moves_too_far():
    """The floor moves over messages that are waiting or in hand."""
    return replaced(SharedMessages, "_done_at_floor", lambda self: list(self._view.ahead)[:2])


def ids_are_not_compared():
    """A message with an id is put whether the id is known or not."""
    write = Publish.write

    def always(self, target, content, space):
        op = write(self, target, content, space)
        return op if isinstance(op, Put) else Txn((), op.success, op.failure)

    return replaced(Publish, "write", always)


def ordered_by_key():
    """Messages are ordered by their publishers' clocks."""

    def by_name(kvs):
        found = sorted(kvs, key=lambda kv: kv.key)
        return [
            Record(Position(kv.create_revision, kv.key.rpartition(b"/")[2].decode()), 0, kv.value)
            for kv in found
        ]

    return replaced(_feed, "in_order", by_name)


def dead_and_alive():
    """A dead letter that was replayed and acknowledged stays one."""
    return replaced(Group, "resurrection", lambda _self, _record: ())


def number_is_kept():
    """A reader that has listed more than its watch has told is told it again."""
    return replaced(Feed, "is_before", lambda _self, _number, _position: False)


def lost_claims_are_remembered():
    """A consumer never takes a message again whose claim it has lost."""
    return replaced(SharedDesk, "lost", lambda _self, _handling: None)


BROKEN = (
    effects_in_a_second_write,
    settled_when_handed_over,
    gaps_of_the_watch_are_overlooked,
    position_is_a_revision,
    ring_reaches_too_far,
    trims_past_the_slowest,
    trims_without_a_mark,
    mark_is_overlooked,
    claims_over_claims,
    progress_is_not_compared,
    floor_moves_too_far,
    ids_are_not_compared,
    ordered_by_key,
    dead_and_alive,
    number_is_kept,
    lost_claims_are_remembered,
)
