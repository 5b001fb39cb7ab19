"""
Values under keys, each write versioned, fenced if asked, and applied exactly once.

Keys
    ``{ns}state/{key}``  the value: canonical JSON, or bytes as they are; on no lease, or on one of its own.

Algorithm
    1. A version is the key's mod revision; 0 means absent.
    2. Every write is one Txn: `[slot, fence, version or nothing, no intent] → [put, put slot] else [look]`
       (see `_cas`).
    3. `update`: read, run the function, write if the version is still that; else wait a little (full jitter)
       and do it again.
    4. A TTL is a lease of the write's own, granted before it, renewed by nobody (see `_key_write`).

Guarantees
    Linearizable per key. A write whose answer was lost is found out, not repeated; versions never repeat,
    so nobody is fooled by a value that came back. A write under a dead fence changes nothing.

Does not guarantee
    That a key with a TTL goes on time: after a change of leader leases live longer, never shorter. That a
    serializable read, or a value compare, knows of anything in between.

Source
    etcd's documentation, "API guarantees"; the slot is ours.
"""

# Over the budget of 250 lines: most of them are the docstrings of the public surface.

from __future__ import annotations

from inspect import isawaitable
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import trio

from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._cas import Committed, Refused, check_fence, found_in
from etcd_infra._primitives._key_write import delete_key, put_key
from etcd_infra._primitives._space import check_revision
from etcd_infra._primitives._state_reading import NOT_GIVEN, StateReading
from etcd_infra._primitives.entry import DELETE, CasResult, Deletion, Entry
from etcd_infra._session.ttl import check_ttl
from etcd_infra.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._primitives.fence import Fence

T = TypeVar("T")
U = TypeVar("U")


class State(StateReading[T]):
    """
    The namespace's values; ``infra.state`` for values of any type, `typed` for those of one.

    Every write takes ``fence=``: a hold's `fence`, whose proof becomes a condition of the write's own Txn.

    Raises (every operation):
        TypeError, ValueError: an argument is no good; nothing was sent.
        CodecError: what is stored does not decode.
        EtcdError: etcd refuses, or does not answer.

    Raises (every write):
        FencedError: the fence is dead; nothing was written.
        OutcomeUnknownError: the session ended while an answer was missing.
        SessionLostError: the coordinator was closed; nothing was written.

    Cancellation (every write):
        It was applied, or not, or will be in a moment; never twice. The session's janitor settles it.
    """

    def __repr__(self) -> str:
        return f"<State of {getattr(self._type, '__name__', self._type)}>"

    def typed(self, type: type[U]) -> State[U]:  # noqa: A002
        """Return a view of the same keys whose values are of `type`; as bytes they are what is stored."""
        return State(self._space, type)

    async def set(self, key: str, value: T, *, ttl: int | None = None, fence: Fence | None = None) -> int:
        """
        Write a key, whatever is there; return its new version.

        Args:
            key: Non-empty, at most 1,024 bytes, no control characters; slashes are allowed.
            value: Of this view's type; bytes are stored as they are.
            ttl: Whole seconds, at least 1, after which the key goes; None: it stays, also if the key had a
                TTL before.
            fence: A proof that must hold.

        Round trips:
            One; with a TTL two.
        """
        full, encoded = self._checked(key, fence), self._space.encode(value)
        ttl = None if ttl is None else check_ttl(ttl)
        return (await put_key(self._space, full, encoded, ttl=ttl, fence=fence)).revision

    async def get_or_set(
        self, key: str, factory: Callable[[], T | Awaitable[T]], *, fence: Fence | None = None
    ) -> Entry[T]:
        """
        Return what is there; if there is nothing, write what `factory` makes.

        `factory` is called at most once. If several callers find nothing, one writes, and all return that.

        Round trips:
            One, and one more to write.
        """
        full = self._checked(key, fence)
        if found := await self._read(full):
            return self._space.entry(found, self._type)
        value = await _awaited(factory())
        encoded = self._space.encode(value)
        outcome = await put_key(self._space, full, encoded, expected_version=0, fence=fence)
        if isinstance(outcome, Refused):
            return self._space.entry(found_in(outcome.reads[0])[0], self._type)
        return Entry(key, value, outcome.revision, outcome.revision)

    @overload
    async def update(
        self, key: str, function: Callable[[T | None], T | Awaitable[T]], *, fence: Fence | None = None
    ) -> Entry[T]: ...
    @overload
    async def update(
        self,
        key: str,
        function: Callable[[T | None], T | Deletion | Awaitable[T | Deletion]],
        *,
        fence: Fence | None = None,
    ) -> Entry[T] | None: ...
    async def update(
        self,
        key: str,
        function: Callable[[T | None], T | Deletion | Awaitable[T | Deletion]],
        *,
        fence: Fence | None = None,
    ) -> Entry[T] | None:
        """
        Replace a key's value by a function of it; run again, on the newest, when somebody else was faster.

        Args:
            key: As for `set`.
            function: Gets the value, None if the key is absent; returns the new one, or `DELETE`; may be
                async. It must not depend on being run once. What it raises passes through; nothing is
                written then.
            fence: A proof that must hold.

        Returns:
            The new entry; None if the key is absent now. A key with a TTL keeps it.

        Round trips:
            Two, and two more for each conflict.
        """
        full = self._checked(key, fence)
        conflicts = 0
        while True:
            before = await self._read(full)
            value = await _awaited(function(self._space.decode(before, self._type) if before else None))
            if value is not DELETE:
                outcome, after = await self._replace(full, key, before, cast("T", value), fence)
            elif before:
                version = before.mod_revision
                outcome = await delete_key(self._space, full, expected_version=version, fence=fence)
                after = None
            else:
                return None
            if isinstance(outcome, Committed):
                return after
            await trio.sleep(delay(conflicts, self._space.random.random()))
            conflicts += 1

    async def compare_and_swap(  # noqa: PLR0913
        self,
        key: str,
        new_value: T,
        *,
        expected_version: int | None = None,
        expected_value: T = NOT_GIVEN,
        ttl: int | None = None,
        fence: Fence | None = None,
    ) -> CasResult[T]:
        """
        Write a key if it has the expected version, or value.

        Args:
            key: As for `set`.
            new_value: As for `set`.
            expected_version: 0: the key must be absent.
            expected_value: Compared as it would be stored. Values may come back: this does not notice what
                happened in between. It is read, and then compared by version.
            ttl: Whole seconds; None: a key with a TTL keeps it.
            fence: A proof that must hold.

        Round trips:
            One; with `expected_value` two, and one more each time another writer was faster; with a TTL one
            more.
        """
        full, encoded = self._checked(key, fence), self._space.encode(new_value)
        ttl = None if ttl is None else check_ttl(ttl)
        if (expected_version is None) == (expected_value is NOT_GIVEN):
            msg = "compare_and_swap takes either expected_version= or expected_value="
            raise TypeError(msg)
        wanted = None
        if expected_version is not None:
            version = check_revision("expected_version", expected_version)
        else:
            wanted = self._space.encode(expected_value)
            before = await self._read(full)
            if not self._is_value(before, wanted):
                return self._not_swapped(before)
            version = before.mod_revision if before else 0
        while True:
            keep = version > 0 and ttl is None
            outcome = await put_key(
                self._space, full, encoded, expected_version=version, ttl=ttl, keep_lease=keep, fence=fence
            )
            if isinstance(outcome, Committed):
                return CasResult(swapped=True, version=outcome.revision, current_value=new_value)
            before = next(iter(found_in(outcome.reads[0])), None)
            if wanted is None or not self._is_value(before, wanted):
                return self._not_swapped(before)
            version = before.mod_revision if before else 0

    async def delete(
        self, key: str, *, expected_version: int | None = None, fence: Fence | None = None
    ) -> bool:
        """
        Delete a key; return whether it was there.

        Raises:
            ConflictError: it is there, but has not the expected version; nothing was deleted.

        Round trips:
            One.
        """
        full = self._checked(key, fence)
        if expected_version is not None:
            check_revision("expected_version", expected_version, least=1)
        outcome = await delete_key(self._space, full, expected_version=expected_version, fence=fence)
        if isinstance(outcome, Committed):
            return True
        for kv in found_in(outcome.reads[0]):
            msg = f"{key!r} is at version {kv.mod_revision}, not {expected_version}"
            raise ConflictError(msg, key, kv.mod_revision)
        return False

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _checked(self, key: str, fence: Fence | None) -> bytes:
        full = self._space.keys.state(key)
        check_fence(fence)
        self._space.tally.state_operations += 1
        return full

    async def _replace(
        self, full: bytes, key: str, before: KeyValue | None, value: T, fence: Fence | None
    ) -> tuple[Committed | Refused, Entry[T]]:
        version = before.mod_revision if before else 0
        outcome = await put_key(
            self._space,
            full,
            self._space.encode(value),
            expected_version=version,
            keep_lease=before is not None,
            fence=fence,
        )
        created = before.create_revision if before else outcome.revision
        return outcome, Entry(key, value, outcome.revision, created, before.lease if before else 0)

    def _is_value(self, kv: KeyValue | None, wanted: bytes) -> bool:
        if kv is None:
            return False
        return kv.value == wanted or self._space.encode(self._space.decode(kv, self._type)) == wanted

    def _not_swapped(self, kv: KeyValue | None) -> CasResult[T]:
        if kv is None:
            return CasResult(swapped=False, version=0, current_value=None)
        value = self._space.decode(kv, self._type)
        return CasResult(swapped=False, version=kv.mod_revision, current_value=value)


async def _awaited(value: Any) -> Any:
    return await value if isawaitable(value) else value
