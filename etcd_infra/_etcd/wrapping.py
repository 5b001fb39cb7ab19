"""A backend around a backend: every verb passes through one method, which is all that a wrapper overrides."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from etcd_infra._etcd.backend import Backend

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from etcd_infra._etcd.backend import WatchStream
    from etcd_infra._etcd.model import (
        KeyRange,
        LeaseGrant,
        LeaseRenewal,
        LeaseTimeToLive,
        Range,
        RangeResult,
        Status,
        Txn,
        TxnResult,
    )

T = TypeVar("T")


class Wrapping(Backend):
    """Passes everything on to `inner`, through `around`."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    async def around(self, verb: str, request: object, call: Callable[[], Awaitable[T]]) -> T:
        """
        Make one call.

        Args:
            verb: The waist's name of it; a watch comes by when it is being created.
            request: The `Range` or `Txn`, the watched range, a lease id, a revision, or None.
            call: Sends it; may be called again to send another copy.
        """
        del verb, request
        return await call()

    async def range(self, request: Range, /) -> RangeResult:
        """See `Backend`."""
        return await self.around("range", request, lambda: self.inner.range(request))

    async def txn(self, request: Txn, /) -> TxnResult:
        """See `Backend`."""
        return await self.around("txn", request, lambda: self.inner.txn(request))

    @asynccontextmanager
    async def watch(  # noqa: PLR0913
        self,
        range: KeyRange,  # noqa: A002
        /,
        *,
        start_revision: int = 0,
        prev_kv: bool = False,
        no_put: bool = False,
        no_delete: bool = False,
        progress_notify: bool = False,
        coordination: bool = False,
    ) -> AsyncGenerator[WatchStream]:
        """See `Backend`."""
        watching = self.inner.watch(
            range,
            start_revision=start_revision,
            prev_kv=prev_kv,
            no_put=no_put,
            no_delete=no_delete,
            progress_notify=progress_notify,
            coordination=coordination,
        )
        stream = await self.around("watch", range, watching.__aenter__)
        try:
            yield stream
        except BaseException as error:
            if not await watching.__aexit__(type(error), error, error.__traceback__):
                raise
        else:
            await watching.__aexit__(None, None, None)

    async def compact(self, revision: int, /) -> int:
        """See `Backend`."""
        return await self.around("compact", revision, lambda: self.inner.compact(revision))

    async def lease_grant(self, ttl: int, /, *, lease: int = 0) -> LeaseGrant:
        """See `Backend`."""
        return await self.around("lease_grant", lease, lambda: self.inner.lease_grant(ttl, lease=lease))

    async def lease_keep_alive(self, lease: int, /) -> LeaseRenewal:
        """See `Backend`."""
        return await self.around("lease_keep_alive", lease, lambda: self.inner.lease_keep_alive(lease))

    async def lease_revoke(self, lease: int, /) -> int:
        """See `Backend`."""
        return await self.around("lease_revoke", lease, lambda: self.inner.lease_revoke(lease))

    async def lease_time_to_live(self, lease: int, /, *, keys: bool = False) -> LeaseTimeToLive:
        """See `Backend`."""
        return await self.around(
            "lease_time_to_live", lease, lambda: self.inner.lease_time_to_live(lease, keys=keys)
        )

    async def lease_list(self) -> tuple[int, ...]:
        """See `Backend`."""
        return await self.around("lease_list", None, self.inner.lease_list)

    async def status(self) -> Status:
        """See `Backend`."""
        return await self.around("status", None, self.inner.status)
