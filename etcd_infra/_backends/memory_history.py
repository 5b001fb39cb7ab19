"""
The history of the in-memory etcd: what each revision changed, as far back as it is kept.

Compaction forgets, as in etcd, so a process that compacts now and then needs a bounded memory; a checker asks
to keep everything instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.model import Event


@dataclass(frozen=True, slots=True)
class Commit:
    """All that one revision changed, in the order of its operations."""

    revision: int
    events: tuple[Event, ...]


class History:
    """
    The commits since the compaction revision, that one included, for watches and for checkers.

    Args:
        keep: Compaction hides its beginning from watches, but removes nothing: a checker sees every commit.
        auto_compact: Revisions that automatic compaction leaves, at least; 0: there is none.
    """

    def __init__(self, *, keep: bool = False, auto_compact: int = 0) -> None:
        self.commits: list[Commit] = []
        # etcd: -1 before the first compaction, so that revision 0 can be compacted once.
        self.compacted = -1
        self._keep = keep
        self._auto_compact = auto_compact
        self._forgotten = 0

    @property
    def compact_revision(self) -> int:
        """The oldest revision that can be read; 0 before the first compaction."""
        return max(0, self.compacted)

    @property
    def revision(self) -> int:
        """The store's revision: 1 when it is empty, and 1 more for each commit."""
        return 1 + self._forgotten + len(self.commits)

    def between(self, first: int, last: int) -> Sequence[Commit]:
        """
        Return the commits from `first` to `last`, both included.

        Raises:
            LookupError: some of them were forgotten. A checker that overlooked them would prove nothing.
        """
        oldest = 2 + self._forgotten
        if self._forgotten and first < oldest:
            raise LookupError(f"revisions {first} to {oldest - 1} were forgotten; see `keep_history`")
        return self.commits[max(0, first - oldest) : max(0, last + 1 - oldest)]

    def none(self) -> History:
        """Return an empty history of the same habits."""
        return History(keep=self._keep, auto_compact=self._auto_compact)

    def copy(self) -> History:
        """Return a history of the same commits."""
        twin = self.none()
        twin.commits = list(self.commits)
        twin.compacted = self.compacted
        twin._forgotten = self._forgotten  # noqa: SLF001 - a twin's
        return twin

    def overdue(self) -> int:
        """Say at which revision automatic compaction is to be made now; 0: at none."""
        # Twice as much may gather: forgetting a few thousand at once costs next to nothing for each.
        if self._auto_compact and self.revision - self.compact_revision >= 2 * self._auto_compact:
            return self.revision - self._auto_compact
        return 0

    def compact(self, revision: int) -> set[bytes]:
        """Forget what was before `revision`; return the keys written since the last compaction, up to it."""
        commits = self.between(self.compact_revision + 1, revision)
        self.compacted = revision
        # A watch may still start at the compaction revision itself.
        past = revision - 2 - self._forgotten
        if past > 0 and not self._keep:
            del self.commits[:past]
            self._forgotten += past
        return {event.kv.key for commit in commits for event in commit.events}
