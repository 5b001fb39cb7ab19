"""
What is taken, held and given back: one acquisition at a time per task, each a `Hold` of its own.

Locks, both sides of a read-write lock, and semaphores are made of it; they differ in where one stands in line.
"""

# Over the budget of 250 lines: half of them are the docstrings of the public surface.

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import Compare, KeyRange, Range, SortTarget, Txn
from etcd_infra._primitives._fenced import fenced
from etcd_infra._primitives._hold import Hold, LockStatus
from etcd_infra._primitives._owner import check_not_owner, take_once
from etcd_infra._primitives._turn import come_first
from etcd_infra._primitives._who import introduce
from etcd_infra._primitives.fence import Fence
from etcd_infra._session.granting import grant
from etcd_infra._session.own_lease import OwnLease
from etcd_infra._session.ttl import check_ttl
from etcd_infra.errors import LockLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._etcd.keys import Keys
    from etcd_infra._primitives._waitqueue import Place, Spot
    from etcd_infra._session.current import SessionSource
    from etcd_infra._session.session import Session


class Renewal(StrEnum):
    """AUTO: kept alive until released. MANUAL: nobody renews it but `Hold.extend`."""

    AUTO = "auto"
    MANUAL = "manual"


class LockLike(ABC):
    """
    A name; every acquisition is a `Hold` of its own.

    ``async with lock as hold:`` waits for its turn, cancels the body if the lock is lost, and releases it at
    the end. The same task twice is a `RuntimeError`.

    Args:
        sessions: A session, or what replaces it when it is lost.
        keys: The namespace's key layout.
        name: Non-empty, at most 512 bytes.
        ttl: Whole seconds, at least 1: a lease of its own (one more round trip each to acquire and to
            release); None: the session's lease.
        renewal: MANUAL: a lease of its own that nobody keeps alive once the lock is held.
        on_renewal_failure: Called with the hold and the error when a renewal is overdue, once until it
            succeeds again. It must not block; what it raises is logged.

    Attributes:
        status: Where the latest acquisition through this object stands; None before the first.
    """

    def __init__(  # noqa: PLR0913
        self,
        sessions: SessionSource,
        keys: Keys,
        name: str,
        *,
        ttl: int | None = None,
        renewal: Renewal = Renewal.AUTO,
        on_renewal_failure: Callable[[Hold, Exception], object] | None = None,
    ) -> None:
        self.name = name
        self._sessions = sessions
        self._keys = keys
        self._spot = self._find_spot()
        self._line = self._spot.line
        self._ttl = None if ttl is None else check_ttl(ttl)
        self._renewal = Renewal(renewal)
        self._on_renewal_failure = on_renewal_failure
        self._scopes: dict[trio.lowlevel.Task, list[AbstractAsyncContextManager[Hold]]] = {}
        self._latest: Hold | None = None
        self._failed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    @abstractmethod
    def _find_spot(self) -> Spot:
        """Say where one stands in line; called once, while it is made."""

    @property
    def status(self) -> LockStatus | None:
        """Where the latest acquisition through this object stands."""
        if self._failed:
            return LockStatus.FAILED
        return self._latest.status if self._latest else None

    # ── acquiring ───────────────────────────────────────────────────────────────────────────────

    async def acquire(self) -> Hold:
        """
        Wait until the lock is held, oldest request first.

        The hold is the caller's to release; nothing is cancelled when it is lost: use `Hold.check`.

        Raises:
            RuntimeError: this task holds it, or waits for it, already.
            SessionLostError: the session was lost meanwhile; the place in line goes with it.
            LockLostError: somebody deleted the place in line, or the lock's own lease ended.
            StorageFullError, AccessDeniedError: etcd refuses.

        Cancellation:
            Leaves the line within two seconds; what is left, the session's janitor does.

        Round trips:
            One if free; otherwise one more for each predecessor seen, none for those in this process. With
            a lease of its own one more, and one more still if it is MANUAL and had to wait.
        """
        hold = await self._acquire(wait=True)
        assert hold is not None
        return hold

    @asynccontextmanager
    async def attempt(self) -> AsyncGenerator[Hold | None]:
        """
        Hold the lock for the body if nobody is in line, else run the body with None; never wait.

        Raises, Cancellation:
            As ``async with lock``. After None nothing of the attempt is left, nor will it come back.

        Round trips:
            One, and one to release; with a lease of its own one more each, refused or not.
        """
        hold = await self._acquire(wait=False)
        if hold is None:
            yield None
            return
        async with hold.scope():
            yield hold

    async def __aenter__(self) -> Hold:
        scope = (await self.acquire()).scope()
        # A task may enter again when an outer hold of its own was lost: so a stack.
        self._scopes.setdefault(trio.lowlevel.current_task(), []).append(scope)
        return await scope.__aenter__()

    async def __aexit__(self, *exc_info: object) -> bool | None:
        task = trio.lowlevel.current_task()
        scope = self._scopes[task].pop()
        if not self._scopes[task]:
            del self._scopes[task]
        return await scope.__aexit__(*exc_info)  # type: ignore[arg-type]

    async def _acquire(self, *, wait: bool) -> Hold | None:
        session = await self._sessions.current()
        check_not_owner(session, self._line, self)
        try:
            hold = await take_once(session, self._line, partial(self._take, session, wait=wait))
        except Exception:
            self._failed = True
            raise
        self._latest, self._failed = hold or self._latest, False
        return hold

    async def _take(self, session: Session, *, wait: bool) -> Hold | None:
        own: OwnLease | None = None
        if self._ttl is not None or self._renewal is Renewal.MANUAL:
            ttl = self._ttl or session.lease.ttl
            own = OwnLease(session, await grant(session.backend, session.clock, session.random, ttl=ttl))
        place = self._spot.place(session, introduce(session), own.lease if own else None)
        try:
            if not await self._come_first(session, place, wait=wait):
                if own:
                    await own.end(until=session.clean_up_deadline())
                return None
            if own:
                await self._settle(place, own)
        except BaseException:
            until = session.clean_up_deadline()
            await place.leave(until=until)
            if own:
                await own.end(until=until)
            raise
        return self._granted(session, place, own)

    async def _settle(self, place: Place, own: OwnLease) -> None:
        """Leave the lock's own lease as the hold needs it; it must have outlived the wait."""
        if self._renewal is Renewal.MANUAL:
            own.stop()
            if place.waited:
                await own.lease.renew()
        if own.lease.is_lost():
            msg = f"{self.name!r}: its own lease ended while it was being acquired: {own.lease.error}"
            raise LockLostError(msg)

    async def _come_first(self, session: Session, place: Place, *, wait: bool) -> bool:
        if wait:
            await come_first(place)
        else:
            await place.try_join()
        if place.waited or not place.is_first:
            session.tally.lock_conflicts += 1
        return place.is_first

    def _granted(self, session: Session, place: Place, own: OwnLease | None) -> Hold:
        proof = (Compare.created_at(place.key, place.token),)
        fence = Fence(self.name, place.token, session.own_key.epoch, proof)
        hold = Hold(session, place, fence, own=own)
        if self._on_renewal_failure is not None:
            hold.report_overdue(self._on_renewal_failure)
        session.tally.lock_acquisitions += 1
        return hold

    # ── looking ─────────────────────────────────────────────────────────────────────────────────

    async def validate(self, fence: Fence) -> bool:
        """
        Ask whether `fence` is still the owner's: a check, never a guard (put the proof into the write).

        Raises:
            ValueError: it is another resource's fence, or carries no proof.
            TypeError: it is no `Fence`.

        Round trips:
            One.
        """
        self._check_fence(fence)
        session = await self._sessions.current()
        return (await session.backend.txn(Txn(compare=fence.proof))).succeeded

    def _check_fence(self, fence: Fence) -> None:
        if not isinstance(fence, Fence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a Fence is needed, such as a hold's `fence`, not {fence!r}")
        if fence.resource != self.name or not fence.proof:
            msg = f"this is no fence of {self.name!r}: {fence}"
            raise ValueError(msg)

    async def current_token(self) -> int | None:
        """
        Ask for the owner's token; None if nobody is in line. A check, never a guard.

        Round trips:
            One.
        """
        session = await self._sessions.current()
        line = KeyRange.prefix(self._line)
        oldest = Range(line, sort_by=SortTarget.CREATE, keys_only=True, limit=1)
        kvs = (await session.backend.range(oldest)).kvs
        return kvs[0].create_revision if kvs else None

    @asynccontextmanager
    async def fenced(self, fence: Fence) -> AsyncGenerator[None]:
        """
        Run a body that is cancelled when `fence`, perhaps another task's, stops being current.

        Raises:
            FencedError: it is not current on entering; the body did not run.
            LockLostError: it stopped being current meanwhile, or can not be watched any more.
            ValueError: it is another resource's fence, or carries no proof.
            TypeError: it is no `Fence`.

        Round trips:
            One.
        """
        self._check_fence(fence)
        session = await self._sessions.current()
        async with fenced(session, self._spot.watch(session), fence):
            yield
