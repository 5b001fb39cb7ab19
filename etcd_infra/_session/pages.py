"""A range read page by page, all of it at the revision of the first page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from etcd_infra._etcd.model import KeyRange, Range

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import KeyValue

PAGE_KEYS: Final = 256


class Pages:
    """
    The pages of a range.

    Attributes:
        revision: The revision at which everything is read; 0 before the first page.
        finished: Whether the last page was read.
    """

    def __init__(self, backend: Backend, keys: KeyRange) -> None:
        self._backend = backend
        self._rest = keys
        self.revision = 0
        self.finished = False

    async def next(self) -> tuple[KeyValue, ...]:
        """
        Read one page, by key.

        Raises:
            CompactedError: the revision of the first page is compacted.

        Round trips:
            One.
        """
        page = await self._backend.range(Range(self._rest, revision=self.revision, limit=PAGE_KEYS))
        self.revision = self.revision or page.revision
        self.finished = not page.more
        if page.more:
            self._rest = KeyRange(page.kvs[-1].key + b"\0", self._rest.end)
        return page.kvs
