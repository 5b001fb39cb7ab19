"""Where values live: what all who read and write state share, and how bytes become entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio
from msgspec.structs import replace

from etcd_infra._policy.backoff import delay
from etcd_infra._primitives.entry import Consistency, Entry
from etcd_infra.errors import CodecError, FutureRevisionError

if TYPE_CHECKING:
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._etcd.model import KeyValue, Range, RangeResult
    from etcd_infra._policy.codec import Codec
    from etcd_infra._primitives._envelope import Names
    from etcd_infra._primitives._ttl_leases import TtlLeases
    from etcd_infra._session.clock import Clock
    from etcd_infra._session.current import SessionSource
    from etcd_infra._session.tally import Tally

T = TypeVar("T")

MAX_READS: Final = 4


@dataclass(frozen=True, slots=True)
class Space:
    """
    One namespace's state keys, and the means to read and write them.

    Attributes:
        backend: For reads: they need no session, and go on when it is lost.
        sessions: For writes.
        ttl_leases: The leases of this process's writes that have a TTL.
        names: Of the messages that this process publishes.
    """

    backend: Backend
    sessions: SessionSource
    keys: Keys
    codec: Codec
    random: Random
    tally: Tally
    ttl_leases: TtlLeases
    clock: Clock
    node_id: str
    names: Names

    def encode(self, value: object) -> bytes:
        """
        Encode a value; bytes are stored as they are.

        Raises:
            TypeError, ValueError: it can not be encoded.
        """
        return value if isinstance(value, bytes) else self.codec.encode(value)

    def decode(self, kv: KeyValue, type: Any) -> Any:  # noqa: A002
        """
        Decode a key's value as `type`; as bytes it is what is stored.

        Raises:
            CodecError: it is no such value.
        """
        if type is bytes:
            return kv.value
        try:
            return self.codec.decode(kv.value, type)
        except ValueError as error:
            key = self.name_of(kv)
            msg = f"{key!r} at version {kv.mod_revision} is no {getattr(type, '__name__', type)}: {error}"
            raise CodecError(msg, key, kv.mod_revision) from error

    def name_of(self, kv: KeyValue) -> str:
        """Return the user's key of a state key."""
        return self.keys.parse_state(kv.key) or ""

    def entry(self, kv: KeyValue, type: type[T]) -> Entry[T]:  # noqa: A002
        """
        Describe a key.

        Raises:
            CodecError: its value does not decode.
        """
        value = self.decode(kv, type)
        return Entry(self.name_of(kv), value, kv.mod_revision, kv.create_revision, kv.lease)

    async def read(
        self,
        request: Range,
        *,
        consistency: Consistency = Consistency.LINEARIZABLE,
        min_revision: int = 0,
    ) -> RangeResult:
        """
        Read, from `min_revision` on.

        Raises:
            FutureRevisionError: the store has not reached `min_revision`.
            EtcdError: as the backend says.
        """
        request = replace(request, serializable=consistency is Consistency.SERIALIZABLE)
        attempts = 0
        while (found := await self.backend.range(request)).revision < min_revision:
            # A serializable read that is too old is asked again as a linearizable one.
            # etcd: a linearizable one may be older than it must be, too, on some servers (#20418).
            if attempts == MAX_READS:
                msg = f"the store is at revision {found.revision} and has not reached {min_revision}"
                raise FutureRevisionError(msg)
            if not request.serializable:
                await trio.sleep(delay(attempts, self.random.random()))
            request = replace(request, serializable=False)
            attempts += 1
        return found


def check_revision(name: str, revision: int, *, least: int = 0) -> int:
    """
    Refuse what is no revision.

    Raises:
        TypeError: it is no int.
        ValueError: it is less than `least`.
    """
    if type(revision) is not int:
        msg = f"{name} must be an int, not {revision!r}"
        raise TypeError(msg)
    if revision < least:
        msg = f"{name} must be at least {least}, not {revision}"
        raise ValueError(msg)
    return revision
