"""A lease granted and revoked although answers get lost: under an id of our own, a grant may be repeated."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from etcd_infra._policy.backoff import delay
from etcd_infra._session.keepalive import LivingLease, clean_up_deadline
from etcd_infra.errors import (
    EtcdError,
    LeaseExistsError,
    LeaseNotFoundError,
    OutcomeUnknownError,
    UnavailableError,
)

if TYPE_CHECKING:
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._session.clock import Clock, Instant

logger = logging.getLogger("etcd_infra.session")


async def revoke(backend: Backend, lease: int) -> None:
    """Revoke a lease; one that is gone is as good. An `EtcdError` means that nothing is definite."""
    with suppress(LeaseNotFoundError):
        await backend.lease_revoke(lease)


async def revoke_in_time(backend: Backend, lease: int, random: Random, *, until: float) -> bool:
    """Repeat `revoke`, shielded, until Trio's time `until` at most; return whether it is definite."""
    failures = 0
    with trio.move_on_at(until, shield=True):
        while True:
            try:
                await revoke(backend, lease)
            except EtcdError as error:
                logger.info("lease %x is not revoked yet: %s", lease, error)
                await trio.sleep(delay(failures, random.random()))
                failures += 1
            else:
                return True
    return False


async def grant(backend: Backend, clock: Clock, random: Random, *, ttl: int) -> LivingLease:
    """
    Grant a lease under a new id of our own, repeating until etcd answers.

    Raises:
        StorageFullError, AccessDeniedError, InvalidRequestError: etcd refuses.

    Cancellation:
        The lease is revoked, in two seconds at most; a late copy of the grant runs out after its TTL.

    Round trips:
        One.
    """
    attempts = _Attempts(backend, clock, random, ttl)
    failures = 0
    try:
        while (lease := await attempts.next()) is None:
            await trio.sleep(delay(failures, random.random()))
            failures += 1
    except BaseException:
        if attempts.unanswered is not None:
            await revoke_in_time(backend, attempts.id, random, until=clean_up_deadline())
        raise
    return lease


class _Attempts:
    """
    The copies of one grant.

    Attributes:
        id: The lease's.
        unanswered: When the first copy was sent that may have been applied unknown to us; None: there is none.
    """

    def __init__(self, backend: Backend, clock: Clock, random: Random, ttl: int) -> None:
        self._backend = backend
        self._clock = clock
        self._random = random
        self._ttl = ttl
        self.id = random.getrandbits(63) or 1
        self.unanswered: Instant | None = None

    async def next(self) -> LivingLease | None:
        """Send one copy; return the lease if one is known to live."""
        sent_at = self._clock.now()
        earlier, self.unanswered = self.unanswered, self.unanswered or sent_at
        try:
            granted = await self._backend.lease_grant(self._ttl, lease=self.id)
        except OutcomeUnknownError:
            return None
        except UnavailableError:
            self.unanswered = earlier
            return None
        except LeaseExistsError:
            self.unanswered = earlier
            return await self._adopt(earlier)
        except EtcdError:
            self.unanswered = earlier
            raise
        # This copy made the lease: after an earlier one it would have been told that it exists.
        return self._living(granted.ttl, sent_at)

    async def _adopt(self, earlier: Instant | None) -> LivingLease | None:
        if earlier is None:  # a stranger's, by the oddest of chances
            self.id = self._random.getrandbits(63) or 1
            return None
        # An earlier copy of ours worked: the lease has run since then at the latest.
        try:
            ttl = (await self._backend.lease_time_to_live(self.id)).granted_ttl
        except UnavailableError:
            return None
        return self._living(ttl, earlier) if ttl > 0 else None

    def _living(self, ttl: int, sent_at: Instant) -> LivingLease:
        return LivingLease(self._backend, self._clock, self._random, lease=self.id, ttl=ttl, sent_at=sent_at)
