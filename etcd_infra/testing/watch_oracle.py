"""
The promises of a watch, checked on what it delivered against what was really committed.

Source: etcd ``tests/robustness/validate/watch.go``; the gap rule is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from etcd_infra.testing.violation import Violation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from etcd_infra._backends.memory_history import Commit
    from etcd_infra._etcd.model import Event, KeyRange, WatchBatch

FILTER: Final = "filter"
ORDERED: Final = "ordered"
UNIQUE: Final = "unique"
ATOMIC: Final = "atomic"
RELIABLE: Final = "reliable"
RESUMABLE: Final = "resumable"
BOOKMARKABLE: Final = "bookmarkable"
IS_CREATE: Final = "is-create"
PREV_KV: Final = "prev-kv"
GAP: Final = "gap"


@dataclass(frozen=True, slots=True)
class Watched:
    """
    What one watch was asked for, and what it delivered.

    Attributes:
        range: The keys.
        start_revision: The first revision that it had to deliver: what was asked for, or the one after the
            creation.
        batches: All that it delivered, in order.
        no_put, no_delete: The filters.
        prev_kv: Whether the state before was asked for.
        gap_at: The compaction revision with which a gap was reported; None: none was.
        compacted: The store's compaction revision when the watch ended, or was last made anew.
    """

    range: KeyRange
    start_revision: int
    batches: Sequence[WatchBatch]
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False
    gap_at: int | None = None
    compacted: int = 0

    def concerns(self, event: Event) -> bool:
        """Say whether an event was to be delivered."""
        return event.key in self.range and not (self.no_delete if event.is_delete else self.no_put)


def check_watch(commits: Sequence[Commit], watched: Watched) -> list[Violation]:
    """
    Check one watch against the true history.

    Filter: nothing that was not asked for, or never happened. Ordered: by revision, and within one as the
    operations were. Unique: each event once. Atomic: a revision whole, in one batch. Reliable: nothing left out
    between two deliveries; resumable: nor where it was made anew. Bookmarkable: a progress notification is not
    followed by anything up to its revision. Is-create: a key's first event says so. Prev-kv: the state
    before is
    the true one, and missing only if it was compacted. Gap: reported exactly when history was lost.

    Args:
        commits: The whole history, from revision 2 on.
        watched: The watch.
    """
    truth = {commit.revision: commit.events for commit in commits}
    found = [*_of_each_event(truth, watched), *_of_the_sequence(truth, watched), *_of_gaps(truth, watched)]
    return [Violation(f"watch {name}", what, at) for name, what, at in found]


_Finding = tuple[str, str, int]


def _of_each_event(truth: dict[int, tuple[Event, ...]], watched: Watched) -> Iterator[_Finding]:
    for batch in watched.batches:
        for event in batch.events:
            at = event.revision
            if not watched.concerns(event):
                yield FILTER, f"{event} was not asked for", at
                continue
            original = next((each for each in truth.get(at, ()) if each.key == event.key), None)
            if original is None or original.kind != event.kind or original.kv.value != event.kv.value:
                yield FILTER, f"{event} never happened", at
                continue
            if (event.kv.create_revision, event.kv.version) != (
                original.kv.create_revision,
                original.kv.version,
            ):
                yield IS_CREATE, f"{event} instead of {original}", at
            if event.prev_kv is not None and event.prev_kv != original.prev_kv:
                yield PREV_KV, f"{event} instead of {original}", at
            if (
                watched.prev_kv
                and event.prev_kv is None
                and original.prev_kv is not None
                and at > watched.compacted
            ):
                yield PREV_KV, f"{event} lacks what was there before", at


def _of_the_sequence(truth: dict[int, tuple[Event, ...]], watched: Watched) -> Iterator[_Finding]:  # noqa: C901 - a table
    expected = watched.start_revision
    made_anew = False
    bookmark = 0
    seen: set[tuple[int, bytes]] = set()
    for batch in watched.batches:
        if batch.created:
            made_anew = True
            continue
        for event in batch.events:
            if (event.revision, event.key) in seen:
                yield UNIQUE, f"{event} came twice", event.revision
            elif event.revision <= bookmark:
                yield BOOKMARKABLE, f"{event} came after the notification of {bookmark}", event.revision
            seen.add((event.revision, event.key))
        yield from _of_one_batch(truth, watched, batch)
        if not batch.events:
            bookmark = max(bookmark, batch.revision)
        first = batch.events[0].revision if batch.events else batch.revision + 1
        for revision in range(expected, first):
            if any(watched.concerns(event) for event in truth.get(revision, ())):
                yield RESUMABLE if made_anew else RELIABLE, f"revision {revision} was left out", revision
        expected = max(expected, batch.revision + 1, batch.events[-1].revision + 1 if batch.events else 0)
        made_anew = False


def _of_one_batch(  # noqa: C901 - a table
    truth: dict[int, tuple[Event, ...]], watched: Watched, batch: WatchBatch
) -> Iterator[_Finding]:
    revisions = [event.revision for event in batch.events]
    if sorted(revisions) != revisions:
        yield ORDERED, f"the revisions of one batch: {revisions}", revisions[-1]
    for revision in dict.fromkeys(revisions):
        delivered = [event.key for event in batch.events if event.revision == revision]
        original = [event.key for event in truth.get(revision, ()) if watched.concerns(event)]
        if sorted(delivered) != sorted(original):
            if set(delivered) < set(original):
                yield ATOMIC, f"{delivered} of {original}", revision
        elif delivered != original:
            yield ORDERED, f"{delivered} instead of {original}", revision
    if revisions:
        inside = range(min(revisions), max(revisions))
        for revision in inside:
            if revision not in revisions and any(watched.concerns(event) for event in truth.get(revision, ())):
                yield RELIABLE, f"revision {revision} was left out", revision


def _of_gaps(truth: dict[int, tuple[Event, ...]], watched: Watched) -> Iterator[_Finding]:
    last = 0
    for batch in watched.batches:
        if not batch.created:
            if batch.revision < last:
                yield ORDERED, f"a batch of revision {batch.revision} after one of {last}", batch.revision
            last = max(last, batch.revision)
    reached = max(watched.start_revision, last + 1)
    if watched.gap_at is not None:
        if reached >= watched.gap_at:
            yield GAP, f"a gap was reported at {watched.gap_at}, but {reached} was next", reached
        return
    lost = [
        revision
        for revision in range(reached, watched.compacted)
        if any(watched.concerns(event) for event in truth.get(revision, ()))
    ]
    if lost:
        yield (
            GAP,
            f"revisions {lost} were lost to compaction at {watched.compacted}, and nobody was told",
            lost[0],
        )
