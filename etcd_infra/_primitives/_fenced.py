"""A scope that lasts as long as a fence, perhaps another task's, is current."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from etcd_infra._etcd.model import Txn
from etcd_infra.errors import FencedError, LockLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from etcd_infra._primitives.fence import Fence
    from etcd_infra._session.key_watch import KeyWatch
    from etcd_infra._session.session import Session


@asynccontextmanager
async def fenced(session: Session, watch: KeyWatch, fence: Fence) -> AsyncGenerator[None]:
    """See `Lock.fenced`."""
    if not (await session.backend.txn(Txn(compare=fence.proof))).succeeded:
        msg = f"token {fence.token} of {fence.resource!r} is not the owner's any more"
        raise FencedError(msg)
    stale = False
    with session.tether() as tether:

        def gone() -> None:
            nonlocal stale
            stale = True
            tether.scope.cancel()

        guarded = watch.guard(fence.proof[0].range.key, fence.token, gone)
        try:
            yield
        finally:
            guarded.forget()
    if stale or tether.scope.cancelled_caught:
        msg = f"token {fence.token} of {fence.resource!r} stopped being the owner's"
        raise LockLostError(msg)
