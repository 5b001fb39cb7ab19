"""What a publisher gets: when its message was published, and which groups have acknowledged it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from etcd_infra._etcd.model import KeyRange, Range, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._claim import Progress
from etcd_infra._primitives._group import Cursor
from etcd_infra.errors import CompactedError, FutureRevisionError, UnavailableError

if TYPE_CHECKING:
    from etcd_infra._etcd.keys import TopicKeys
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._primitives._envelope import Position
    from etcd_infra._primitives._space import Space

logger = logging.getLogger("etcd_infra.topic")

LOOK_AGAIN_SECONDS: Final = 30.0


class Receipt:
    """
    A message that was published.

    Attributes:
        message_id: Its id.
        revision: The store's revision at which it was published.
        is_duplicate: A message with this id was there already; `revision` is that one's.
        acknowledged_by: The groups that have acknowledged it, by the last look; in order.
        missing: The groups that existed when it was published and have not acknowledged it, by the last look.
            One that has made it a dead letter is among them until that is replayed and acknowledged. What was
            trimmed unread counts as acknowledged by a group that has gone on after it.
    """

    def __init__(
        self, space: Space, keys: TopicKeys, position: Position, message_id: str, *, is_duplicate: bool
    ) -> None:
        self.message_id = message_id
        self.revision = position.revision
        self.is_duplicate = is_duplicate
        self.acknowledged_by: tuple[str, ...] = ()
        self.missing: tuple[str, ...] = ()
        self._space = space
        self._keys = keys
        self._position = position
        self._least = position.revision

    def __repr__(self) -> str:
        return f"<Receipt {self.message_id!r} revision={self.revision}>"

    async def refresh(self) -> bool:
        """
        Look which groups have acknowledged it; return whether none is missing.

        Raises:
            FutureRevisionError: etcd answers with a state from before; look again.
            EtcdError: etcd does not answer; what was known stays.

        Cancellation:
            What was known stays.

        Round trips:
            Two.
        """
        keys = self._keys
        # etcd: a read that is older than what is known already would tell lies (#20418).
        cursors = (await self._space.read(Range(KeyRange.prefix(keys.cursors)), min_revision=self._least)).kvs
        groups = {keys.parse_cursor(kv.key): kv for kv in cursors if kv.create_revision < self.revision}
        acknowledged: list[str] = []
        missing: list[str] = []
        for name, kv in sorted(groups.items()):
            (acknowledged if await self._has_acknowledged(name, kv) else missing).append(name)
        self.acknowledged_by, self.missing = tuple(acknowledged), tuple(missing)
        return not missing

    async def wait_acknowledged(self) -> None:
        """
        Wait until every group that existed when it was published has acknowledged it.

        Bound it with `trio.fail_after`; `acknowledged_by` and `missing` tell the truth of the last look then.
        With no group there is nothing to wait for, and `acknowledged_by` is empty.

        Raises:
            StoreResetError: the store was restored or wiped: it may not be there any more.
            EtcdError: etcd refuses.

        Cancellation:
            `acknowledged_by` and `missing` are as of the last look.

        Round trips:
            Three, and two each time that something in the topic's groups changes.
        """
        # Everything of the topic but its messages: cursors, dead letters, progress.
        for_groups = KeyRange(self._keys.cursors, self._keys.markers)
        failures = 0
        while True:
            try:
                async with self._space.backend.watch(for_groups) as changes:
                    self._least = max(self._least, changes.created_revision)
                    while not await self.refresh():
                        # etcd: some servers lose an event now and then: look once in a while.
                        with trio.move_on_after(LOOK_AGAIN_SECONDS):
                            self._least = max(self._least, (await changes.receive()).revision)
                        failures = 0
                    return
            except (UnavailableError, CompactedError, FutureRevisionError) as error:
                logger.info("who has acknowledged %r can not be told now: %s", self.message_id, error)
            await trio.sleep(delay(failures, self._space.random.random()))
            failures += 1

    async def _has_acknowledged(self, group: str, kv: KeyValue) -> bool:
        cursor = Cursor.parse(kv)
        if cursor.position(kv) < self._position and not cursor.shared:
            return False
        name = self._position.name
        progress = Range(KeyRange.one(self._keys.progress(group, name)))
        dead = Range(KeyRange.one(self._keys.dead_letter(group, name)), keys_only=True)
        fresh = Range(KeyRange.one(kv.key))
        answer = await self._space.backend.txn(Txn(success=(progress, dead, fresh)))
        if answer.revision < self._least:
            raise FutureRevisionError(f"a stale read: at {answer.revision}, not {self._least}")
        done, buried, cursors = map(found_in, answer.results)
        if buried or not cursors:
            return False
        if Cursor.parse(cursors[0]).position(cursors[0]) >= self._position:
            return True
        return any(msgspec.json.decode(one.value, type=Progress).done for one in done)
