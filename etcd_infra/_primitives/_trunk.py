"""What all objects of one topic share in a process: the feed, and the offer to trim."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from etcd_infra._primitives._feed import Feed, open_feed
from etcd_infra._primitives._shared import Shared
from etcd_infra._primitives._trimmer import Retention, Trimmer

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._etcd.background import Background
    from etcd_infra._primitives._space import Space


class Trunk:
    """What all `Topic` objects of one name and coordinator share: the feed, and the offers to trim."""

    def __init__(self, space: Space, name: str, background: Background) -> None:
        self.space = space
        self.name = name
        self.keys = space.keys.topic(name)
        self.feed: Shared[Feed] = Shared(background, self._open_feed)
        self._background = background
        self._trimmer: Trimmer | None = None

    def _open_feed(self) -> AbstractAsyncContextManager[Feed]:
        return open_feed(self.space.backend, self.keys, self.space.random)

    def offer_to_trim(self, retention: Retention) -> None:
        """Trim in the background, whenever it is this process's turn, until the coordinator is closed."""
        if self._trimmer is not None:
            self._trimmer.retention = retention
        elif not self._background.dismissed:
            self._trimmer = Trimmer(self.space, self.name, self.keys, retention)
            self._background.start_soon(self._trim, self._trimmer)

    async def _trim(self, trimmer: Trimmer) -> None:
        # A method, so that this object lives as long as its trimmer, and nobody makes a second one.
        await trimmer.run()


class Trunks:
    """The topics of one coordinator: one trunk for all `Topic` objects of one name."""

    def __init__(self, space: Space, background: Background) -> None:
        self._space = space
        self._background = background
        self._by_root: WeakValueDictionary[bytes, Trunk] = WeakValueDictionary()

    def of(self, name: str) -> Trunk:
        """Return the trunk of a name; it lives as long as somebody keeps it."""
        root = self._space.keys.topic(name).root
        trunk = self._by_root.get(root)
        if trunk is None:
            trunk = self._by_root[root] = Trunk(self._space, name, self._background)
        return trunk
