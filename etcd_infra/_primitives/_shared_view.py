"""
What one consumer knows of a work-sharing group: who handles what, what is done, and what waits.

House rules. Nothing here waits or writes. What is known may be old: every write compares what it relies on.
What is older than what is known already is passed over, since a refusal may tell more than the watch has.
"""

from __future__ import annotations

from heapq import nsmallest
from typing import TYPE_CHECKING, Any

import trio

from etcd_infra._etcd.keys import last_segment
from etcd_infra._primitives._claim import Progress, parse_progress
from etcd_infra._primitives._envelope import Position
from etcd_infra._primitives._group import Cursor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from etcd_infra._etcd.model import Event, KeyValue
    from etcd_infra._primitives._envelope import Record
    from etcd_infra._primitives._group import Group


class SharedView:
    """
    The picture.

    Attributes:
        floor: Everything up to it is done.
        cursor_revision: When the floor was written, as far as is known.
        waiting: What was read after the floor and is not done, oldest first.
        ahead: What was read after the floor, done or not, oldest first.
        claimed: What somebody handles, and the claim's create revision.
        progress: What came of a message so far, and when that was written.
        changed: Set as soon as any of this is another; replaced by a new one then.
    """

    def __init__(self, group: Group[Any]) -> None:
        self._group = group
        self._claims = group.keys.claims(group.name)
        self._read_up_to = Position(0)
        self.floor = Position(0)
        self.cursor_revision = 0
        self.waiting: dict[str, Record] = {}
        self.ahead: dict[str, Position] = {}
        self.claimed: dict[str, int] = {}
        self.progress: dict[str, tuple[int, Progress]] = {}
        self.changed = trio.Event()

    def tell(self) -> None:
        """Let those who wait look again."""
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    def add(self, record: Record) -> None:
        """Take in a message that was read."""
        if record.position <= max(self.floor, self._read_up_to):
            return
        self._read_up_to = record.position
        self.ahead[record.name] = record.position
        if self._group.is_for_us(record) and not self._is_done(record.name):
            self.waiting[record.name] = record

    def begin_anew(self) -> None:
        """Forget what was read: the store is another one."""
        self.waiting.clear()
        self.ahead.clear()
        self._read_up_to = Position(0)

    def replace(self, kvs: Iterable[KeyValue]) -> None:
        """Take in all claims and progress that there are."""
        self.claimed.clear()
        self.progress.clear()
        for kv in kvs:
            self.see(kv)

    def saw(self, event: Event) -> None:
        """Take in a change of a claim or of progress."""
        if not event.is_delete:
            self.see(event.kv)
            return
        name = last_segment(event.key)
        if event.key.startswith(self._claims):
            if self.claimed.get(name, 0) < event.revision:
                self.claimed.pop(name, None)
        elif self.progress.pop(name, (0, None))[1] is not None:
            # Progress is deleted when the floor has passed it.
            self.forget(name)

    def see(self, kv: KeyValue) -> None:
        """Take in a claim or progress as it stands."""
        name = last_segment(kv.key)
        if kv.key.startswith(self._claims):
            self.claimed[name] = max(kv.create_revision, self.claimed.get(name, 0))
        elif kv.mod_revision >= self.progress.get(name, (0, None))[0]:
            progress = parse_progress(kv)
            self.progress[name] = (kv.mod_revision, progress)
            if progress.done:
                self.waiting.pop(name, None)

    def take_floor(self, kv: KeyValue) -> None:
        """Take in the cursor as it stands."""
        self.cursor_revision = kv.mod_revision
        self.floor = Cursor.parse(kv).position(kv)
        for name, position in tuple(self.ahead.items()):
            if position > self.floor:
                break
            self.forget(name)
        self.tell()

    def moved_floor(self, floor: Position, names: list[str], revision: int) -> None:
        """Take in that we have moved the floor over messages, at a revision."""
        self.cursor_revision = revision
        self.floor = floor
        for name in names:
            self.progress.pop(name, None)
            self.forget(name)
        self.tell()

    def claim(self, name: str, revision: int, begun: Progress) -> None:
        """Take in that we have claimed a message, at a revision."""
        self.claimed[name] = revision
        self.progress[name] = (revision, begun)

    def release(self, name: str) -> None:
        """Take in that a claim of ours is gone."""
        self.claimed.pop(name, None)
        self.tell()

    def finish(self, name: str, revision: int) -> None:
        """Take in that a message is done, since a revision."""
        if name in self.ahead:
            self.progress[name] = (revision, Progress(done=True))
        self.waiting.pop(name, None)
        self.tell()

    def forget(self, name: str) -> None:
        """Take in that a message is below the floor, or is no more."""
        self.waiting.pop(name, None)
        self.ahead.pop(name, None)

    def unread(self, most: int) -> list[str]:
        """Return messages of which there is progress, though they were not read: perhaps they were trimmed."""
        unread = (name for name in self.progress if name not in self.ahead and name not in self.claimed)
        return nsmallest(most, unread)

    def _is_done(self, name: str) -> bool:
        known = self.progress.get(name)
        return known is not None and known[1].done
