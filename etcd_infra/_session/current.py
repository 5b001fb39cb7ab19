"""The session of this moment: opened anew, under a new lease, whenever the one before was lost."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import trio

from etcd_infra._policy.backoff import delay
from etcd_infra.errors import EtcdError, SessionLostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from random import Random

    from etcd_infra._session.session import Session

logger = logging.getLogger("etcd_infra.session")


class SessionSource(Protocol):
    """Where a primitive gets its session from: a `Session` itself, or one that is replaced when lost."""

    @property
    def session(self) -> Session | None:
        """The session of this moment, perhaps a lost one; None while it is being replaced."""
        ...

    async def current(self) -> Session:
        """Return a living session; wait for it, or raise `SessionLostError` if there will be none."""
        ...


class CurrentSession:
    """
    One session after the other; `run` must be running in the background.

    Args:
        opening: Opens one more session.
    """

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[Session]], random: Random) -> None:
        self._opening = opening
        self._random = random
        self._session: Session | None = None
        self._opened = trio.Event()
        self._closed = False

    @property
    def session(self) -> Session | None:
        """The session of this moment; None while a lost one is being replaced."""
        return self._session

    async def current(self) -> Session:
        """
        Wait for a living session.

        Raises:
            SessionLostError: there will be none any more.
        """
        while (session := self._session) is None or session.lease.is_lost():
            if self._closed:
                msg = "the coordinator was closed"
                raise SessionLostError(msg)
            await self._opened.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        return session

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """
        Keep a session open; started once the first one is.

        Raises:
            EtcdError: the first session was refused.
        """
        try:
            await self._replace_for_ever(task_status)
        finally:
            self._closed = True
            self._opened.set()

    async def _replace_for_ever(self, task_status: trio.TaskStatus[None]) -> None:
        failures = 0
        first = True
        while True:
            try:
                async with self._opening() as session:
                    self._session = session
                    self._opened.set()
                    if first:
                        task_status.started()
                    first, failures = False, 0
                    await session.wait_lost()
                    self._opened = trio.Event()
                    logger.warning("session %x was lost: %s", session.lease.id, session.lease.error)
            except (EtcdError, SessionLostError) as error:
                # A lease that ran out before its session key was written is no refusal.
                if first and not isinstance(error, SessionLostError):
                    raise
                logger.warning("no new session yet: %s", error)
                await trio.sleep(delay(failures, self._random.random()))
                failures += 1
