"""Which task of a session owns what, so that none waits for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from etcd_infra._primitives._hold import Hold
    from etcd_infra._session.session import Session

HoldT = TypeVar("HoldT", bound="Hold")


def check_not_owner(session: Session, line: bytes, what: object) -> None:
    """
    Refuse to wait for oneself.

    Raises:
        RuntimeError: this task owns `line`, or waits for it, already.
    """
    owner = (line, trio.lowlevel.current_task())
    if owner in session.owners and ((held := session.owners[owner]) is None or held.is_held()):
        msg = f"this task holds {what!r}, or waits for it, already"
        raise RuntimeError(msg)


async def take_once(session: Session, line: bytes, take: Callable[[], Awaitable[HoldT | None]]) -> HoldT | None:
    """
    Take what `line` is for, and note that this task owns it; call `check_not_owner` before.

    Raises:
        SessionLostError: the session was lost meanwhile.
        BaseException: what `take` raises.
    """
    owner = (line, trio.lowlevel.current_task())
    session.owners[owner] = None
    hold: HoldT | None = None
    try:
        with session.tether():
            hold = await take()
        if hold is None:
            session.check()
    finally:
        if hold is None:
            del session.owners[owner]
    if hold is not None:
        hold.own(owner)
    return hold
