"""
The positions of a topic's messages, read page by page: names alone cross the network.

Nothing is sorted by the server, nor filtered: for both it would read the values of the whole topic at once.
"""

from __future__ import annotations

from heapq import nsmallest
from typing import TYPE_CHECKING, Final

from etcd_infra._etcd.keys import last_segment
from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._primitives._envelope import Position
from etcd_infra.errors import UnavailableError

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend

NAMES_TOGETHER: Final = 1000


async def list_positions(
    backend: Backend, messages: KeyRange, since: int, *, most: int | None = None
) -> tuple[list[Position], int, int]:
    """
    List the messages of revision `since` and later, in order.

    Returns:
        The messages (with `most`, only the first so many), the revision up to which none is missing, and the
        one at which the last ones were read. One that was deleted before that may be missing: look at the trim
        mark as it is then, or later.

    Raises:
        UnavailableError: a stale read.
        EtcdError: as the backend says.

    Round trips:
        One for each 1,000 messages of the topic.
    """
    found: list[Position] = []
    first = last = 0
    rest = messages
    while True:
        page = await backend.range(Range(rest, limit=NAMES_TOGETHER, keys_only=True))
        # etcd: some servers answer linearizable reads with an older revision now and then (#20418).
        if page.revision < last:
            raise UnavailableError(f"a stale read: at {page.revision}, not {last}")
        last = page.revision
        first = first or page.revision
        found += [
            Position(kv.create_revision, last_segment(kv.key))
            for kv in page.kvs
            if since <= kv.create_revision <= first
        ]
        if most is not None and len(found) > most:
            found = nsmallest(most, found)
        if not page.more:
            return sorted(found), first, last
        rest = KeyRange(page.kvs[-1].key + b"\0", rest.end)
