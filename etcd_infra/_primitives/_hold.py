"""What is held: its fence, how long it is proven, how it ends. Shared by all lock-like primitives."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, contextmanager, suppress
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

import trio

from etcd_infra.errors import EtcdError, LockLostError, NotHeldError, SessionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from etcd_infra._primitives._places import Places
    from etcd_infra._primitives._waitqueue import Place
    from etcd_infra._primitives.fence import Fence
    from etcd_infra._session.own_lease import OwnLease
    from etcd_infra._session.session import Session
    from etcd_infra.errors import LostError

logger = logging.getLogger("etcd_infra.lock")


class LockStatus(StrEnum):
    """
    Where a hold stands.

    ACQUIRED: held. RELEASED: given back by us. EXPIRED: the own deadline passed, or the lease died. FENCED:
    the key is gone under a living lease. FAILED: acquiring ended in an error.
    """

    ACQUIRED = "acquired"
    RELEASED = "released"
    EXPIRED = "expired"
    FENCED = "fenced"
    FAILED = "failed"


class Hold:
    """
    One acquisition, from being granted to its end.

    Attributes:
        fence: The proof to put into writes; worthless once the hold has ended.
    """

    lost_error: ClassVar[type[LostError]] = LockLostError

    def __init__(
        self,
        session: Session,
        place: Place | Places,
        fence: Fence,
        *,
        own: OwnLease | None,
    ) -> None:
        self.fence = fence
        self._session = session
        self._place = place
        self._own = own
        self._owners: list[tuple[bytes, trio.lowlevel.Task]] = []
        self._lease = own.lease if own else session.lease
        self._key_gone = False
        self._released = False
        self._scopes: dict[trio.CancelScope, None] = {}
        self._overdue: Callable[[Exception], None] | None = None
        self._guarded = place.guard(self._on_key_gone)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.fence.resource!r} token={self.token} {self.status}>"

    @property
    def token(self) -> int:
        """The fencing token: larger than every earlier owner's."""
        return self.fence.token

    @property
    def status(self) -> LockStatus:
        """Where the hold stands, by what this process knows at this moment."""
        if self._released:
            return LockStatus.RELEASED
        if self._lease.is_lost() or self._session.lease.is_lost():
            return LockStatus.EXPIRED
        return LockStatus.FENCED if self._key_gone else LockStatus.ACQUIRED

    def remaining(self) -> float:
        """Seconds for which the hold is proven to last; 0 when it has ended."""
        if self.status is not LockStatus.ACQUIRED:
            return 0.0
        return min(self._lease.remaining(), self._session.lease.remaining())

    def check(self) -> None:
        """
        Do nothing while it is held.

        Raises:
            LockLostError: it was taken away.
            NotHeldError: it was released.
        """
        status = self.status
        if status is LockStatus.RELEASED:
            msg = f"{self.fence.resource!r} (token {self.token}) was released already"
            raise NotHeldError(msg)
        if status is not LockStatus.ACQUIRED:
            raise self._loss(status)

    async def extend(self) -> float:
        """
        Renew to the full TTL now, and make sure that the key is still there; never revives.

        Returns:
            Seconds for which it is proven to last now.

        Raises:
            LockLostError: it was taken away.
            NotHeldError: it was released.
            EtcdError: no answer; the hold lasts as long as it did.

        Cancellation:
            The lease may have been renewed.

        Round trips:
            Two.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self.check()
        with suppress(SessionLostError):
            await self._lease.renew()
        if not await self._place.is_there():
            self._on_key_gone()
        self.check()
        return self.remaining()

    async def release(self) -> None:
        """
        Give it back; the next in line is woken.

        Raises:
            LockLostError: it was taken away before.
            NotHeldError: it was released already.

        Cancellation:
            It is released all the same: within two seconds, or by the session's janitor.

        Round trips:
            One; a lock with a lease of its own: two.
        """
        if self._released:
            self.check()
        loss = await self.finish()
        if loss is not None:
            raise loss
        await trio.lowlevel.checkpoint_if_cancelled()

    def is_held(self) -> bool:
        """Whether it is held, by what this process knows at this moment."""
        return self.status is LockStatus.ACQUIRED

    # ── for the primitives ──────────────────────────────────────────────────────────────────────

    def own(self, owner: tuple[bytes, trio.lowlevel.Task]) -> None:
        """Note which task acquired it, and in which line."""
        self._owners.append(owner)
        self._session.owners[owner] = self

    def loss(self) -> LostError:
        """Say why it is held no more."""
        status = self.status
        return self._loss(LockStatus.EXPIRED if status is LockStatus.RELEASED else status)

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[Hold]:
        """Run a body that is cancelled when the hold is lost, and give the hold back afterwards."""
        try:
            with self.tied():
                yield self
        except BaseException as error:
            loss = await self.finish()
            if loss is not None:
                error.add_note(f"and it was lost: {loss}")
            raise
        loss = await self.finish()
        if loss is not None:
            raise loss

    @contextmanager
    def tied(self) -> Generator[None]:
        """Open a cancel scope that ends with the hold."""
        with self._session.tether(self._lease) as tether:
            self._scopes[tether.scope] = None
            try:
                yield
            finally:
                del self._scopes[tether.scope]

    def report_overdue(self, callback: Callable[[Hold, Exception], object]) -> None:
        """Call `callback` when a renewal of the hold's lease is overdue."""

        def overdue(error: Exception) -> None:
            try:
                callback(self, error)
            except Exception:
                logger.exception("on_renewal_failure of %r failed", self)

        self._overdue = overdue
        self._lease.on_overdue.append(overdue)

    async def finish(self) -> LostError | None:
        """Leave the line; return the loss if the hold was lost before (then nothing else was given back)."""
        status = self._let_go()
        if status is LockStatus.RELEASED:
            return None
        self._released = status is LockStatus.ACQUIRED
        until = self._session.clean_up_deadline()
        if await self._place.leave(until=until) is False and self._released:
            # The key was gone before we let go of it: somebody deleted it, or our lease.
            self._released, self._key_gone = False, True
        if not self._released:
            await self._find_out_why(until)
        if self._own is not None:
            await self._own.end(until=until)
        if self._released:
            self._session.tally.lock_releases += 1
            return None
        return self._loss(self.status)

    def _let_go(self) -> LockStatus:
        """Be told of nothing any more, and own nothing; return where the hold stood."""
        for guarded in self._guarded:
            guarded.forget()
        if self._overdue is not None:
            self._lease.on_overdue.remove(self._overdue)
            self._overdue = None
        status = self.status
        if status is not LockStatus.RELEASED:
            for owner in self._owners:
                if self._session.owners.get(owner) is self:
                    del self._session.owners[owner]
        return status

    async def _find_out_why(self, until: float) -> None:
        # A deleted key may be an operator's doing, or the lease's end: only etcd can tell which.
        with trio.move_on_at(until, shield=True), suppress(EtcdError, SessionLostError):
            if not self._lease.is_lost():
                await self._lease.renew()

    def _on_key_gone(self) -> None:
        self._key_gone = True
        self._lease.examine()
        self._cancel_body()

    def _cancel_body(self) -> None:
        for scope in tuple(self._scopes):
            scope.cancel()

    def _loss(self, status: LockStatus) -> LostError:
        reasons = {
            LockStatus.EXPIRED: f"its lease is lost: {self._lease.error or self._session.lease.error}",
            LockStatus.FENCED: "its key was deleted under a living lease",
            LockStatus.ACQUIRED: "a write under its fence was refused",
        }
        return self.lost_error(f"{self.fence.resource!r} (token {self.token}): {reasons[status]}")
