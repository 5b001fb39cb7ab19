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
    lease = random.getrandbits(63) or 1
    sent_at: Instant | None = None
    failures = 0
    try:
        while True:
            first_copy = sent_at is None
            sent_at = sent_at or clock.now()
            try:
                granted_ttl = (await backend.lease_grant(ttl, lease=lease)).ttl
                return LivingLease(backend, clock, random, lease=lease, ttl=granted_ttl, sent_at=sent_at)
            except LeaseExistsError:
                if not first_copy and (found := await _adopt(backend, lease)):
                    return LivingLease(backend, clock, random, lease=lease, ttl=found, sent_at=sent_at)
                lease, sent_at = random.getrandbits(63) or 1, None
                continue
            except UnavailableError:
                sent_at = None if first_copy else sent_at
            except OutcomeUnknownError:
                pass
            await trio.sleep(delay(failures, random.random()))
            failures += 1
    except trio.Cancelled:
        if sent_at is not None:
            await revoke_in_time(backend, lease, random, until=clean_up_deadline())
        raise


async def _adopt(backend: Backend, lease: int) -> int:
    # The first copy of our grant worked: the lease has run since then, for as long as the server said.
    return (await backend.lease_time_to_live(lease)).granted_ttl
