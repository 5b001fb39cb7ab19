"""
A lease that this process keeps alive, and until when its last answer may be trusted.

The rule: a renewal sent at `t` and answered with TTL `T` proves life until `t + T - margin`, on the later of
the monotonic and the boot-time clock; never from the answer's arrival. Once that time has passed, the lease
is LOST for this process, whatever arrives later: somebody may have been told so already.

etcd: a renewal can succeed for a lease that is gone, and a renewed lease can be revoked by a leader that
was paused. So this clock is a bound, never a proof of holding: holders watch their key, and carry a fence.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._policy.backoff import delay
from etcd_infra.errors import EtcdError, LeaseNotFoundError, SessionLostError, StoreResetError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random
    from types import TracebackType
    from typing import Self

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._session.clock import Clock, Instant

logger = logging.getLogger("etcd_infra.session")

CLEAN_UP_SECONDS: Final = 2.0
ATTEMPT_SECONDS: Final = 2.0
SUSPEND_CHECK_SECONDS: Final = 1.0
LAST_MOMENT_SECONDS: Final = 0.001


class SessionStatus(StrEnum):
    """Whether a lease's life is proven (ALIVE), a renewal is overdue (SUSPENDED), or it is over (LOST)."""

    ALIVE = "alive"
    SUSPENDED = "suspended"
    LOST = "lost"


def clean_up_deadline() -> float:
    """Return Trio's time at which a shielded clean-up that begins now must end."""
    return trio.current_time() + CLEAN_UP_SECONDS


def margin(ttl: float) -> float:
    """Seconds by which trust ends before the lease does: for clock rates, and for being late."""
    return max(0.5, 0.1 * ttl)


class LivingLease:
    """
    One lease of this process: its proof of life, its renewals, and who must be told of its end.

    Args:
        backend: Renewals go through it, each to another member than the one before.
        lease: The id.
        ttl: Seconds, as granted.
        sent_at: When the (first copy of the) grant was sent.
    """

    def __init__(  # noqa: PLR0913
        self, backend: Backend, clock: Clock, random: Random, *, lease: int, ttl: int, sent_at: Instant
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._random = random
        self._proven_at = sent_at
        self._tethers: dict[Tether, None] = {}
        self.highest_revision = 0
        self._hurry = trio.Event()
        self.id = lease
        self.ttl = ttl
        self._trusted = ttl - margin(ttl)
        self.status = SessionStatus.ALIVE
        self.error: Exception | None = None
        self.lost = trio.Event()
        self.closed = False
        self.on_overdue: list[Callable[[Exception], None]] = []
        self.on_status: dict[Callable[[], None], None] = {}

    # ── trust ───────────────────────────────────────────────────────────────────────────────────

    def remaining(self) -> float:
        """Seconds of life that are proven; 0 when lost."""
        if self.status is SessionStatus.LOST:
            return 0.0
        return max(0.0, self._trusted - self._clock.since(self._proven_at))

    def is_lost(self) -> bool:
        """Whether it is over; looks at the clocks, so that it is true at once after a long pause."""
        # A scope's deadline and this look may differ by a rounding: both must say the same.
        if self.status is not SessionStatus.LOST and self.remaining() <= LAST_MOMENT_SECONDS:
            self.lose(SessionLostError(f"lease {self.id:x}: no renewal was answered in time"))
        return self.status is SessionStatus.LOST

    def lose(self, error: Exception) -> None:
        """End it for this process; scopes tied to it are cancelled. The first reason stays."""
        if self.status is SessionStatus.LOST:
            return
        self.error = error
        self.lost.set()
        for tether in tuple(self._tethers):
            tether.scope.cancel()
        self._become(SessionStatus.LOST)

    def prove(self, sent_at: Instant, ttl: int) -> None:
        """Take a renewal's answer in; it moves every deadline, but never revives."""
        if self.is_lost():
            return
        self.ttl = ttl
        self._trusted = ttl - margin(ttl)
        if sent_at.monotonic >= self._proven_at.monotonic:
            self._proven_at = sent_at
        self._become(SessionStatus.ALIVE)
        self.refresh()

    def refresh(self) -> None:
        """Bring the deadlines of all tied scopes up to date (the two clocks may have drifted apart)."""
        if not self.is_lost():
            for tether in tuple(self._tethers):
                tether.update()

    @property
    def deadline(self) -> float:
        """Trio's time at which trust ends."""
        return trio.current_time() + self.remaining()

    def tie(self, tether: Tether) -> None:
        """Cancel the tether's scope when this lease is lost."""
        self._tethers[tether] = None
        if self.is_lost():
            tether.scope.cancel()

    def untie(self, tether: Tether) -> None:
        """Undo `tie`."""
        self._tethers.pop(tether, None)

    def _become(self, status: SessionStatus) -> None:
        if self.status is not status:
            self.status = status
            for listener in tuple(self.on_status):
                listener()

    # ── renewal ─────────────────────────────────────────────────────────────────────────────────

    async def keep_alive(self) -> None:
        """
        Renew every fifth of the TTL until the lease is lost.

        It runs on the Trio loop on purpose: a process whose loop hangs should lose its leases.

        Cancellation:
            Nothing is left behind; the lease runs out by itself.
        """
        misses = 0
        await self._rest(trio.current_time() + self.ttl / 5)
        while not self.is_lost():
            began = trio.current_time()
            error = await self._attempt()
            if self.is_lost():
                break
            if error is None:
                misses = 0
                await self._rest(began + self.ttl / 5)
            else:
                self._overdue(error, first=misses == 0)
                pause = delay(misses, self._random.random(), cap=min(0.5, self.ttl / 20))
                misses += 1
                await trio.sleep(pause)

    def examine(self) -> None:
        """Make the next renewal now: there is reason to doubt that the lease exists."""
        self._hurry.set()

    async def renew(self) -> None:
        """
        Renew once.

        Raises:
            SessionLostError: the lease does not exist (any more).
            EtcdError: no answer; the lease may have been renewed.
        """
        sent_at = self._clock.now()
        answer = await self._backend.lease_keep_alive(self.id)
        if answer.ttl > 0:
            await self._check_history(answer.revision)
            self.highest_revision = max(self.highest_revision, answer.revision)
            self.prove(sent_at, answer.ttl)
        # etcd: right after the grant a member that lags may not know the lease yet (#13675): ask again.
        elif (await self._backend.lease_time_to_live(self.id)).ttl < 0:
            self.lose(SessionLostError(f"lease {self.id:x} does not exist any more"))
        else:
            msg = f"a member does not know lease {self.id:x} yet"
            raise UnavailableError(msg)
        if self.is_lost():
            raise self.error or SessionLostError(f"lease {self.id:x} is lost")

    async def _attempt(self) -> Exception | None:
        # Each renewal is a short call of its own: through one member it may hang for 7 s while the leader
        # is paused, and the next one goes to another member.
        seconds = min(self.ttl / 5, ATTEMPT_SECONDS, max(self.remaining(), 0.001))
        self._hurry = trio.Event()
        with trio.move_on_after(seconds) as scope:
            try:
                await self.renew()
            except LeaseNotFoundError as error:
                self.lose(SessionLostError(f"lease {self.id:x} does not exist any more: {error}"))
            except (EtcdError, SessionLostError) as error:
                return error
        return UnavailableError(f"no answer within {seconds:.2f} s") if scope.cancelled_caught else None

    async def _rest(self, until: float) -> None:
        # Race: a suspended machine's monotonic clock stands still; looking at both clocks every second
        # bounds how long after waking up the loss is noticed.
        while trio.current_time() < until and not self.is_lost():
            wake_at = min(until, trio.current_time() + SUSPEND_CHECK_SECONDS)
            with trio.move_on_at(wake_at):
                await self._hurry.wait()
                return
            if (late := trio.current_time() - wake_at) > self.ttl / 3:
                logger.warning("the event loop was blocked for %.1f s; leases last %d s", late, self.ttl)
            self.refresh()

    async def _check_history(self, revision: int) -> None:
        # etcd: cluster_id does not change at a restore; only the revision tells, and a member may lag.
        seen = self.highest_revision
        if revision < seen:
            read = await self._backend.range(Range(KeyRange.one(b"\0"), count_only=True))
            self.saw_revision(read.revision, at_least=seen)

    def saw_revision(self, revision: int, *, at_least: int) -> None:
        """
        Take in the revision of a linearizable answer.

        Args:
            revision: The answer's.
            at_least: The highest revision that was known when the request was sent. A lower answer comes
                from a store that was restored or wiped: tokens go back there, so the lease is lost.
        """
        if revision < at_least:
            self.lose(StoreResetError(f"the store is at revision {revision}, and was at {at_least}"))
        self.highest_revision = max(self.highest_revision, revision)

    def _overdue(self, error: Exception, *, first: bool) -> None:
        self._become(SessionStatus.SUSPENDED)
        if not first:
            return
        logger.warning("lease %x: a renewal is overdue (%s); %.1f s left", self.id, error, self.remaining())
        for listener in tuple(self.on_overdue):
            listener(error)


class Tether:
    """A cancel scope that ends when any of its leases does; its deadline moves with their renewals."""

    __slots__ = ("leases", "scope")

    def __init__(self, *leases: LivingLease) -> None:
        self.leases = leases
        self.scope = trio.CancelScope(deadline=self._end_of_trust())

    def __enter__(self) -> Self:
        self.scope.__enter__()
        for lease in self.leases:
            lease.tie(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for lease in self.leases:
            lease.untie(self)
        return self.scope.__exit__(kind, error, trace)

    def update(self) -> None:
        """Set the scope's deadline to the earliest end of trust."""
        # A deadline, not only a cancel by the renewal task: a loop that was blocked for a minute must
        # see the end at its first checkpoint, whichever task runs first.
        self.scope.deadline = self._end_of_trust()

    def _end_of_trust(self) -> float:
        return min([lease.deadline for lease in self.leases])
