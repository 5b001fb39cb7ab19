"""How far a topic was trimmed: the position of the last message that was deleted for its age or number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from etcd_infra._primitives._envelope import Position

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.model import KeyValue


class TrimMark(msgspec.Struct, frozen=True):
    """What stands under ``{ns}topic/{name}/trimmed``, written by the Txn that deletes."""

    revision: int
    name: str

    @classmethod
    def position_in(cls, kvs: Sequence[KeyValue]) -> Position:
        """Return the position that a read of the mark shows; before everything if it was never trimmed."""
        if not kvs:
            return Position(0)
        try:
            mark = msgspec.json.decode(kvs[0].value, type=cls)
        except msgspec.DecodeError:
            return Position(0)
        return Position(mark.revision, mark.name)
