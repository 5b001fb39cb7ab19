"""Read-write locks, semaphores and multi-locks that are broken in one way each; see `broken`."""

from __future__ import annotations

from contextlib import contextmanager

import trio

from etcd_infra._etcd.keys import WRITER
from etcd_infra._etcd.model import Compare, KeyRange, Operator, Target
from etcd_infra._primitives import _turn, semaphore
from etcd_infra._primitives._places import Places
from etcd_infra._primitives._waitqueue import Spot
from etcd_infra._primitives.rwlock import _Reading, _Writing
from etcd_infra._primitives.semaphore import Semaphore
from tests.simulation.broken import replaced

# ── read-write locks ────────────────────────────────────────────────────────────────────────────


def reader_ignores_writers():
    """A reader waits for nobody."""

    def find_spot(self):
        line = self._keys.rwlock_line(self.name)
        return Spot(self._keys.rwlocks, line, b"read-", rivals=KeyRange.prefix(line + b"nobody-"))

    return replaced(_Reading, "_find_spot", find_spot)


def reader_waits_for_one_writer():
    """A reader waits for the writer that is directly ahead, and not for the writer ahead of that one."""
    return _looks_once(lambda place: b"/read-" in place.key)


def reader_passes_who_waits():
    """A reader waits for a writer only if that one is first in line: writers starve."""
    look = _turn._look

    async def look_first(place):
        ahead = await look(place)
        if ahead is None or b"/read-" not in place.key:
            return ahead
        kvs = (await place.session.backend.range(_turn.Range(place.line, keys_only=True))).kvs
        first = min(kvs, key=lambda kv: kv.create_revision, default=None)
        return ahead if first is not None and WRITER in first.key else None

    return replaced(_turn, "_look", look_first)


def writer_ignores_readers():
    """A writer waits for writers only."""

    def find_spot(self):
        line = self._keys.rwlock_line(self.name)
        return Spot(self._keys.rwlocks, line, WRITER, rivals=KeyRange.prefix(line + WRITER))

    return replaced(_Writing, "_find_spot", find_spot)


def writer_waits_for_one_reader():
    """A writer waits for whoever is directly ahead, and not for the other readers."""
    return _looks_once(lambda place: b"/write-" in place.key)


def writer_is_its_heir():
    """Whoever goes grants its turn to the next in line, also when others still read."""
    from etcd_infra._primitives._waitqueue import Place

    init = Place.__init__

    def heirs_for_all(self, session, spot, value, lease=None):
        init(self, session, spot, value, lease)
        self._has_heirs = True

    return replaced(Place, "__init__", heirs_for_all)


def unseen_reader():
    """A reader whose writer has gone is granted without its own key having been seen."""
    read_both = _turn._read_both

    async def believe(place, ahead):
        kvs = await read_both(place, ahead)
        others = tuple(kv for kv in kvs if kv.key != place.key)
        mine = _turn.KeyValue(place.key, create_revision=place.token)
        return (mine, *others)

    return replaced(_turn, "_read_both", believe)


# ── semaphores ──────────────────────────────────────────────────────────────────────────────────


def permits_not_counted():
    """The head of the queue takes a permit whether one is left or not."""
    return _looks_at_semaphore(lambda free, conditions, ops: (True, conditions, ops))


def holders_not_compared():
    """Holders are counted, and may have become more when the permit is taken."""
    return _looks_at_semaphore(lambda free, conditions, ops: (free, conditions[1:], ops))


def own_number_of_permits():
    """Whoever takes a permit stores its own idea of how many there are."""
    look = Semaphore._look

    async def look_in_own_way(self, session, holder, queued):
        from etcd_infra.errors import ConflictError

        try:
            return await look(self, session, holder, queued)
        except ConflictError:
            self.permits += 1
            return await look_in_own_way(self, session, holder, queued)

    return replaced(Semaphore, "_look", look_in_own_way)


def attempt_jumps_the_queue():
    """An attempt takes a permit that is left although somebody waits for one."""

    class Blind(Compare):
        @classmethod
        def nothing_in(cls, wanted):
            return Compare(Target.MOD, Operator.GREATER, wanted, -1)

    look = Semaphore._look

    async def look_past(self, session, holder, queued):
        free, conditions, ops, waiting = await look(self, session, holder, queued)
        return free, conditions, ops, None if queued.endswith(b"/") else waiting

    @contextmanager
    def both():
        with replaced(Semaphore, "_look", look_past), replaced(semaphore, "Compare", Blind):
            yield

    return both()


def no_queue():
    """Whoever looks while a permit is left takes it, wherever it stands in the queue."""

    async def take_at_once(place, _conditions=()):
        await place.join()
        place.is_first = True

    class Anywhere:
        created_at, modified_at, nothing_in = Compare.created_at, Compare.modified_at, Compare.nothing_in

        def __new__(cls, _target, _operator, wanted, _value):
            return Compare(Target.MOD, Operator.GREATER, wanted, -1)

    @contextmanager
    def both():
        with replaced(semaphore, "come_first", take_at_once), replaced(semaphore, "Compare", Anywhere):
            yield

    return both()


def deaf_head():
    """The head of the queue overlooks that a holder has gone, and only looks now and then."""

    async def wait(self):
        with trio.move_on_after(_turn.LOOK_AGAIN_SECONDS):
            await trio.sleep_forever()

    return replaced(_turn._Turn, "wait_line_changed", wait)


# ── multi-locks ─────────────────────────────────────────────────────────────────────────────────


def one_after_the_other():
    """The lines are joined one after the other, in whatever order they were named."""

    async def come_first(self):
        for place in reversed(self._places) if self._first.session.random.random() < 0.5 else self._places:
            await _turn.come_first(place)
        self.token = max(place.token for place in self._places)
        return True

    @contextmanager
    def both():
        proof = property(
            lambda self: tuple(Compare.created_at(place.key, place.token) for place in self._places)
        )
        with replaced(Places, "come_first", come_first), replaced(Places, "proof", proof):
            yield

    return both()


def first_in_one_line():
    """Whoever is first in one of the lines has all the locks."""

    async def come_first(self):
        await self._join(())
        if not await self._look() and not any(place.is_first for place in self._places):
            await _turn.wait_turn(self._first)
        return True

    return replaced(Places, "come_first", come_first)


def proves_one():
    """The fence proves the first lock only, and only that one's loss is noticed."""

    @contextmanager
    def both():
        proof = property(lambda self: (Compare.created_at(self._first.key, self.token),))
        with (
            replaced(Places, "proof", proof),
            replaced(Places, "guard", lambda self, gone: self._first.guard(gone)),
        ):
            yield

    return both()


def keeps_the_others():
    """Giving up gives back the first lock only."""

    async def leave(self, *, until):
        return await self._first.leave(until=until)

    return replaced(Places, "leave", leave)


def _looks_once(affected):
    look = _turn._look
    seen = {}

    async def look_once(place):
        if affected(place) and place.key in seen:
            return None
        seen[place.key] = None
        return await look(place)

    return replaced(_turn, "_look", look_once)


def _looks_at_semaphore(changed):
    look = Semaphore._look

    async def look_so(self, session, holder, queued):
        free, conditions, ops, mine = await look(self, session, holder, queued)
        return (*changed(free, conditions, ops), mine)

    return replaced(Semaphore, "_look", look_so)


RWLOCKS = (
    reader_ignores_writers,
    reader_waits_for_one_writer,
    reader_passes_who_waits,
    writer_ignores_readers,
    writer_waits_for_one_reader,
    writer_is_its_heir,
    unseen_reader,
)
SEMAPHORES = (
    permits_not_counted,
    holders_not_compared,
    own_number_of_permits,
    attempt_jumps_the_queue,
    no_queue,
    deaf_head,
)
MULTI_LOCKS = (one_after_the_other, first_in_one_line, proves_one, keeps_the_others)
BROKEN = (*RWLOCKS, *SEMAPHORES, *MULTI_LOCKS)
