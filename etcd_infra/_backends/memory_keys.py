"""
The key space of the in-memory etcd: every key's states since the last compaction.

Pure data; it knows revisions, but neither leases nor transactions nor watches.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol, cast

import sortedcontainers  # pyright: ignore[reportMissingTypeStubs]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from etcd_infra._etcd.model import KeyRange, KeyValue, Range

_mod_revision = attrgetter("mod_revision")


class _SortedKeys(Protocol):
    """What is used of `sortedcontainers.SortedList`, which has no types."""

    def add(self, value: bytes) -> None: ...
    def remove(self, value: bytes) -> None: ...
    def bisect_left(self, value: bytes) -> int: ...
    def __len__(self) -> int: ...
    def __contains__(self, value: bytes) -> bool: ...
    def irange(
        self, minimum: bytes, maximum: bytes | None, inclusive: tuple[bool, bool]
    ) -> Iterator[bytes]: ...


_new_sorted_keys = cast(
    "Callable[[], _SortedKeys]",
    sortedcontainers.SortedList,  # pyright: ignore[reportUnknownMemberType]
)


def _select(keys: _SortedKeys, wanted: KeyRange) -> Iterator[bytes]:
    if not wanted.end:
        return iter((wanted.key,) if wanted.key in keys else ())
    if wanted.end == b"\0":
        return keys.irange(wanted.key, None, (True, True))
    return keys.irange(wanted.key, wanted.end, (True, False))


class KeySpace:
    """Keys in order; for each its present state, and its past as far as it is not compacted."""

    def __init__(self) -> None:
        self._live: dict[bytes, KeyValue] = {}
        self._live_keys = _new_sorted_keys()
        self._states: dict[bytes, list[KeyValue]] = {}
        self._known_keys = _new_sorted_keys()

    def __len__(self) -> int:
        return len(self._live)

    def copy(self) -> KeySpace:
        """Return a key space of the same states."""
        twin = KeySpace()
        for key, states in self._states.items():
            twin._states[key] = list(states)
            twin._known_keys.add(key)
        for key, state in self._live.items():
            twin._live[key] = state
            twin._live_keys.add(key)
        return twin

    def get(self, key: bytes) -> KeyValue | None:
        """Return the present state of one key."""
        return self._live.get(key)

    def select(self, wanted: KeyRange) -> Iterator[KeyValue]:
        """Yield the present states of a range's keys, in key order, as they are asked for."""
        if not wanted.end:
            found = self._live.get(wanted.key)
            return iter(() if found is None else (found,))
        return map(self._live.__getitem__, _select(self._live_keys, wanted))

    def head(self, wanted: KeyRange, limit: int) -> list[KeyValue]:
        """Return the first `limit` (0: all) states of a range."""
        return list(islice(self.select(wanted), limit) if limit > 0 else self.select(wanted))

    def count(self, wanted: KeyRange) -> int:
        """Count a range's keys without looking at each."""
        if not wanted.end:
            return int(wanted.key in self._live)
        keys = self._live_keys
        end = len(keys) if wanted.end == b"\0" else keys.bisect_left(wanted.end)
        return max(0, end - keys.bisect_left(wanted.key))

    def select_at(self, wanted: KeyRange, revision: int) -> list[KeyValue]:
        """Return what `revision` saw of a range, in key order."""
        found: list[KeyValue] = []
        for key in _select(self._known_keys, wanted):
            states = self._states[key]
            index = bisect_right(states, revision, key=_mod_revision)
            if index and states[index - 1].version:
                found.append(states[index - 1])
        return found

    def write(self, state: KeyValue) -> None:
        """Add a key's newest state; version 0 says that the key is deleted."""
        key = state.key
        if state.version:
            if key not in self._live:
                self._live_keys.add(key)
            self._live[key] = state
        elif self._live.pop(key, None) is not None:
            self._live_keys.remove(key)
        if key not in self._states:
            self._known_keys.add(key)
            self._states[key] = [state]
        else:
            self._states[key].append(state)

    def compact(self, revision: int, touched: Iterable[bytes]) -> None:
        """
        Forget what was overwritten or deleted up to `revision`.

        Args:
            revision: The oldest revision that can be read afterwards.
            touched: The keys that were written since the last compaction, up to `revision`.
        """
        for key in touched:
            states = self._states.get(key, [])
            last = bisect_right(states, revision, key=_mod_revision) - 1
            if last >= 0:
                # etcd: a deletion that is the last word at the compaction goes, too.
                del states[: last if states[last].version else last + 1]
            if key in self._states and not states:
                del self._states[key]
                self._known_keys.remove(key)


def in_bounds(request: Range, state: KeyValue) -> bool:
    """Say whether a read's bounds on revisions let a key through."""
    return (
        state.mod_revision >= request.min_mod_revision
        and state.create_revision >= request.min_create_revision
        and (not request.max_mod_revision or state.mod_revision <= request.max_mod_revision)
        and (not request.max_create_revision or state.create_revision <= request.max_create_revision)
    )
