"""Random requests, one by one, to the in-memory etcd and to a real one: every answer must be the same."""

from __future__ import annotations

import os
import random
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from msgspec.structs import replace

from etcd_infra._backends.request_check import check_txn_request
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    KeyRange,
    LeaseTimeToLive,
    Operator,
    Put,
    Range,
    SortTarget,
    Target,
    Txn,
)
from etcd_infra.errors import EtcdError, InvalidRequestError
from etcd_infra.testing import MemoryEtcd
from tests.contract.conftest import real_targets
from tests.contract.world import PATIENCE, receive

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._etcd.backend import Backend, WatchStream
    from etcd_infra._etcd.model import Event, Status

# etcd: Go's sort keeps ties in order up to six entries only (3.5.1 is built with an old Go), so there are six.
KEYS = (b"\0", b"a", b"a\0", b"b", b"\xff", b"\xff\xff")
VALUES = (b"", b"\0", b"1", b"2", b"\xff")
LEASES = (0x11, 0x12, 0x13)
REQUESTS = int(os.environ.get("ETCD_INFRA_TEST_REQUESTS", "1500"))


class Plan:
    """Draws requests; knows the store's revision, so that some revisions are near the edges."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.revision = 1
        self.compacted = 0

    def chance(self, probability: float) -> bool:
        """Draw a yes or no."""
        return self._random.random() < probability

    def request(self) -> tuple[str, Callable[[Backend], Awaitable[object]]]:
        """Draw one call, and its description."""
        kind = self._random.choices(
            ("txn", "range", "grant", "revoke", "keep", "left", "list", "compact"),
            (60, 20, 5, 3, 2, 4, 2, 2),
        )[0]
        if kind == "txn":
            txn = self.harmless_txn()
            return f"{txn}", lambda backend: backend.txn(txn)
        if kind == "range":
            request = self.range(pinned=True)
            return f"{request}", lambda backend: backend.range(request)
        lease = self._random.choice(LEASES)
        revision = self._random.choice(
            (self.revision // 2, self.revision - 5, self.revision, self.revision + 1)
        )
        calls = {
            # Long leases only: two servers do not agree on the second in which one runs out.
            "grant": lambda backend: backend.lease_grant(1_000, lease=lease),
            "revoke": lambda backend: backend.lease_revoke(lease),
            "keep": lambda backend: backend.lease_keep_alive(lease),
            "left": lambda backend: backend.lease_time_to_live(lease, keys=True),
            "list": lambda backend: backend.lease_list(),
            "compact": lambda backend: backend.compact(revision),
        }
        return f"{kind} (lease {lease}, revision {revision})", calls[kind]

    def span(self) -> KeyRange:
        """Draw a range: one key, from a key to another (maybe inverted), or open."""
        first, end = self._random.choice(KEYS), self._random.choice(KEYS)
        return KeyRange(first, self._random.choice((b"", b"", end, end, b"\0")))

    def range(self, *, pinned: bool) -> Range:
        """Draw a read."""
        draw = self._random
        near = (self.revision, self.revision - 3, self.compacted, self.compacted - 1, self.revision + 1)
        bounds = {
            name: max(0, draw.choice(near))
            for name in ("min_mod_revision", "max_mod_revision", "min_create_revision", "max_create_revision")
            if self.chance(0.08)
        }
        return Range(
            self.span(),
            revision=max(0, draw.choice(near)) if pinned and self.chance(0.4) else 0,
            limit=draw.choice((0, 0, 1, 2, 3, -1)),
            sort_by=draw.choice((None, None, *SortTarget)),
            descending=self.chance(0.5),
            keys_only=self.chance(0.1),
            count_only=self.chance(0.1),
            serializable=self.chance(0.2),
            **bounds,
        )

    def watch(self) -> tuple[dict[str, object], KeyRange]:
        """Draw a watch: from now, from the past, from what is compacted, or from the future."""
        draw = self._random
        # etcd: a DELETE at the very compaction revision is dropped by servers before 3.5.18 (#18089, #19179).
        starts = (0, 0, self.compacted + 1, self.revision - 3, self.revision + 2, self.compacted - 2)
        start = max(0, draw.choice(starts))
        wishes: dict[str, object] = {
            "start_revision": start + 1 if start == self.compacted else start,
            "prev_kv": self.chance(0.5),
            "no_put": self.chance(0.1),
            "no_delete": self.chance(0.1),
        }
        first, end = sorted(draw.sample(KEYS, 2))
        return wishes, draw.choice((KeyRange(first, end), KeyRange.one(first), KeyRange(first, b"\0")))

    def put(self) -> Put:
        """Draw a put, sometimes one that contradicts itself."""
        draw = self._random
        ignore_value, ignore_lease = self.chance(0.05), self.chance(0.05)
        return Put(
            draw.choice(KEYS) if self.chance(0.99) else b"",
            draw.choice(VALUES) if not ignore_value or self.chance(0.1) else b"",
            draw.choice((0, 0, *LEASES)) if not ignore_lease or self.chance(0.1) else 0,
            self.chance(0.3),
            ignore_value,
            ignore_lease,
        )

    def compare(self) -> Compare:
        """Draw a compare with an operand that may well be near."""
        draw = self._random
        target = draw.choice(tuple(Target))
        near = {
            Target.VERSION: draw.randint(0, 3),
            Target.LEASE: draw.choice((0, *LEASES)),
            Target.VALUE: draw.choice(VALUES),
        }
        operand = near.get(target, draw.choice((0, self.revision, self.revision - 3)))
        return Compare(target, draw.choice(tuple(Operator)), self.span(), operand)

    def harmless_txn(self) -> Txn:
        """Draw a transaction that does not end a server, as some do that open-ended deletes are part of."""
        while True:
            txn = self.txn(2)
            try:
                check_txn_request(txn)
            except InvalidRequestError:
                if deletes_open_end(txn.success + txn.failure):
                    continue
            return txn

    def txn(self, depth: int) -> Txn:
        """Draw a transaction."""
        compares = tuple(self.compare() for _ in range(self._random.choice((0, 0, 1, 1, 2))))
        return Txn(compares, self.branch(depth), self.branch(depth))

    def branch(self, depth: int) -> tuple[Put | DeleteRange | Range | Txn, ...]:
        """Draw a few operations."""
        kinds = ("put", "put", "put", "delete", "range", "txn" if depth else "put")
        made = {
            "put": self.put,
            "delete": lambda: DeleteRange(self.span(), prev_kv=self.chance(0.5)),
            "range": lambda: self.range(pinned=False),
            "txn": lambda: self.txn(depth - 1),
        }
        return tuple(
            made[kind]() for kind in self._random.choices(kinds, k=self._random.choice((0, 1, 1, 2, 3)))
        )


def deletes_open_end(ops: tuple[Put | DeleteRange | Range | Txn, ...]) -> bool:
    """Whether some branch has a delete with the open end."""
    return any(
        deletes_open_end(op.success + op.failure)
        if isinstance(op, Txn)
        else isinstance(op, DeleteRange) and op.range.end == b"\0"
        for op in ops
    )


async def outcome(call: Awaitable[object]) -> object:
    """Return an answer, or the class and text of a refusal, without what depends on time or on hashing."""
    try:
        answer = await call
    except EtcdError as error:
        return type(error).__name__, str(error)
    if isinstance(answer, LeaseTimeToLive):
        return replace(answer, ttl=min(answer.ttl, 0), keys=tuple(sorted(answer.keys)))
    return tuple(sorted(answer)) if isinstance(answer, tuple) else answer


async def events(backend: Backend, start: int, last: int) -> list[Event]:
    """Collect the events of all keys from one revision to another."""
    found: list[Event] = []
    everything = partial(backend.watch, KeyRange.everything(), prev_kv=True)
    async with everything(start_revision=start) as stream:
        while not found or found[-1].revision < last:
            found += (await receive(stream)).events
    return found


class TwoWatches:
    """One watch on either etcd, opened at the same moment with the same wishes."""

    def __init__(self, wishes: dict[str, object], span: KeyRange) -> None:
        self.wishes = f"{span} {wishes}"
        self._open = partial(_open_watch, span, wishes)
        self._stack = AsyncExitStack()
        self._streams: list[WatchStream] = []
        self._told = 0

    async def open(self, real: Backend, memory: Backend) -> None:
        """Open both, and let them catch up: a compaction that overtakes one of them is a matter of luck."""
        for backend in (real, memory):
            self._streams.append(await self._stack.enter_async_context(self._open(backend)))
        assert self._streams[0].created_revision == self._streams[1].created_revision, self.wishes
        await self.catch_up()
        # etcd: its slow loop runs every tenth of a second; until then the past may be compacted under it.
        await trio.sleep(0.15)

    async def compare(self) -> int:
        """Compare what came since, and close both; return how many events there were."""
        try:
            await self.catch_up()
            return self._told
        finally:
            await self._stack.aclose()

    async def catch_up(self) -> None:
        """
        Collect until both have delivered the same.

        A server that is busy reads an event's former value late: a compaction that comes first takes it away.
        """
        real, memory = self._streams
        wanted: list[object] = []
        seen: list[object] = []
        # Neither has to be quick: whoever is behind gets the time.
        with trio.move_on_after(PATIENCE):
            while True:
                for stream, told in ((memory, wanted), (real, seen)):
                    if not (told and isinstance(told[-1], str)):
                        told.extend(await _delivered(stream))
                if seen == wanted:
                    break
        assert seen == wanted, self.wishes
        self._told += sum(not isinstance(one, str) for one in wanted)


def _open_watch(
    span: KeyRange, wishes: dict[str, object], backend: Backend
) -> AbstractAsyncContextManager[WatchStream]:
    return backend.watch(span, **wishes)  # type: ignore[arg-type]


async def _delivered(stream: WatchStream) -> list[object]:
    """Collect events until the stream is silent for a moment, or over: then its error's name is the last."""
    found: list[object] = []
    while True:
        with trio.move_on_after(0.01) as scope:
            try:
                found += (await stream.receive()).events
            except EtcdError as error:
                return [*found, f"{type(error).__name__}: {getattr(error, 'compact_revision', 0)}"]
        if scope.cancelled_caught:
            return found


def facts(status: Status, revision: int) -> tuple[object, ...]:
    """Return what two servers agree on of all that a status says."""
    return status.revision == revision, status.is_learner, status.errors, status.leader == status.member != 0


@pytest.mark.parametrize("target", real_targets(), indirect=True)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.timeout(900)
async def test_every_answer_is_the_same(fresh, seed):
    """
    Whatever is asked, in whatever order, the in-memory etcd answers and remembers what a real one does.

    Watches are opened on the way, from now or from the past; they deliver the same, whatever happens meanwhile.
    """
    plan, real, memory = Plan(seed), fresh.backend, MemoryEtcd()
    watches: list[TwoWatches] = []
    told = 0
    for number in range(REQUESTS):
        text, call = plan.request()
        if text.startswith("compact"):
            for both in watches:
                await both.catch_up()
        wanted, seen = await outcome(call(real)), await outcome(call(memory))
        assert wanted == seen, f"seed {seed}, request {number}: {text}"
        plan.revision, plan.compacted = memory.store.revision, memory.store.compact_revision
        if number % 25 == 0:
            watches.append(TwoWatches(*plan.watch()))
            await watches[-1].open(real, memory)
        if len(watches) > 3:
            told += await watches.pop(0).compare()
    for both in watches:
        told += await both.compare()
    assert facts(await real.status(), plan.revision) == facts(await memory.status(), plan.revision)
    print(f"\n{REQUESTS} requests and {told} events of watches, no difference")
    assert told > REQUESTS / 10

    # etcd: a DELETE at the very compaction revision is dropped by servers before 3.5.18 (#18089, #19179).
    start = plan.compacted + 1
    assert await events(real, start, plan.revision) == await events(memory, start, plan.revision)
    everything = Range(KeyRange.everything())
    assert await real.range(everything) == await memory.range(everything)
