"""
Etcd's vocabulary as frozen values: what may be asked, and what is answered.

Requests are values, not builders, with the protocol's own names: they can be printed, compared, recorded
and replayed, and the in-memory store takes the same objects that the wire encoder takes. Keys and values
are bytes; leases and revisions are ints, 0 meaning "none" or "current" as in etcd.

Each call makes several of them, which is why they are msgspec's: a frozen dataclass takes eight times as long.
"""

# Over the budget of 400 lines: the whole vocabulary on one page.

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

from msgspec import Struct

# ── keys ────────────────────────────────────────────────────────────────────────────────────────


class KeyRange(Struct, frozen=True):
    """
    One key (`end` empty), or all keys from `key` up to, not including, `end`.

    An `end` of one zero byte means "to the end of the key space", as in etcd.
    """

    key: bytes
    end: bytes = b""

    @classmethod
    def one(cls, key: bytes) -> KeyRange:
        """Exactly this key."""
        return cls(key)

    @classmethod
    def prefix(cls, prefix: bytes) -> KeyRange:
        """Every key that starts with `prefix`; all keys for an empty one."""
        return cls(prefix, prefix_end(prefix)) if prefix else cls.everything()

    @classmethod
    def since(cls, key: bytes) -> KeyRange:
        """This key and every key after it."""
        return cls(key or b"\0", b"\0")

    @classmethod
    def everything(cls) -> KeyRange:
        """The whole key space."""
        return cls(b"\0", b"\0")

    def __contains__(self, key: bytes) -> bool:
        if not self.end:
            return key == self.key
        return self.key <= key and (self.end == b"\0" or key < self.end)


def prefix_end(prefix: bytes) -> bytes:
    """
    Return the `end` of the range of all keys that start with `prefix`.

    Source: etcd's documentation, "Key ranges": add one to the last byte that is not 0xff.
    """
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1]) if head else b"\0"


class KeyValue(Struct, frozen=True):
    """A key's state. Its identity is (key, create revision); its state is (key, mod revision)."""

    key: bytes
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0


# ── requests ────────────────────────────────────────────────────────────────────────────────────


class SortTarget(IntEnum):
    """What a range is sorted by."""

    KEY = 0
    VERSION = 1
    CREATE = 2
    MOD = 3
    VALUE = 4


class Range(Struct, frozen=True):
    """
    Read keys; linearizable unless `serializable`.

    `revision` 0 is the current one. The min/max bounds filter the answer's keys (0: no bound), but never
    its `count`. With `sort_by` None the order is etcd's own (ascending by key); `descending` without `sort_by`
    sorts by key.
    """

    range: KeyRange
    revision: int = 0
    limit: int = 0
    sort_by: SortTarget | None = None
    descending: bool = False
    keys_only: bool = False
    count_only: bool = False
    serializable: bool = False
    min_mod_revision: int = 0
    max_mod_revision: int = 0
    min_create_revision: int = 0
    max_create_revision: int = 0


class Put(Struct, frozen=True):
    """Write one key. A put without a lease detaches the key from the lease that it had."""

    key: bytes
    value: bytes = b""
    lease: int = 0
    prev_kv: bool = False
    ignore_value: bool = False
    ignore_lease: bool = False


class DeleteRange(Struct, frozen=True):
    """Delete keys; deleting nothing is no error and no change."""

    range: KeyRange
    prev_kv: bool = False


class Target(IntEnum):
    """What a compare looks at."""

    VERSION = 0
    CREATE = 1
    MOD = 2
    VALUE = 3
    LEASE = 4


class Operator(IntEnum):
    """How a compare compares: the stored field stands on the left."""

    EQUAL = 0
    GREATER = 1
    LESS = 2
    NOT_EQUAL = 3


class Compare(Struct, frozen=True):
    """
    A condition on one key, or on every key of a range.

    A missing key compares as 0 in every number; a VALUE compare on it is false, whatever the operator.
    An empty range compares as one missing key.
    """

    target: Target
    operator: Operator
    range: KeyRange
    operand: int | bytes

    @classmethod
    def absent(cls, key: bytes) -> Compare:
        """The key does not exist."""
        return cls(Target.CREATE, Operator.EQUAL, KeyRange.one(key), 0)

    @classmethod
    def nothing_in(cls, range: KeyRange) -> Compare:  # noqa: A002
        """No key of the range exists."""
        return cls(Target.CREATE, Operator.EQUAL, range, 0)

    @classmethod
    def created_at(cls, key: bytes, revision: int) -> Compare:
        """The key's present incarnation was created at `revision`."""
        return cls(Target.CREATE, Operator.EQUAL, KeyRange.one(key), revision)

    @classmethod
    def modified_at(cls, key: bytes, revision: int) -> Compare:
        """The key was last written at `revision` (0: it does not exist)."""
        return cls(Target.MOD, Operator.EQUAL, KeyRange.one(key), revision)


class Txn(Struct, frozen=True):
    """
    All of `success` if every compare is true, else all of `failure`; one revision.

    Every compare of a nested Txn, too, sees the state before the whole Txn.
    """

    compare: tuple[Compare, ...] = ()
    success: tuple[Op, ...] = ()
    failure: tuple[Op, ...] = ()

    @property
    def is_read_only(self) -> bool:
        """Whether no branch can write; such a Txn may be sent twice without harm."""
        for op in self.success + self.failure:
            if not (isinstance(op, Range) or (isinstance(op, Txn) and op.is_read_only)):
                return False
        return True

    @property
    def written_keys(self) -> tuple[bytes, ...]:
        """The keys (for a range its first) that some branch may write, each once."""
        return tuple(dict.fromkeys(_written_keys(self.success + self.failure)))


Op: TypeAlias = Range | Put | DeleteRange | Txn


def _written_keys(ops: tuple[Op, ...]) -> list[bytes]:
    keys: list[bytes] = []
    for op in ops:
        if isinstance(op, Put):
            keys.append(op.key)
        elif isinstance(op, DeleteRange):
            keys.append(op.range.key)
        elif isinstance(op, Txn):
            keys.extend(_written_keys(op.success + op.failure))
    return keys


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


class RangeResult(Struct, frozen=True):
    """
    What a range found.

    `count` is the number of keys in the range, whatever the limit; `more` says that the limit cut some
    off. `revision` is the store's at the answer, not the keys' (and 0 inside a `TxnResult`, where only the
    top revision counts).
    """

    kvs: tuple[KeyValue, ...] = ()
    count: int = 0
    more: bool = False
    revision: int = 0


class PutResult(Struct, frozen=True):
    """`prev_kv` if it was asked for and there was one."""

    prev_kv: KeyValue | None = None


class DeleteRangeResult(Struct, frozen=True):
    """How many keys went, and which if that was asked for."""

    deleted: int = 0
    prev_kvs: tuple[KeyValue, ...] = ()


class TxnResult(Struct, frozen=True):
    """
    Which branch was taken, one result per operation of it, and the store's revision after it.

    In a nested result `revision` is 0.
    """

    succeeded: bool
    results: tuple[OpResult, ...] = ()
    revision: int = 0


OpResult: TypeAlias = RangeResult | PutResult | DeleteRangeResult | TxnResult


class LeaseGrant(Struct, frozen=True):
    """A lease that was granted; `ttl` in seconds is the server's word, not what was asked for."""

    lease: int
    ttl: int
    revision: int = 0


class LeaseRenewal(Struct, frozen=True):
    """The answer to a keep-alive; `ttl` 0 says that the lease does not exist."""

    lease: int
    ttl: int
    revision: int = 0


class LeaseTimeToLive(Struct, frozen=True):
    """What is left of a lease in seconds (`ttl` -1: it does not exist), and the keys that hang on it."""

    lease: int
    ttl: int
    granted_ttl: int = 0
    keys: tuple[bytes, ...] = ()
    revision: int = 0


class Status(Struct, frozen=True):
    """What one member says of itself: answered locally, also without quorum."""

    version: str
    member: int
    leader: int
    revision: int
    raft_term: int = 0
    raft_index: int = 0
    db_size_bytes: int = 0
    is_learner: bool = False
    errors: tuple[str, ...] = ()
    cluster: int = 0


# ── watches ─────────────────────────────────────────────────────────────────────────────────────


class EventKind(IntEnum):
    """What happened to a key."""

    PUT = 0
    DELETE = 1


class Event(Struct, frozen=True):
    """
    One change of one key.

    A DELETE's `kv` carries the key and the deleting revision and nothing else. `prev_kv` is best effort:
    it is missing when the revision before is compacted.
    """

    kind: EventKind
    kv: KeyValue
    prev_kv: KeyValue | None = None

    @classmethod
    def put(cls, kv: KeyValue, prev_kv: KeyValue | None = None) -> Event:
        """`kv.key` was written."""
        return cls(EventKind.PUT, kv, prev_kv)

    @classmethod
    def deleted(cls, key: bytes, *, mod_revision: int, prev_kv: KeyValue | None = None) -> Event:
        """`key` was deleted at `mod_revision`."""
        return cls(EventKind.DELETE, KeyValue(key, mod_revision=mod_revision), prev_kv)

    @property
    def key(self) -> bytes:
        """The key that changed."""
        return self.kv.key

    @property
    def revision(self) -> int:
        """The revision of the change."""
        return self.kv.mod_revision

    @property
    def is_delete(self) -> bool:
        """Whether the key is gone."""
        return self.kind is EventKind.DELETE


class WatchRequest(Struct, frozen=True):
    """
    Ask a server for a watch; `start_revision` is inclusive, 0 means "from the next change on".

    `progress_notify` asks for an empty answer now and then, which moves the resume point of a silent watch.
    """

    range: KeyRange
    start_revision: int = 0
    prev_kv: bool = False
    no_put: bool = False
    no_delete: bool = False
    progress_notify: bool = False


class WatchResponse(Struct, frozen=True):
    """
    One answer of a server about one watch, as it came.

    `fragment` says that the rest follows in the next answer. A cancel for compaction has a
    `compact_revision`, an empty `reason` and revision 0; one answer may be both `created` and `canceled`.
    """

    revision: int = 0
    events: tuple[Event, ...] = ()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    reason: str = ""
    fragment: bool = False


class WatchBatch(Struct, frozen=True):
    """
    What a watch delivers: whole revisions, in order, each once.

    With `created` it carries no events and says that the watch was made anew (a connection broke). A
    batch that is not `created` and has no events is a progress notification: everything up to
    `revision` was delivered. It comes when the server sends the next one, since a server's own may overtake
    events.
    """

    revision: int
    events: tuple[Event, ...] = ()
    created: bool = False
