"""
Who is there: the members of a group, each as long as its process lives.

Keys
    ``{ns}member/{name}/{lease}-{n}``  one registration: JSON node id, metadata and since when; on the
                                       session's lease. It is a place in a line that nobody waits in.

Algorithm
    1. Register: join the line (see `_waitqueue`); once more under the next session, should this one be lost.
    2. A node is a member while it has a registration: a restarted node's new one counts as soon as it is
       there, and its old one, when it runs out, removes nothing.
    3. A registration that ends takes its session along if the process died; whether the session's key was
       there still, at that very revision, tells who left from who died.

Guarantees
    `list` is linearizable. `observe` misses nobody who is a member, and never goes back.

Does not guarantee
    That a member is alive: a dead one counts until its lease has run out.

Source
    ephemeral nodes of ZooKeeper's group membership recipe; the registration is etcd's lease.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._policy.backoff import delay
from etcd_infra._policy.codec import JSON
from etcd_infra._primitives._roll import Member, Roll
from etcd_infra._primitives._waitqueue import Spot
from etcd_infra._primitives.member_watch import MemberWatch
from etcd_infra._session.mirror import open_mirror
from etcd_infra.errors import EtcdError, SessionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from etcd_infra._etcd.keys import Keys
    from etcd_infra._primitives._waitqueue import Place
    from etcd_infra._session.current import SessionSource
    from etcd_infra._session.session import Session

logger = logging.getLogger("etcd_infra.members")


class Members:
    """
    The members of the group `name`; those of the election of that name are its candidates.

    Args:
        sessions: A session, or what replaces it when it is lost.
        keys: The namespace's key layout.
        name: Non-empty, at most 512 bytes.
    """

    def __init__(self, sessions: SessionSource, keys: Keys, name: str) -> None:
        self.name = name
        self._sessions = sessions
        self._keys = keys
        self._line = keys.member_line(name)

    def __repr__(self) -> str:
        return f"<Members {self.name!r}>"

    @asynccontextmanager
    async def register(self, meta: Mapping[str, object] | None = None) -> AsyncGenerator[None]:
        """
        Be a member for the length of a body; entering waits until that is so.

        The body is not cancelled when the session is lost: this node is registered again under the next one.

        Args:
            meta: What others are to know of this node, as JSON can express it.

        Raises:
            TypeError, ValueError: `meta` is no mapping, or JSON can not express it; nothing was sent.
            StorageFullError, AccessDeniedError, SessionLostError: not registered.

        Cancellation:
            Unregistered within two seconds, or by the session's janitor.

        Round trips:
            One to enter, one to leave.
        """
        if not isinstance(meta, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"meta must be a mapping, not {meta!r}"
            raise TypeError(msg)
        described = dict(meta or {})
        JSON.encode(described)
        registration = _Registration(self._sessions, self._keys, self.name, described)
        async with open_background() as background:
            await background.start(registration.run)
            yield

    async def list(self) -> tuple[Member, ...]:
        """
        Return who is a member, by node id.

        Round trips:
            One.
        """
        session = await self._sessions.current()
        roll = Roll()
        answer = await session.backend.range(Range(KeyRange.prefix(self._line)))
        roll.begin_anew(answer.kvs)
        return roll.members

    async def has_quorum(self, required: int) -> bool:
        """
        Ask whether at least `required` distinct nodes are members.

        Raises:
            TypeError, ValueError: `required` is no positive int; nothing was sent.

        Round trips:
            One.
        """
        check_quorum(required)
        return len(await self.list()) >= required

    @asynccontextmanager
    async def observe(self) -> AsyncGenerator[MemberWatch]:
        """
        Follow who comes and goes: `MemberEvent`s, first one JOINED for each that is there.

        Raises:
            EtcdError: etcd refuses.

        Round trips:
            Two to enter, and one for each member that goes.
        """
        session = await self._sessions.current()
        async with open_mirror(session.backend, KeyRange.prefix(self._line), session.random) as mirror:
            yield MemberWatch(session.backend, self._keys, mirror, session.random)


class _Registration:
    def __init__(self, sessions: SessionSource, keys: Keys, name: str, meta: Mapping[str, object]) -> None:
        self._sessions = sessions
        self._keys = keys
        self._name = name
        self._meta = meta

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Be registered, under one session after the other, until cancelled."""
        failures = 0
        started = False
        while True:
            session = await self._sessions.current()
            try:
                with session.tether():
                    async with self._joined(session) as place:
                        if not started:
                            task_status.started()
                        started, failures = True, 0
                        await _wait_gone(place)
            except SessionLostError:
                continue
            except EtcdError as error:
                if not started:
                    raise
                logger.warning("not registered in %r at the moment: %s", self._name, error)
                await trio.sleep(delay(failures, session.random.random()))
                failures += 1

    @asynccontextmanager
    async def _joined(self, session: Session) -> AsyncGenerator[Place]:
        who = {"node": session.node_id, "since": session.clock.wall(), "meta": self._meta}
        spot = Spot(self._keys.members, self._keys.member_line(self._name))
        place = spot.place(session, JSON.encode(who))
        try:
            await place.join()
            yield place
        finally:
            await place.leave(until=session.clean_up_deadline())


async def _wait_gone(place: Place) -> None:
    gone = trio.Event()
    guarded = place.watch.guard(place.key, place.token, gone.set)
    try:
        await gone.wait()
    finally:
        guarded.forget()


def check_quorum(required: int) -> None:
    """
    Refuse what is no number of nodes.

    Raises:
        TypeError, ValueError: it is no positive int.
    """
    if not isinstance(required, int) or isinstance(required, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"a quorum must be an int, not {required!r}"
        raise TypeError(msg)
    if required < 1:
        msg = f"a quorum must be at least 1, not {required}"
        raise ValueError(msg)
