"""
What a work-sharing group keeps of one message: who handles it, and what came of it so far.

Keys
    ``{ns}topic/{topic}/group/{group}/shared/claim/{name}``     who handles it; on the session's lease.
    ``{ns}topic/{topic}/group/{group}/shared/progress/{name}``  how often it was begun, whether it is done.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Txn
from etcd_infra._primitives._who import Who
from etcd_infra._primitives.fence import Fence
from etcd_infra.errors import LockLostError

if TYPE_CHECKING:
    from collections.abc import Generator

    import trio

    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._session.key_watch import Guarded
    from etcd_infra._session.session import Session


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of a message so far: how often it was begun, and whether it is done."""

    attempts: int = 0
    done: bool = False


def parse_progress(kv: KeyValue) -> Progress:
    """Read a progress; what is none counts as nothing."""
    try:
        return msgspec.json.decode(kv.value, type=Progress)
    except msgspec.DecodeError:
        return Progress()


class Claimant(Who, frozen=True):
    """Who claims; `claim` tells this claim from any other one of its session, even on the same message."""

    claim: int = 0


class Claim:
    """
    The right to handle one message; see `Custody`.

    Attributes:
        fence: Its proof is that the claim is there.
    """

    def __init__(self, session: Session, key: bytes, claims: bytes, token: int) -> None:
        proof = (Compare.created_at(key, token),)
        self.fence = Fence(key.decode(errors="replace"), token, session.own_key.epoch, proof)
        self.session = session
        self.key = key
        self._claims = claims
        self._gone = False
        self._over = False
        self._scopes: dict[trio.CancelScope, None] = {}
        self._guarded: Guarded | None = None

    def guard(self) -> None:
        """Notice from now on if it is deleted."""
        watch = self.session.key_watch(self._claims)
        self._guarded = watch.guard(self.key, self.fence.token, self._on_gone)

    def unguard(self) -> None:
        """Expect its end: it is our own doing."""
        if self._guarded is not None:
            self._guarded.forget()

    def is_held(self) -> bool:
        """See `Custody`."""
        return not (self._gone or self._over or self.session.lease.is_lost())

    @contextmanager
    def tied(self) -> Generator[None]:
        """See `Custody`."""
        with self.session.tether() as tether:
            self._scopes[tether.scope] = None
            if self._gone:
                tether.scope.cancel()
            try:
                yield
            finally:
                del self._scopes[tether.scope]

    def loss(self) -> LockLostError:
        """See `Custody`."""
        reason = self.session.lease.error or "somebody deleted it"
        return LockLostError(f"the claim {self.fence.resource!r} was lost: {reason}")

    async def delete(self) -> None:
        """Give the message back; an `EtcdError` means that nothing is definite."""
        self.disown()
        one = KeyRange.one(self.key)
        await self.session.backend.txn(Txn(self.fence.proof, (DeleteRange(one),)))

    def disown(self) -> None:
        """Have nothing to do with it any more: what is left under its key is a stranger."""
        self.unguard()
        if not self._over:
            # Race: only once, as the same key may be claimed again before the deletion is definite.
            self._over = True
            self.session.janitor.known_keys.discard(self.key)

    def _on_gone(self) -> None:
        self._gone = True
        self.session.lease.examine()
        for scope in tuple(self._scopes):
            scope.cancel()


async def unclaim(session: Session, key: bytes, value: bytes) -> None:
    """Delete a claim of ours of which nobody knows whether it was put."""
    found = await session.backend.get(key)
    if found is not None and found.value == value:
        mine = Compare.created_at(key, found.create_revision)
        await session.backend.txn(Txn((mine,), (DeleteRange(KeyRange.one(key)),)))
