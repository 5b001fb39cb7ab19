"""The leases under which values with a TTL are written: one for each write, renewed by nobody."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from etcd_infra._session.granting import grant, revoke

if TYPE_CHECKING:
    from etcd_infra._session.keepalive import LivingLease
    from etcd_infra._session.session import Session

MAX_REMEMBERED: Final = 4096


class TtlLeases:
    """
    The leases that this process granted for single keys.

    When such a key is replaced or deleted by this process, its lease goes, too: a key that is written each
    second with a TTL of a day must not leave 86,400 leases. A lease that is not remembered ends by itself;
    it may be anybody's, so nobody else revokes it.
    """

    def __init__(self) -> None:
        self._remembered: dict[int, None] = {}

    async def grant(self, session: Session, ttl: int) -> LivingLease:
        """
        Grant a lease for one key.

        Raises:
            EtcdError: etcd refuses.

        Cancellation:
            The lease is revoked, in two seconds at most.

        Round trips:
            One.
        """
        lease = await grant(session.backend, session.clock, session.random, ttl=ttl)
        self._remembered[lease.id] = None
        if len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        return lease

    def drop(self, session: Session, lease: int) -> None:
        """Revoke a lease in the background, if it is one of these; its key must not hang on it (any more)."""
        if lease in self._remembered:
            del self._remembered[lease]
            session.janitor.take_over(partial(revoke, session.backend, lease))
