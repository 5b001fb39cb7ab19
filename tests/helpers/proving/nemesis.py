"""What goes wrong, one thing after the other: members on one side, processes on the other."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio

from etcd_infra.abc import KeyRange
from etcd_infra.errors import EtcdError


@dataclass
class Nemesis:
    """Breaks members and processes until told to stop; keeps a diary."""

    cluster: object
    crew: object
    observations: list
    backend: object
    random: object
    ttl: int
    kills_members: bool
    pace: float = 1.0
    diary: list[dict] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    stopping: bool = False

    @asynccontextmanager
    async def fault(self, kind, **facts):
        """Note a fault in the diary, with its begin and its end."""
        entry = {"kind": kind, "begin": time.monotonic(), "end": float("inf"), **facts}
        self.diary.append(entry)
        self.counts[kind] += 1
        try:
            yield
        finally:
            entry["end"] = time.monotonic()

    def truth(self):
        """Return the watch that has seen the most."""
        return max(self.observations, key=lambda one: one.revision)

    async def run(self):
        """Break things; when told to stop, end what is broken and return."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat, self._member_faults(), 1.5)
            nursery.start_soon(self._repeat, self._process_faults(), 0.5)
            nursery.start_soon(self._repeat, [self.compaction], 1.0)

    async def _repeat(self, faults, rest):
        waiting = []
        while not self.stopping:
            # Every kind comes before any comes again.
            waiting = waiting or self.random.sample(faults, len(faults))
            with suppress(OSError, RuntimeError, EtcdError):
                await waiting.pop()()
            await trio.sleep(rest * self.pace * (0.5 + self.random.random()))

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def _member_faults(self):
        faults = [
            self.leader_paused,
            self.follower_paused,
            self.leader_moved,
            self.member_cut_off,
            self.connections_reset,
            self.answers_swallowed,
            self.slow_member,
        ]
        return [*faults, self.member_killed] if self.kills_members else faults

    async def leader_paused(self):
        """The leader stands still for one to three seconds."""
        await self._pause(await self.cluster.leader(), "leader paused")

    async def follower_paused(self):
        """A follower stands still for one to three seconds."""
        leader = await self.cluster.leader()
        others = [member for member in self.cluster.members if member is not leader] or [leader]
        await self._pause(self.random.choice(others), "follower paused")

    async def _pause(self, member, kind):
        async with self.fault(kind):
            member.pause()
            try:
                await trio.sleep(self.pace * (1 + 2 * self.random.random()))
            finally:
                member.resume()

    async def member_killed(self):
        """A member is killed and started again on its data."""
        member = self.random.choice(self.cluster.members)
        async with self.fault("member killed"):
            await member.kill()
            await trio.sleep(0.5 * self.pace)
            with trio.CancelScope(shield=True):
                await member.restart()

    async def leader_moved(self):
        """The leader hands over."""
        async with self.fault("leader moved"):
            await self.cluster.move_leader()

    async def member_cut_off(self):
        """No process gets an answer from one member."""
        await self._on_a_member("member cut off", lambda proxy: proxy.black_hole(), 2)

    async def connections_reset(self):
        """Every connection to one member is reset."""
        await self._on_a_member("connections reset", lambda proxy: proxy.reset(), 0)

    async def answers_swallowed(self):
        """One member is asked, and its answers get lost."""
        await self._on_a_member("answers swallowed", lambda proxy: proxy.swallow_answers(), 1)

    async def slow_member(self):
        """The road to one member takes a fifth of a second more."""
        await self._on_a_member("slow member", lambda proxy: proxy.delay(0.2), 2)

    async def _on_a_member(self, kind, strike, seconds):
        number = self.random.randrange(len(self.cluster.members))
        proxies = [worker.road[number] for worker in self.crew.alive.values()]
        async with self.fault(kind):
            for proxy in proxies:
                strike(proxy)
            try:
                await trio.sleep(seconds * self.pace)
            finally:
                for proxy in proxies:
                    proxy.heal()

    async def compaction(self):
        """The history is forgotten, but for what the observers have not seen yet."""
        async with self.fault("compaction"):
            await self.cluster.compact(min(one.revision for one in self.observations))

    # ── processes ───────────────────────────────────────────────────────────────────────────────

    def _process_faults(self):
        return [
            self.holder_killed,
            self.holder_paused,
            self.waiter_paused,
            self.holder_cut_off,
            self.key_deleted,
            self.lease_revoked,
        ]

    def _somebody(self, *, holding):
        working = [
            worker
            for worker in self.crew.alive.values()
            if not worker.stopped and not self.crew.is_done(worker)
        ]
        names = {who for _, who, _ in self.truth().holders().values()}
        chosen = [worker for worker in working if (worker.name in names) is holding] or working
        return self.random.choice(chosen) if chosen else None

    @asynccontextmanager
    async def _disturb(self, kind, worker):
        began = time.monotonic()
        try:
            async with self.fault(kind, worker=worker.name):
                yield
        finally:
            worker.disturbed.append((began, time.monotonic()))

    async def holder_killed(self):
        """A process is killed, holding a lock if possible."""
        if worker := self._somebody(holding=True):
            async with self.fault("holder killed", worker=worker.name):
                await self.crew.kill(worker)
                # Its key stays until the lease runs out: the hand-over is this fault's.
                await trio.sleep(0.2)

    async def holder_paused(self):
        """A holder stands still for one to two TTLs."""
        await self._stop("holder paused", holding=True)

    async def waiter_paused(self):
        """Somebody who holds nothing stands still for one to two TTLs."""
        await self._stop("waiter paused", holding=False)

    async def _stop(self, kind, *, holding):
        if worker := self._somebody(holding=holding):
            async with self._disturb(kind, worker):
                worker.pause()
                try:
                    await trio.sleep(self.ttl * (1 + self.random.random()))
                finally:
                    worker.resume()

    async def holder_cut_off(self):
        """A holder reaches no member for a TTL and a half."""
        if worker := self._somebody(holding=True):
            async with self._disturb("holder cut off", worker):
                for proxy in worker.road:
                    proxy.black_hole()
                try:
                    await trio.sleep(self.ttl * 1.5)
                finally:
                    for proxy in worker.road:
                        proxy.heal()

    async def key_deleted(self):
        """An operator deletes a holder's key."""
        for key in list(self.truth().holders())[:1]:
            async with self.fault("key deleted"):
                await self.backend.delete(KeyRange.one(key))

    async def lease_revoked(self):
        """An operator revokes a holder's lease."""
        for _, _, lease in list(self.truth().holders().values())[-1:]:
            async with self.fault("lease revoked"):
                await self.backend.lease_revoke(lease)
