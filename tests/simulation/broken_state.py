"""State and counters that are broken in one way each: the mistakes that wrappers of etcd make; see `broken`."""

from __future__ import annotations

from dataclasses import replace

import trio

from etcd_infra._etcd.model import KeyRange, Put, Range, Txn
from etcd_infra._primitives import _key_write, write_behind
from etcd_infra._primitives._cas import commit
from etcd_infra._primitives.counter import Counter
from etcd_infra._primitives.state import State
from etcd_infra._primitives.write_behind import WriteBehind
from etcd_infra._session.mirror import _Follower
from etcd_infra._session.slots import Slots, SlotWrite
from etcd_infra.errors import OutcomeUnknownError, UnavailableError
from tests.simulation.broken import replaced
from tests.simulation.state import COUNT


def sends_again_blindly():
    """A write without an answer is sent again, whatever became of the first copy."""

    def unguarded(self, slot, write):
        mark = Put(slot.key, write.operation + b" " + write.note, lease=self._session.lease.id)
        request = write.request
        return Txn(request.compare, (*request.success, mark), (Range(KeyRange.one(slot.key)), *request.failure))

    return replaced(Slots, "_guarded", unguarded)


def unknown_is_failure():
    """A write without an answer is reported as one that failed."""
    really_send = Slots._send

    async def send(self, slot, request, write):
        answer = await really_send(self, slot, request, write)
        if answer is None:
            slot.dirty = write.unanswered = False
            msg = "no answer"
            raise UnavailableError(msg)
        return answer

    return replaced(Slots, "_send", send)


def success_is_unknown_no_more():
    """A write without an answer is reported as one that worked."""
    write = Slots.write

    async def hopeful(self, request, *, note=b""):
        try:
            return await write(self, request, note=note)
        except OutcomeUnknownError:
            return SlotWrite(applied=True, revision=1, note=note)

    return replaced(Slots, "write", hopeful)


def compares_nothing():
    """Compare-and-swap looks first, and then writes whatever came between."""

    async def commit_anyway(sessions, keys, change):
        return await commit(sessions, keys, replace(change, conditions=()))

    return replaced(_key_write, "commit", commit_anyway)


def fence_not_sent():
    """A fence is checked before the write, not by it."""

    async def commit_unfenced(sessions, keys, change):
        return await commit(sessions, keys, replace(change, fence=None))

    return replaced(_key_write, "commit", commit_unfenced)


def counts_by_reading_and_writing():
    """An add reads the number and writes the sum."""

    async def add(self, delta=1):
        number = await self.get() + delta
        state = State(self._combiner._space, int)
        await state.set(COUNT, number)
        return number

    return replaced(Counter, "add", add)


def deletes_on_trust():
    """A deletion says that something was there."""
    delete = State.delete

    async def always(self, key, **options):
        await delete(self, key, **options)
        return True

    return replaced(State, "delete", always)


def ends_too_early():
    """Leaving a write-behind does not wait for what is under way."""

    async def finish(self):
        self._closed = True

    return replaced(WriteBehind, "finish", finish)


def writes_at_once():
    """Writes behind are sent as they come, several at once."""
    return replaced(WriteBehind, "run", _run_all)


async def _run_all(self):
    async def write(batch):
        change = write_behind.Change(batch.ops(), tuple(batch.values), fence=self._fence)
        await trio.sleep(self._space.random.random() / 10)
        await commit(self._space.sessions, self._space.keys, change)
        self._batches.remove(batch)
        self._tell()

    begun = set()
    async with trio.open_nursery() as nursery:
        while True:
            for batch in self._batches:
                if id(batch) not in begun:
                    begun.add(id(batch))
                    batch.closed = True
                    nursery.start_soon(write, batch)
            await self._news.wait()


def watches_from_now():
    """A watch begins when it was made, not where its snapshot ended."""
    follow = _Follower._follow

    async def follow_from_now(self, started):
        backend = self._backend
        self._backend = _FromNow(backend)
        try:
            await follow(self, started)
        finally:
            self._backend = backend

    return replaced(_Follower, "_follow", follow_from_now)


class _FromNow:
    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def watch(self, keys, *, start_revision=0, **options):
        del start_revision
        return self._inner.watch(keys, **options)


BROKEN = (
    sends_again_blindly,
    unknown_is_failure,
    success_is_unknown_no_more,
    compares_nothing,
    fence_not_sent,
    counts_by_reading_and_writing,
    deletes_on_trust,
    ends_too_early,
    writes_at_once,
    watches_from_now,
)
