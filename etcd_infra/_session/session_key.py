"""
The session key and its generation: what kills the copies of a Txn whose answer was lost.

The generation is the mod revision of the session key. A Txn that compares it and got no answer may still be
applied later; rewriting the session key makes it stale for ever. One rewrite settles all copies sent before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    KeyRange,
    KeyValue,
    Put,
    Range,
    RangeResult,
    Txn,
    TxnResult,
)
from etcd_infra._policy.backoff import delay
from etcd_infra._session.slots import created, creation
from etcd_infra.errors import (
    InvalidAnswerError,
    LeaseNotFoundError,
    OutcomeUnknownError,
    SessionLostError,
    StorageFullError,
    UnavailableError,
)

if TYPE_CHECKING:
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._session.keepalive import LivingLease


class SessionKey:
    """
    One session's key.

    Attributes:
        key: Where it is.
        generation: Its mod revision; 0 while it is known to be missing.
        epoch: The store's lineage, read when the key was written.
        first_slot: The first writer slot, created when the key was written.
    """

    def __init__(self, backend: Backend, keys: Keys, lease: LivingLease, info: bytes, random: Random) -> None:
        self._backend = backend
        self._lease = lease
        self._epoch_key = keys.epoch
        self._slot_key = keys.slot(lease.id, 0)
        self._info = info
        self._random = random
        self._seen_at = 0
        self.key = keys.session(lease.id)
        self.generation = 0
        self.epoch = ""
        self.first_slot: KeyValue | None = None

    async def living_generation(self) -> int:
        """
        Return a generation that can guard a Txn; write the key anew if it is missing.

        Raises:
            SessionLostError: the lease does not exist any more.
        """
        failures = 0
        while not self.generation:
            try:
                await self.write()
            except (UnavailableError, OutcomeUnknownError):
                await trio.sleep(delay(failures, self._random.random()))
                failures += 1
        await trio.lowlevel.checkpoint_if_cancelled()
        return self.generation

    def saw(self, found: RangeResult, revision: int) -> bool:
        """Take in what a read at `revision` showed of the key; return whether the generation moved."""
        before = self.generation
        # Race: answers may come in another order than they were given. An older one must not make a
        # living generation look dead, or copies that compare it would be thought stale.
        if revision >= self._seen_at:
            self._seen_at = revision
            self.generation = found.kvs[0].mod_revision if found.kvs else 0
        return self.generation != before

    def wrote(self, revision: int) -> None:
        """Take in that the key was rewritten at `revision`."""
        self.saw(RangeResult((KeyValue(self.key, mod_revision=revision),)), revision)

    async def write(self) -> None:
        """
        Write the key if it is missing; read or create the epoch and the first slot: one Txn.

        Raises:
            SessionLostError: the lease does not exist any more.
            EtcdError: nothing is definite; calling again is safe.
        """
        epoch = KeyRange.one(self._epoch_key)
        # etcd: without nested Txns epoch and slot would cost a round trip each. The epoch is never deleted, so
        # its guard "absent" can not become true again.
        remember_epoch = Txn(
            (Compare.absent(epoch.key),),
            (Put(epoch.key, b"%032x" % self._random.getrandbits(128)), Range(epoch)),
            (Range(epoch),),
        )
        slot = creation(self._slot_key, self._lease.id)
        request = Txn(
            (Compare.absent(self.key),),
            (Put(self.key, self._info, lease=self._lease.id), remember_epoch, slot),
            (Range(KeyRange.one(self.key)), remember_epoch, slot),
        )
        try:
            answer = await self._backend.txn(request)
        except LeaseNotFoundError as error:
            self._lease.lose(SessionLostError(f"lease {self._lease.id:x} does not exist any more"))
            raise SessionLostError(str(self._lease.error)) from error
        own, remembered, first_slot = answer.results
        if answer.succeeded:
            self.wrote(answer.revision)
        elif isinstance(own, RangeResult):
            self.saw(own, answer.revision)
        if not isinstance(remembered, TxnResult) or not isinstance(remembered.results[-1], RangeResult):
            msg = f"an unexpected answer to {request}: {answer}"
            raise InvalidAnswerError(msg)
        self.first_slot = created(first_slot)
        self.epoch = remembered.results[-1].kvs[0].value.decode(errors="replace")

    async def move(self, key: bytes) -> TxnResult:
        """
        Move the generation and delete `key`, in one Txn; if the generation has moved already, only look.

        Returns:
            Succeeded: `key` was deleted by the first operation. Not: what the session key and `key` are now.
        """
        own = KeyRange.one(self.key)
        guard = (Compare.modified_at(self.key, self.generation),)
        delete = DeleteRange(KeyRange.one(key))
        looks = (Range(own), Range(KeyRange.one(key)))
        rewrite = Put(self.key, self._info, lease=self._lease.id)
        try:
            answer = await self._backend.txn(Txn(guard, (delete, rewrite), looks))
        except StorageFullError:
            # etcd: NOSPACE refuses every Txn with a put; deleting the session key moves the generation, too.
            answer = await self._backend.txn(Txn(guard, (delete, DeleteRange(own)), looks))
            if answer.succeeded:
                self.saw(RangeResult(), answer.revision)
        else:
            if answer.succeeded:
                self.wrote(answer.revision)
        if not answer.succeeded and isinstance(answer.results[0], RangeResult):
            self.saw(answer.results[0], answer.revision)
        return answer
