"""
An etcd inside this process, on Trio's clock.

`MemoryEtcd` starts nothing: no task, no thread, no timer. A lease that runs out is noticed by the next call,
or by a blocked `receive()`, which sleeps no longer than until the next lease is due. Under a mock clock all
of it is virtual time.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from enum import Enum, auto
from functools import partial
from math import inf
from random import Random
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from etcd_infra._backends.memory_bugs import BuggyStore, Misbehaviour
from etcd_infra._backends.memory_store import Store
from etcd_infra._backends.memory_stream import MemoryWatch
from etcd_infra._backends.request_check import check_grant, check_txn_request
from etcd_infra._backends.watch_cursor import WatchCursor
from etcd_infra._etcd.backend import Backend
from etcd_infra._etcd.model import Status, WatchRequest
from etcd_infra.errors import EtcdError, OutcomeUnknownError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._backends.memory_bugs import ServerBug
    from etcd_infra._backends.memory_store import Backup
    from etcd_infra._backends.memory_watch import Watcher
    from etcd_infra._etcd.backend import WatchStream
    from etcd_infra._etcd.model import (
        KeyRange,
        LeaseGrant,
        LeaseRenewal,
        LeaseTimeToLive,
        Range,
        RangeResult,
        Txn,
        TxnResult,
    )

T = TypeVar("T")

CALL_TIMEOUT: Final = 5.0
_VERSION: Final = "3.5.30"
_MEMBER: Final = 0x8E9E05C52164694D
_CLUSTER: Final = 0xCDF818194E3A8C32


class _Link(Enum):
    """How one simulated process stands to etcd."""

    UP = auto()
    PARTITIONED = auto()
    REQUESTS_CUT = auto()
    ANSWERS_CUT = auto()
    PAUSED = auto()
    CRASHED = auto()


_NO_REQUESTS: Final = frozenset({_Link.PARTITIONED, _Link.REQUESTS_CUT})
_NO_ANSWERS: Final = frozenset({_Link.PARTITIONED, _Link.ANSWERS_CUT})
_STOPPED: Final = frozenset({_Link.PAUSED, _Link.CRASHED})


class MemoryNode(Backend):
    """
    One simulated process's way to a `MemoryEtcd`; made by `MemoryEtcd.node`.

    Every verb has two checkpoints: cancelled at the first it was not applied, at the second it was, and the
    answer is lost.
    """

    def __init__(self, store: Store, nodes: list[MemoryNode], *, name: str, call_timeout: float) -> None:
        self.name = name
        self._store = store
        self._nodes = nodes
        self._nodes.append(self)
        self._call_timeout = call_timeout
        self._link = _Link.UP
        self._link_changed = trio.Event()
        # A dictionary as an ordered set: the order of wake-ups must not depend on addresses.
        self._streams: dict[MemoryWatch, None] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self._link.name.lower()}>"

    # ── faults ──────────────────────────────────────────────────────────────────────────────────

    def partition(self, *, requests: bool = True, answers: bool = True) -> None:
        """
        Cut the way to etcd, or one direction of it.

        Calls, also those already applied, get no answer and end at their time-out; watches break. Without
        `requests` alone nothing new reaches etcd, but watches that exist go on; without `answers` alone calls
        are applied, and neither their answers nor events come back.

        Raises:
            ValueError: neither direction was named.
        """
        if not requests and not answers:
            raise ValueError("a partition cuts requests, answers, or both")
        if requests and answers:
            self._set_link(_Link.PARTITIONED)
            self.break_watches()
        else:
            self._set_link(_Link.REQUESTS_CUT if requests else _Link.ANSWERS_CUT)

    def break_watches(self) -> None:
        """Break the connections of all watches; each is made anew as soon as that gets through."""
        for stream in self._streams:
            stream.cut()
            stream.wake()

    def heal(self) -> None:
        """
        End a partition or a pause.

        Calls that still wait go on; watches that broke are made anew at their next `receive`.
        """
        self._set_link(_Link.UP)

    def pause(self) -> None:
        """Stop the process as by SIGSTOP: until `heal` it sends and notices nothing, not even time-outs."""
        self._set_link(_Link.PAUSED)

    def crash(self) -> None:
        """End the process as by SIGKILL: its calls never return, and only a cancellation ends them."""
        for stream in self._streams:
            stream.cut()
        self._set_link(_Link.CRASHED)

    @property
    def crashed(self) -> bool:
        """Whether `crash` was called; that is for good."""
        return self._link is _Link.CRASHED

    def _set_link(self, link: _Link) -> None:
        if not self.crashed:
            self._link = link
            changed, self._link_changed = self._link_changed, trio.Event()
            changed.set()
            self._wake_streams()

    def _wake_streams(self) -> None:
        for stream in self._streams:
            stream.wake()

    async def _reach(self, deadline: float, cut: frozenset[_Link]) -> bool:
        """Wait until the way is not `cut` nor the process stopped; False: it was still cut at `deadline`."""
        while self._link in cut or self._link in _STOPPED:
            if self._link in _STOPPED:
                await self._link_changed.wait()
                continue
            with trio.move_on_at(deadline) as waiting:
                await self._link_changed.wait()
            if waiting.cancelled_caught:
                return False
        return True

    async def _call(
        self,
        apply: Callable[[float], T],
        unanswered: Callable[[], EtcdError],
    ) -> T:
        deadline = trio.current_time() + self._call_timeout
        await trio.lowlevel.checkpoint()
        if not await self._reach(deadline, _NO_REQUESTS):
            raise unanswered()
        try:
            answer = apply(trio.current_time())
        except EtcdError:
            await self._answered(deadline, unanswered)  # a refusal takes the same way back
            raise
        await self._answered(deadline, unanswered)
        return answer

    async def _answered(self, deadline: float, unanswered: Callable[[], EtcdError]) -> None:
        await trio.lowlevel.checkpoint()
        if not await self._reach(deadline, _NO_ANSWERS):
            raise unanswered()

    async def _read(self, apply: Callable[[float], T]) -> T:
        return await self._call(
            apply,
            lambda: UnavailableError(f"no answer from etcd within {self._call_timeout} s"),
        )

    async def _write(self, summary: str, apply: Callable[[float], T], keys: tuple[bytes, ...] = ()) -> T:
        return await self._call(apply, lambda: OutcomeUnknownError(summary, keys))

    # ── the verbs ───────────────────────────────────────────────────────────────────────────────

    async def range(self, request: Range, /) -> RangeResult:
        """Read keys."""
        return await self._read(partial(self._store.range, request))

    async def txn(self, request: Txn, /) -> TxnResult:
        """Evaluate the compares and apply one branch."""
        check_txn_request(request)
        apply = partial(self._store.txn, request)
        if request.is_read_only:
            return await self._read(apply)
        return await self._write("a transaction", apply, request.written_keys)

    def watch(  # noqa: PLR0913
        self,
        range: KeyRange,  # noqa: A002
        /,
        *,
        start_revision: int = 0,
        prev_kv: bool = False,
        no_put: bool = False,
        no_delete: bool = False,
        progress_notify: bool = False,
        coordination: bool = False,
    ) -> AbstractAsyncContextManager[WatchStream]:
        """Watch keys."""
        request = WatchRequest(range, start_revision, prev_kv, no_put, no_delete, progress_notify)
        return self._open_watch(WatchCursor(request, from_now=coordination))

    @asynccontextmanager
    async def _open_watch(self, cursor: WatchCursor) -> AsyncGenerator[WatchStream]:
        stream = MemoryWatch(self, cursor)
        self._streams[stream] = None
        try:
            await stream.open()
            yield stream
        finally:
            del self._streams[stream]
            stream.close()

    async def compact(self, revision: int, /) -> int:
        """Forget the history before `revision`."""
        return await self._write(f"a compaction at {revision}", partial(self._store.compact, revision))

    async def lease_grant(self, ttl: int, /, *, lease: int = 0) -> LeaseGrant:
        """Grant a lease."""
        check_grant(ttl, lease)
        return await self._write("a lease grant", partial(self._grant, ttl, lease))

    def _grant(self, ttl: int, lease: int, now: float) -> LeaseGrant:
        before = self._store.next_deadline
        granted = self._store.lease_grant(ttl, lease, now)
        if self._store.next_deadline != before:
            # Race: who sleeps until the lease that was due first must now wake up earlier.
            for node in self._nodes:
                node._wake_streams()  # noqa: SLF001
        return granted

    async def lease_keep_alive(self, lease: int, /) -> LeaseRenewal:
        """Renew a lease."""
        return await self._read(partial(self._store.lease_keep_alive, lease))

    async def lease_revoke(self, lease: int, /) -> int:
        """End a lease."""
        return await self._write("a lease revoke", partial(self._store.lease_revoke, lease))

    async def lease_time_to_live(self, lease: int, /, *, keys: bool = False) -> LeaseTimeToLive:
        """Ask what is left of a lease."""
        return await self._read(partial(self._store.lease_time_to_live, lease, keys=keys))

    async def lease_list(self) -> tuple[int, ...]:
        """List the ids of all leases."""
        return await self._read(self._store.lease_list)

    async def status(self) -> Status:
        """Describe the one simulated member."""
        return await self._read(self._status)

    def _status(self, now: float) -> Status:
        self._store.advance(now)
        alarms = (f"memberID:{_MEMBER} alarm:NOSPACE ",) if self._store.full else ()
        return Status(
            version=_VERSION,
            member=_MEMBER,
            leader=_MEMBER,
            revision=self._store.revision,
            raft_term=2,
            raft_index=3 + self._store.revision,
            errors=alarms,
            cluster=_CLUSTER,
        )

    # ── for its watches ─────────────────────────────────────────────────────────────────────────

    @property
    def hears(self) -> bool:
        """Whether answers and events get through at present."""
        return self._link is _Link.UP or self._link is _Link.REQUESTS_CUT

    @property
    def is_up(self) -> bool:
        """Whether calls get through, and come back."""
        return self._link is _Link.UP

    @property
    def watches(self) -> int:
        """How many watches this node has open."""
        return len(self._streams)

    def start_watcher(self, request: WatchRequest) -> Watcher:
        """Create a watch in the store."""
        return self._store.watch(request, trio.current_time())

    def advance(self) -> None:
        """Let the leases run out that are due by now."""
        self._store.advance(trio.current_time())

    @property
    def next_deadline(self) -> float:
        """When the next lease is due."""
        deadline = self._store.next_deadline
        return inf if deadline is None else deadline


class MemoryEtcd(MemoryNode):
    """
    An etcd inside this process: a backend by itself, and the store behind any number of `node`s.

    With nodes of its own for the simulated processes it serves as the observer that no fault concerns.

    Args:
        min_ttl: Seconds; the TTL that shorter ones are raised to (a real etcd's default is 2).
        call_timeout: Seconds after which a call that a partition swallowed ends.
        progress_interval: Seconds between progress notifications.
        keep_history: Compaction leaves `store.history` alone, so that a checker finds every commit in it.
        auto_compact_revisions: Compact now and then, so that at least so many revisions are left, and at most
            twice as many (etcd: ``--auto-compaction-mode=revision``); 0: only `compact` does.
        bugs: Bugs of real servers, which strike at three in ten of their opportunities.
        random: Decides when they strike.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        min_ttl: int = 2,
        call_timeout: float = CALL_TIMEOUT,
        progress_interval: float = 600.0,
        keep_history: bool = False,
        auto_compact_revisions: int = 0,
        store: Store | None = None,
        bugs: Iterable[ServerBug] = (),
        random: Random | None = None,
    ) -> None:
        switched_on = frozenset(bugs)
        make = partial(BuggyStore, Misbehaviour(switched_on, random or Random(0))) if switched_on else Store
        self.store = store or make(
            min_ttl=min_ttl,
            progress_seconds=progress_interval,
            keep_history=keep_history,
            auto_compact_revisions=auto_compact_revisions,
        )
        self._by_name: dict[str, MemoryNode] = {}
        super().__init__(self.store, [], name="", call_timeout=call_timeout)

    def node(self, name: str, *, call_timeout: float | None = None) -> MemoryNode:
        """
        Return the backend of the simulated process `name`.

        The same name gives the same node, until it crashed: then it is a new process.
        """
        node = self._by_name.get(name)
        if node is None or node.crashed:
            timeout = self._call_timeout if call_timeout is None else call_timeout
            node = MemoryNode(self.store, self._nodes, name=name, call_timeout=timeout)
            self._by_name[name] = node
        return node

    @property
    def open_watches(self) -> int:
        """How many watches are open, of all nodes."""
        return sum(node.watches for node in self._nodes)

    # ── what happens to etcd as a whole ─────────────────────────────────────────────────────────

    def change_leader(self) -> None:
        """Have another leader: every lease that has not run out gets its full time again, watches break."""
        now = trio.current_time()
        self.store.advance(now)
        self.store.refresh_leases(now)
        self._restart()

    def back_up(self) -> Backup:
        """Save everything, for `restore`."""
        return self.store.back_up(trio.current_time())

    def restore(self, backup: Backup) -> None:
        """Go back to `backup`: the revision is lower then, what was written since is gone, watches break."""
        self.store.restore(backup, trio.current_time())
        self._restart()

    def wipe(self) -> None:
        """Lose everything: an empty store, at revision 1; watches break."""
        self.store.restore(None, trio.current_time())
        self._restart()

    def _restart(self) -> None:
        for node in self._nodes:
            node.break_watches()
