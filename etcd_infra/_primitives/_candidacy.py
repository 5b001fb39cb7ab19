"""This process's part in its elections, shared by all `Election` objects of a name."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import Compare, KeyRange
from etcd_infra._primitives._roll import Roll
from etcd_infra._primitives._shared import Shared
from etcd_infra._primitives.members import Members, logger
from etcd_infra._session.mirror import Changes, Mirror, Snapshot, open_mirror
from etcd_infra.errors import EtcdError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from etcd_infra._etcd.background import Background
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._primitives.leadership import Leadership
    from etcd_infra._session.current import SessionSource
    from etcd_infra._session.session import Session


class RollView:
    """A group's roll, kept up to date by a watch; `listeners` are called after each change."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self.roll = Roll()
        self.listeners: dict[Callable[[], None], None] = {}

    async def follow(self, task_status: trio.TaskStatus[None]) -> None:
        """Keep it up to date; started once it is."""
        try:
            while True:
                match await self._mirror.receive():
                    case Snapshot(kvs=kvs):
                        self.roll.begin_anew(kvs)
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
                    case Changes(events):
                        for event in events:
                            if event.is_delete:
                                self.roll.delete(event.key)
                            else:
                                self.roll.put(event.kv)
                self._tell()
        except EtcdError as error:
            logger.error("who is a member can not be told any more: %s", error)
            self.roll.begin_anew(())
            self._tell()

    async def wait_changed(self) -> None:
        """Wait for the next change."""
        changed = trio.Event()
        with self.told(changed.set):
            await changed.wait()

    @contextmanager
    def told(self, listener: Callable[[], None]) -> Generator[None]:
        """Call `listener` after each change, for the length of a body."""
        self.listeners[listener] = None
        try:
            yield
        finally:
            del self.listeners[listener]

    def proof(self, session: Session, count: int) -> tuple[Compare, ...]:
        """Return compares that `count` members, this session's node among them, are there; or nothing."""
        proof = self.roll.proof(session.node_id, count)
        return (
            tuple(Compare.created_at(key, revision) for key, revision in proof) if len(proof) == count else ()
        )

    def _tell(self) -> None:
        for listener in tuple(self.listeners):
            listener()


class Candidacy:
    """
    This process's part in one election.

    Attributes:
        registered: To be used while this process takes part: it is a member then.
        view: To be used by whoever must know how many members there are.
        leaderships: Those that have not ended, at most one of them held.
        campaigns: How many tasks want to lead and do not yet.
        listeners: Called with a leadership when it begins, and when it has ended.
    """

    def __init__(self, sessions: SessionSource, keys: Keys, background: Background, name: str) -> None:
        self.sessions = sessions
        self.keys = keys
        self.name = name
        self.members = Members(sessions, keys, name)
        self.registered = Shared(background, self.members.register)
        self.view = Shared(background, self._open_view)
        self.leaderships: dict[Leadership, None] = {}
        self.campaigns = 0
        self.listeners: dict[Callable[[Leadership, bool], None], None] = {}

    @property
    def is_leader(self) -> bool:
        """Whether this process leads, by the clocks of this moment."""
        return any(leadership.is_held() for leadership in self.leaderships)

    @contextmanager
    def campaigning(self) -> Generator[None]:
        """Note that a task wants to lead, for the length of a body."""
        self.campaigns += 1
        try:
            yield
        finally:
            self.campaigns -= 1

    @contextmanager
    def leading(self, leadership: Leadership) -> Generator[None]:
        """Note that a task leads, for the length of a body that does not end before the key is gone."""
        self.leaderships[leadership] = None
        self._tell(leadership, begins=True)
        try:
            yield
        finally:
            del self.leaderships[leadership]
            self._tell(leadership, begins=False)

    def _tell(self, leadership: Leadership, *, begins: bool) -> None:
        for listener in tuple(self.listeners):
            listener(leadership, begins)

    @asynccontextmanager
    async def _open_view(self) -> AsyncGenerator[RollView]:
        session = await self.sessions.current()
        keys = KeyRange.prefix(self.keys.member_line(self.name))
        async with (
            open_mirror(session.backend, keys, session.random) as mirror,
            open_background() as background,
        ):
            view = RollView(mirror)
            await background.start(view.follow)
            yield view


class Candidacies:
    """The candidacies of one coordinator: one for all `Election` objects of one name."""

    def __init__(self, sessions: SessionSource, keys: Keys, background: Background) -> None:
        self._sessions = sessions
        self._keys = keys
        self._background = background
        self._by_line: WeakValueDictionary[bytes, Candidacy] = WeakValueDictionary()

    @property
    def is_leader(self) -> bool:
        """Whether this process leads any election."""
        return any(candidacy.is_leader for candidacy in self._by_line.values())

    def of(self, name: str) -> Candidacy:
        """Return the candidacy of a name; it lives as long as somebody keeps it."""
        line = self._keys.election_line(name)
        candidacy = self._by_line.get(line)
        if candidacy is None:
            candidacy = Candidacy(self._sessions, self._keys, self._background, name)
            self._by_line[line] = candidacy
        return candidacy
