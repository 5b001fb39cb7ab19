"""The narrow waist: the ten verbs that everything above stands on, and three conveniences in terms of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, final

from etcd_infra._etcd.model import DeleteRange, KeyRange, Put, Range, Txn

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._etcd.model import (
        KeyValue,
        LeaseGrant,
        LeaseRenewal,
        LeaseTimeToLive,
        RangeResult,
        Status,
        TxnResult,
        WatchBatch,
    )


class WatchStream(ABC):
    """
    An open watch: whole revisions in order, each once, across reconnects.

    `async for batch in stream` works as well as `receive()`.
    """

    created_revision: int
    """The store's revision when the watch was (last) created: a read at or after it misses nothing."""

    @abstractmethod
    async def receive(self) -> WatchBatch:
        """
        Wait for the next batch.

        Every re-creation of the watch is delivered as a batch with `created` set, in its place.

        Raises:
            CompactedError: the history to go on from is gone: changes were missed. The watch is over.
            StoreResetError: the store is another one or an older one. The watch is over.
            AccessDeniedError: the user may not watch these keys. The watch is over.

        Cancellation:
            Nothing is lost; call again.
        """

    def __aiter__(self) -> WatchStream:
        return self

    async def __anext__(self) -> WatchBatch:
        return await self.receive()


class Backend(ABC):
    """
    An implementation of etcd's semantics.

    Every verb is one round trip, a checkpoint, and ends by itself after some seconds if etcd does not
    answer. Reads (`range`, a read-only `txn`, `lease_time_to_live`, `lease_list`, `status`), keep-alives and
    compactions may be sent again. A writing verb that was cancelled or that raised
    `OutcomeUnknownError` may have been applied, and may still be applied later.

    Raises (every verb):
        UnavailableError: certainly not applied.
        OutcomeUnknownError: a write without an answer.
        AccessDeniedError, InvalidRequestError, InvalidAnswerError: as their names say; nothing was written.
    """

    @abstractmethod
    async def range(self, request: Range, /) -> RangeResult:
        """
        Read keys.

        Raises:
            CompactedError: `request.revision` is compacted.
            FutureRevisionError: `request.revision` is not reached yet.
        """

    @abstractmethod
    async def txn(self, request: Txn, /) -> TxnResult:
        """
        Evaluate the compares and apply one branch, atomically.

        Raises:
            LeaseNotFoundError: a put of the taken branch names a lease that is gone; nothing was written.
            StorageFullError: some branch has a put, and the quota is used up; nothing was written.
        """

    @abstractmethod
    def watch(  # noqa: PLR0913
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
    ) -> AbstractAsyncContextManager[WatchStream]:
        """
        Watch keys; entering waits until the watch is created, under the caller's scope.

        A watch survives reconnects: it goes on exactly after the last revision that was delivered.

        Args:
            range: The keys; an empty key is refused.
            start_revision: Inclusive; 0 for changes after the creation, 1 for all that is not compacted.
            prev_kv: Deliver what was there before, too, as far as etcd still knows it.
            no_put: Leave out PUT events.
            no_delete: Leave out DELETE events.
            progress_notify: Deliver an empty batch now and then, so that a silent watch does not fall
                behind compaction.
            coordination: For a consumer that reads again after each creation: the watch starts from now
                each time it is created anew, and shares its stream with other such watches only. The
                consumer must not let it wait.

        Raises:
            ValueError: the range is empty or inverted, or `start_revision` is negative.
        """

    @abstractmethod
    async def compact(self, revision: int, /) -> int:
        """
        Forget the history before `revision`; return the store's revision.

        Raises:
            CompactedError: it is compacted already (a repeat is told so, too).
            FutureRevisionError: `revision` is not reached yet.
        """

    @abstractmethod
    async def lease_grant(self, ttl: int, /, *, lease: int = 0) -> LeaseGrant:
        """
        Grant a lease of `ttl` seconds; the server may lengthen it.

        Args:
            ttl: Whole seconds.
            lease: An id of one's own (random, positive, 63 bits), which makes a grant repeatable; 0: the
                server chooses.

        Raises:
            LeaseExistsError: this id is taken; after an `OutcomeUnknownError`: the first copy worked.
            StorageFullError: the quota is used up.
        """

    @abstractmethod
    async def lease_keep_alive(self, lease: int, /) -> LeaseRenewal:
        """
        Renew a lease to its full time, counted from when the server handled it.

        Repeated calls go to different members. The answer proves that a server lives, not that a key exists.
        """

    @abstractmethod
    async def lease_revoke(self, lease: int, /) -> int:
        """
        End a lease; its keys go in one revision, which is returned.

        Raises:
            LeaseNotFoundError: it is gone already.
        """

    @abstractmethod
    async def lease_time_to_live(self, lease: int, /, *, keys: bool = False) -> LeaseTimeToLive:
        """Ask what is left of a lease, and with `keys` what hangs on it."""

    @abstractmethod
    async def lease_list(self) -> tuple[int, ...]:
        """List the ids of all leases."""

    @abstractmethod
    async def status(self) -> Status:
        """Ask one member about itself."""

    @final
    async def get(self, key: bytes, /, *, revision: int = 0, serializable: bool = False) -> KeyValue | None:
        """Read one key."""
        found = await self.range(Range(KeyRange.one(key), revision=revision, serializable=serializable))
        return found.kvs[0] if found.kvs else None

    @final
    async def put(self, key: bytes, value: bytes, /, *, lease: int = 0) -> int:
        """Write one key; return the revision."""
        return (await self.txn(Txn(success=(Put(key, value, lease=lease),)))).revision

    @final
    async def delete(self, range: KeyRange, /) -> int:  # noqa: A002
        """Delete keys; return the store's revision."""
        return (await self.txn(Txn(success=(DeleteRange(range),)))).revision
