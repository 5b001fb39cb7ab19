"""What the answer to a publication says: where the message stands, or which one had its id already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._etcd.keys import last_segment
from etcd_infra._etcd.model import KeyRange, Put, Range, Txn, TxnResult
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._envelope import Position
from etcd_infra._primitives.receipt import Receipt
from etcd_infra.errors import CompactedError

if TYPE_CHECKING:
    from etcd_infra._etcd.keys import TopicKeys
    from etcd_infra._etcd.model import KeyValue, Op
    from etcd_infra._primitives._cas import Committed
    from etcd_infra._primitives._space import Space


async def receipt_of(
    space: Space, keys: TopicKeys, write: Op, outcome: Committed, message_id: str | None
) -> Receipt:
    """
    Make out the receipt of a message.

    Args:
        space: Where the topic is.
        keys: The topic's.
        write: What was to be written, as `Publish.render` returns it.
        outcome: That it was applied; without results if the answer was lost.
        message_id: The id under which it was published.

    Raises:
        EtcdError: the answer was lost, and etcd does not say now what it did.

    Round trips:
        None; one or two if the answer to a message with an id was lost.
    """
    if isinstance(write, Put):
        name = last_segment(write.key)
        return Receipt(space, keys, Position(outcome.revision, name), name, is_duplicate=False)
    assert isinstance(write, Txn)
    assert message_id is not None
    answer = outcome.results[0] if outcome.results else None
    if not isinstance(answer, TxnResult):
        position = await _look(space, keys, message_id, outcome.revision)
        is_duplicate = position.revision != outcome.revision
    elif answer.succeeded:
        position, is_duplicate = Position(outcome.revision, last_segment(write.written_keys[0])), False
    else:
        position, is_duplicate = _marked(found_in(answer.results[0])[0]), True
    return Receipt(space, keys, position, message_id, is_duplicate=is_duplicate)


async def _look(space: Space, keys: TopicKeys, message_id: str, published_at: int) -> Position:
    """Look which message had an id right after it was published: the answer that would say so was lost."""
    one = KeyRange.one(keys.marker(message_id))
    try:
        found = await space.backend.range(Range(one, revision=published_at))
    except CompactedError:
        found = await space.read(Range(one), min_revision=published_at)
    if not found.kvs:
        # Trimmed meanwhile, and history is compacted: it was there at that revision.
        return Position(published_at)
    return _marked(found.kvs[0])


def _marked(kv: KeyValue) -> Position:
    return Position(kv.create_revision, kv.value.decode(errors="replace"))
