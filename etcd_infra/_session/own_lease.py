"""A lease for one thing only, kept alive in its session's background."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from etcd_infra._session.granting import revoke, revoke_in_time

if TYPE_CHECKING:
    from etcd_infra._session.keepalive import LivingLease
    from etcd_infra._session.session import Session


class OwnLease:
    """A lease of one hold, kept alive in the session's background until `stop`."""

    def __init__(self, session: Session, lease: LivingLease) -> None:
        self._session = session
        self._scope = trio.CancelScope()
        self.lease = lease
        session.own_leases[lease] = None
        session.start_soon(self._keep_alive)

    async def _keep_alive(self) -> None:
        with self._scope:
            await self.lease.keep_alive()

    def stop(self) -> None:
        """Renew no more; the lease runs out by itself."""
        self._scope.cancel()

    async def end(self, *, until: float) -> None:
        """Revoke, shielded, until Trio's time `until` at most; what is left then, the janitor does."""
        self.stop()
        self._session.own_leases.pop(self.lease, None)
        backend = self._session.backend
        if not await revoke_in_time(backend, self.lease.id, self._session.random, until=until):
            self._session.janitor.take_over(lambda: revoke(backend, self.lease.id))
