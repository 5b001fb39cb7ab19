"""The entries of all keys with a prefix, as they were at one revision."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from etcd_infra._etcd.model import KeyRange, KeyValue
from etcd_infra._session.pages import Pages

if TYPE_CHECKING:
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.entry import Entry

T = TypeVar("T")


class Listing(Generic[T]):
    """
    The entries of a `State.list`, by key; each step is a checkpoint, and each 256th one a round trip.

    Nothing is held open: iteration may be left at any time.
    """

    def __init__(self, space: Space, prefix: bytes, type: type[T]) -> None:  # noqa: A002
        self._space = space
        self._type = type
        self._pages = Pages(space.backend, KeyRange.prefix(prefix))
        self._ready: deque[KeyValue] = deque()

    @property
    def revision(self) -> int:
        """The revision at which everything is listed; 0 before the first step."""
        return self._pages.revision

    def __aiter__(self) -> Listing[T]:
        return self

    async def __anext__(self) -> Entry[T]:
        """
        Return the next entry.

        Raises:
            CompactedError: the history was compacted meanwhile; begin anew.
            CodecError: a value does not decode; the next step goes on after it.

        Cancellation:
            Nothing is lost; call again.
        """
        await trio.lowlevel.checkpoint()
        while not self._ready and not self._pages.finished:
            self._ready.extend(await self._pages.next())
        if not self._ready:
            raise StopAsyncIteration
        return self._space.entry(self._ready.popleft(), self._type)
