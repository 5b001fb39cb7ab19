"""
Locks that are broken in one way each: the mistakes that lock libraries make.

Each is a context in which one thing of the product is replaced; the simulation has to find it.
"""

from __future__ import annotations

from contextlib import contextmanager
from math import inf

import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Operator, Put, Range, Target, Txn
from etcd_infra._primitives import _turn, _waitqueue
from etcd_infra._primitives._hold import Hold, LockStatus
from etcd_infra._primitives._waitqueue import Place
from etcd_infra._session.keepalive import LivingLease, Tether
from etcd_infra._session.key_watch import KeyWatch
from tests.simulation.locks import LockProgram


@contextmanager
def replaced(owner, name, value, *, new=False):
    """Let `owner.name` be `value` for a while; `new`: the class itself has no such name."""
    before = None if new else owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        if new:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def no_fence():
    """Writes do not compare the fence: whoever was paused too long overwrites the next owner's work."""

    async def write(self, process, name, operation, hold, number):
        value = self.value_of(name, hold, operation, number)
        await process.backend.txn(Txn(success=tuple(Put(key, value) for key in self.registers(name))))

    return replaced(LockProgram, "write", write)


def no_generation():
    """A join does not compare the session's generation: a late copy of it comes back after leaving."""

    class Unguarded(Compare):
        @classmethod
        def modified_at(cls, key, revision):
            return Compare(Target.MOD, Operator.GREATER, KeyRange.one(key), -1)

    return replaced(_waitqueue, "Compare", Unguarded)


def no_confirmation():
    """A waiter whose predecessor is gone believes that it is its turn, without having seen its own key."""

    async def look(place):
        up_to_me = Range(place.line, max_create_revision=place.token - 1, keys_only=True)
        kvs = (await _turn._read(place, up_to_me)).kvs
        return max(kvs, key=lambda kv: kv.create_revision, default=None)

    return replaced(_turn, "_look", look)


def watches_holder():
    """A waiter believes that it is next as soon as the one that was directly ahead has gone, or given up."""
    look = _turn._look
    seen = {}

    async def look_once(place):
        if place.key in seen:
            return None
        seen[place.key] = None
        return await look(place)

    return replaced(_turn, "_look", look_once)


def release_by_name():
    """Keys have no number, and leaving deletes by name: a late release frees the session's next acquisition."""

    async def hand_over(self):
        request = Txn(success=(DeleteRange(KeyRange.one(self.key)),))
        answer = await self.session.backend.txn(request)
        self.watch.deliver_deleted(self.key, answer.revision)
        return True

    @contextmanager
    def both():
        with (
            replaced(Place, "_hand_over", hand_over),
            replaced(_waitqueue, "place", lambda line, lease, _number, **_: line + b"%x-0" % lease),
        ):
            yield

    return both()


def release_first():
    """Leaving deletes whoever is first in line."""

    async def hand_over(self):
        kvs = (await self.session.backend.range(Range(self.line, keys_only=True))).kvs
        first = min(kvs, key=lambda kv: kv.create_revision, default=None)
        if first is not None:
            await self.session.backend.txn(Txn(success=(DeleteRange(KeyRange.one(first.key)),)))
        return True

    return replaced(Place, "_hand_over", hand_over)


def deadline_ignored():
    """A lease is trusted until a server says that it is gone."""

    def update(self):
        self.scope.deadline = inf

    @contextmanager
    def both():
        with (
            replaced(LivingLease, "remaining", lambda self: 0.0 if self.status == "lost" else 1000.0),
            replaced(Tether, "update", update),
        ):
            yield

    return both()


def deadline_from_answer():
    """A renewal is trusted from its answer's arrival on."""
    prove = LivingLease.prove

    def prove_late(self, _sent_at, ttl):
        prove(self, self._clock.now(), ttl)

    return replaced(LivingLease, "prove", prove_late)


def no_margin():
    """Trust lasts as long as the TTL says, on a clock that may be slow."""
    from etcd_infra._session import keepalive

    return replaced(keepalive, "margin", lambda _ttl: 0.0)


def monotonic_only():
    """Time that a machine slept through is not counted."""
    from etcd_infra._session.clock import Clock

    return replaced(Clock, "since", lambda _self, then: trio.current_time() - then.monotonic)


def key_unwatched():
    """A holder does not watch its own key."""
    return replaced(KeyWatch, "report_gone", lambda _self, _guarded: None)


def cancelled_stays():
    """Whoever is cancelled while waiting leaves its place in line behind."""
    leave = Place.leave

    async def stay(self, *, until):
        if self.is_first:
            return await leave(self, until=until)
        await trio.lowlevel.checkpoint()
        return None

    return replaced(Place, "leave", stay)


def unknown_is_failure():
    """A join without an answer is taken for one that was not applied, and is forgotten."""
    send = Place._send_join

    async def forgetful(self, generation, conditions, reads, looks):
        answer = await send(self, generation, conditions, reads, looks)
        if answer is None:
            from etcd_infra._etcd.keys import place

            self._unanswered = 0
            self.key = place(self.line.key, self.lease.id, self.session.next_number())
        return answer

    return replaced(Place, "_send_join", forgetful)


def token_from_header():
    """The token is the revision of the answer, also when an earlier copy had joined."""
    enter = Place._enter

    async def enter_wrong(self, conditions, reads, looks):
        answer = await enter(self, conditions, reads, looks)
        if self.token:
            self.token = answer.revision
        return answer

    return replaced(Place, "_enter", enter_wrong)


def stale_look():
    """A waiter, or holder, believes a read that is older than what it was told already."""
    return replaced(KeyWatch, "told_up_to", property(lambda _self: 0, lambda _self, _revision: None), new=True)


def held_by_flag():
    """A hold calls itself held until somebody has told it otherwise; it looks at no clock."""

    def status(self):
        if self._released:
            return LockStatus.RELEASED
        return LockStatus.FENCED if self._key_gone else LockStatus.ACQUIRED

    return replaced(Hold, "status", property(status))


def deaf_waiter():
    """A waiter overlooks that the one ahead has gone, and only looks now and then."""
    return replaced(_turn._Turn, "key_deleted", lambda _self, _key, _revision: None)


BROKEN = (
    no_fence,
    no_generation,
    no_confirmation,
    watches_holder,
    release_by_name,
    release_first,
    deadline_ignored,
    deadline_from_answer,
    no_margin,
    monotonic_only,
    key_unwatched,
    cancelled_stays,
    unknown_is_failure,
    token_from_header,
    stale_look,
    held_by_flag,
    deaf_waiter,
)
