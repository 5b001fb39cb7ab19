"""
One state key written: its value, its lease, its conditions.

A put without a TTL detaches the key from the lease that it had (the key lives for ever), unless it says
that it keeps the lease. A put with a TTL has a lease of its own, granted before, that nobody renews: if the
write is refused, the lease is revoked in the background; if it may have been applied (cancelled, or
unknown), the lease must not be touched, as the key may hang on it, and ends by itself.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Operator, Put, Range, Target
from etcd_infra._primitives._cas import Change, Committed, Refused, commit, found_in
from etcd_infra.errors import EtcdError, EtcdInfraError, LeaseNotFoundError, OutcomeUnknownError

if TYPE_CHECKING:
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.fence import Fence
    from etcd_infra._session.keepalive import LivingLease
    from etcd_infra._session.session import Session

LATE: Final = 0.1


async def put_key(  # noqa: PLR0913
    space: Space,
    key: bytes,
    value: bytes,
    *,
    expected_version: int | None = None,
    ttl: int | None = None,
    keep_lease: bool = False,
    fence: Fence | None = None,
) -> Committed | Refused:
    """
    Put one key, if it has the expected version; a refusal shows what is there.

    Args:
        space: Where.
        key: The full key.
        value: Encoded.
        expected_version: 0: absent. None: whatever there is.
        ttl: Seconds from the write on; None: for ever.
        keep_lease: Stay on the lease that the key has; it must exist.
        fence: A proof that must hold.

    Raises, Cancellation:
        As `commit`.

    Round trips:
        One; with a TTL two.
    """
    session = await space.sessions.current()
    while True:
        began = trio.current_time()
        lease = None if ttl is None else await space.ttl_leases.grant(session, ttl)
        put = Put(key, value, lease=lease.id if lease else 0, ignore_lease=keep_lease)
        change = Change(
            (Range(KeyRange.one(key), keys_only=True), put),
            (key,),
            () if expected_version is None else (Compare.modified_at(key, expected_version),),
            (Range(KeyRange.one(key)),),
            fence,
        )
        try:
            outcome = await commit(space.sessions, space.keys, change)
        except OutcomeUnknownError:
            raise
        except LeaseNotFoundError:
            if lease is None:
                raise
            _drop(space, session, lease)
            continue  # it ended before the write came through; nothing was written
        except EtcdInfraError:
            _drop(space, session, lease)
            raise
        if isinstance(outcome, Refused):
            _drop(space, session, lease)
        elif not keep_lease:
            _leave_old_lease(space, session, outcome)
            await _renew_if_late(session, lease, trio.current_time() - began)
        return outcome


async def delete_key(
    space: Space, key: bytes, *, expected_version: int | None = None, fence: Fence | None = None
) -> Committed | Refused:
    """
    Delete one key that exists, if it has the expected version; a refusal shows what is there.

    Raises, Cancellation:
        As `commit`.

    Round trips:
        One.
    """
    session = await space.sessions.current()
    one = KeyRange.one(key)
    exists = Compare(Target.CREATE, Operator.GREATER, one, 0)
    change = Change(
        (Range(one, keys_only=True), DeleteRange(one)),
        (key,),
        (exists if expected_version is None else Compare.modified_at(key, expected_version),),
        (Range(one, keys_only=True),),
        fence,
    )
    outcome = await commit(space.sessions, space.keys, change)
    if isinstance(outcome, Committed):
        _leave_old_lease(space, session, outcome)
    return outcome


def _drop(space: Space, session: Session, lease: LivingLease | None) -> None:
    if lease is not None:
        space.ttl_leases.drop(session, lease.id)


def _leave_old_lease(space: Space, session: Session, outcome: Committed) -> None:
    # With a lost answer nothing is known of what was there: its lease ends by itself.
    if outcome.results:
        for before in found_in(outcome.results[0]):
            space.ttl_leases.drop(session, before.lease)


async def _renew_if_late(session: Session, lease: LivingLease | None, seconds: float) -> None:
    """Let the TTL count from the write, if that had to wait: for answers, or for a prepared transaction."""
    if lease and seconds > lease.ttl * LATE:
        with suppress(EtcdError):
            await session.backend.lease_keep_alive(lease.id)
