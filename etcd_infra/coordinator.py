"""The front door: one backend, one session, and a factory per primitive; no logic of its own."""

from __future__ import annotations

import os
import random as random_module
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import msgspec

from etcd_infra._etcd.backend import Backend
from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.keys import Keys
from etcd_infra._policy.codec import JSON, Codec
from etcd_infra._primitives._candidacy import Candidacies
from etcd_infra._primitives._envelope import Names
from etcd_infra._primitives._lock_like import Renewal
from etcd_infra._primitives._space import Space
from etcd_infra._primitives._trunk import Trunks
from etcd_infra._primitives._ttl_leases import TtlLeases
from etcd_infra._primitives.counter import Combiners, Counter
from etcd_infra._primitives.election import Election
from etcd_infra._primitives.lock import Lock
from etcd_infra._primitives.members import Members
from etcd_infra._primitives.multi_lock import MultiLock
from etcd_infra._primitives.rwlock import RWLock
from etcd_infra._primitives.semaphore import Semaphore
from etcd_infra._primitives.state import State
from etcd_infra._primitives.stm import Isolation, transact
from etcd_infra._primitives.topic import Topic
from etcd_infra._primitives.transaction import execute
from etcd_infra._primitives.two_phase import begin
from etcd_infra._primitives.write_behind import WriteBehind, open_write_behind
from etcd_infra._session.clock import Clock
from etcd_infra._session.current import CurrentSession
from etcd_infra._session.keepalive import SessionStatus
from etcd_infra._session.session import open_session
from etcd_infra._session.tally import Tally
from etcd_infra._session.ttl import check_ttl
from etcd_infra._wrappers.grouped import Grouped
from etcd_infra._wrappers.observed import Observed
from etcd_infra._wrappers.retrying import Retrying
from etcd_infra.errors import SessionLostError
from etcd_infra.inspector import Inspector
from etcd_infra.metrics import Metrics, SyncMeter

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from random import Random

    from etcd_infra._etcd.calls import Call, Observer
    from etcd_infra._primitives._hold import Hold
    from etcd_infra._primitives._run import Transaction
    from etcd_infra._primitives._trimmer import Retention
    from etcd_infra._primitives.fence import Fence
    from etcd_infra._primitives.operations import Operation, TransactionResult
    from etcd_infra._primitives.two_phase import TwoPhaseTransaction
    from etcd_infra._session.session import Session

T = TypeVar("T")
U = TypeVar("U")

MEMORY_URL = "memory://"


class Coordinator:
    """
    What a service holds in its hand; made by `open_coordinator`.

    Losing the session ends what hangs on it, not this object: the next acquisition uses the next session.

    Attributes:
        node_id: This process's name among its peers.
        namespace: Everything lives under it.
        backend: The raw backend; keys are full keys.
        state: The namespace's values, of any type; see `State`.
    """

    def __init__(  # noqa: PLR0913 - only open_coordinator calls it
        self,
        backend: Backend,
        keys: Keys,
        sessions: CurrentSession,
        space: Space,
        *,
        combiners: Combiners,
        candidacies: Candidacies,
        trunks: Trunks,
        node_id: str,
        metrics: Metrics,
    ) -> None:
        self.backend = backend
        self.state: State[Any] = State(space, cast("type[Any]", Any))
        self.node_id = node_id
        self.namespace = keys.namespace
        self._keys = keys
        self._sessions = sessions
        self._space = space
        self._combiners = combiners
        self._candidacies = candidacies
        self._trunks = trunks
        self._metrics = metrics

    def __repr__(self) -> str:
        return f"<Coordinator {self.node_id!r} in {self.namespace!r}>"

    @property
    def session(self) -> Session:
        """
        The current session.

        Raises:
            SessionLostError: it was lost, and the next one is not open yet.
        """
        session = self._sessions.session
        if session is None:
            msg = "the session was lost, and the next one is not open yet"
            raise SessionLostError(msg)
        return session

    def is_healthy(self) -> bool:
        """Whether the session is proven to live and no renewal is overdue; local and free."""
        session = self._sessions.session
        return session is not None and session.status is SessionStatus.ALIVE

    def metrics(self) -> dict[str, object]:
        """What this coordinator has done so far; local and free. `docs/metrics.md` explains each field."""
        return self._metrics.read(self._sessions.session, is_leader=self._candidacies.is_leader)

    async def inspect(self, kind: str, name: str | None = None) -> object:
        """
        Describe what is in etcd.

        Args:
            kind: "locks", "rwlocks", "semaphores", "cycles" (who waits for each other), "elections", "members",
                "state", "transactions", "topics", "sessions", "leases" or "health".
            name: One lock, semaphore, election or group, or how state keys begin.

        Raises:
            ValueError: there is no such kind.
        """
        inspector = Inspector(self.backend, self.namespace, now=self._space.clock.wall)
        return await inspector.inspect(kind, name)

    def lock(
        self,
        name: str,
        *,
        ttl: int | None = None,
        renewal: Renewal = Renewal.AUTO,
        on_renewal_failure: Callable[[Hold, Exception], object] | None = None,
    ) -> Lock:
        """Return the lock `name`; see `Lock`."""
        return Lock(
            self._sessions,
            self._keys,
            name,
            ttl=ttl,
            renewal=renewal,
            on_renewal_failure=on_renewal_failure,
        )

    def multi_lock(self, *names: str) -> MultiLock:
        """Return the locks `names` as one; see `MultiLock`."""
        return MultiLock(self._sessions, self._keys, *names)

    def rwlock(self, name: str) -> RWLock:
        """Return the read-write lock `name`; see `RWLock`."""
        return RWLock(self._sessions, self._keys, name)

    def semaphore(self, name: str, permits: int) -> Semaphore:
        """Return the semaphore `name`; see `Semaphore`."""
        return Semaphore(self._sessions, self._keys, name, permits)

    def election(self, name: str, *, quorum: int = 1) -> Election:
        """Return the election `name`; see `Election`."""
        return Election(self._candidacies.of(name), quorum=quorum)

    def members(self, name: str) -> Members:
        """Return the members of the group, or the election, `name`; see `Members`."""
        return Members(self._sessions, self._keys, name)

    @overload
    def topic(self, name: str, *, type: type[U], retention: Retention | None = None) -> Topic[U]: ...
    @overload
    def topic(self, name: str, *, retention: Retention | None = None) -> Topic[Any]: ...
    def topic(
        self,
        name: str,
        *,
        type: Any = Any,  # noqa: A002
        retention: Retention | None = None,
    ) -> Topic[Any]:
        """Return the topic `name`, of payloads of `type`; see `Topic`."""
        return Topic(self._trunks.of(name), Any if type is None else type, retention)

    def counter(self, name: str) -> Counter:
        """Return the counter `name`; see `Counter`."""
        return Counter(self._combiners, name)

    async def execute(
        self, operations: Iterable[Operation], *, fence: Fence | None = None
    ) -> TransactionResult:
        """Apply all operations at one revision, or none; see `docs/transactions.md`."""
        return await execute(self._space, operations, fence=fence)

    async def transact(
        self,
        function: Callable[[Transaction], Awaitable[T]],
        isolation: Isolation = Isolation.SERIALIZABLE_SNAPSHOT,
        *,
        fence: Fence | None = None,
    ) -> T:
        """Run `function` until what it read still holds when what it wrote is applied; see `Isolation`."""
        return await transact(self._space, function, isolation, fence=fence)

    def begin(self, ttl: int = 30) -> AbstractAsyncContextManager[TwoPhaseTransaction]:
        """Begin a transaction in two phases, to be entered; see `TwoPhaseTransaction`."""
        return begin(self._space, ttl=ttl)

    def open_write_behind(self, *, fence: Fence | None = None) -> AbstractAsyncContextManager[WriteBehind]:
        """Open a `WriteBehind`, to be entered: writes that return at once and reach etcd in order."""
        return open_write_behind(self._space, fence)


@asynccontextmanager
async def open_coordinator(  # noqa: PLR0913
    backend: Backend | str | Sequence[str] | None = None,
    *,
    namespace: str | None = None,
    ttl: int = 30,
    node_id: str | None = None,
    codec: Codec = JSON,
    observer: Observer | None = None,
    random: Random | None = None,
    boot_clock: Callable[[], float] | None = None,
    **etcd_options: Any,
) -> AsyncGenerator[Coordinator]:
    """
    Open a coordinator; entering waits for the first session, under the caller's scope.

    Args:
        backend: A `Backend` (it stays open afterwards), etcd's URLs (one, several with commas, or a
            sequence), ``memory://`` for a fresh store inside this process, or None: the environment's
            ``ETCD_INFRA_ENDPOINTS``.
        namespace: Everything lives under it; None: ``ETCD_INFRA_NAMESPACE``, or no prefix at all.
        ttl: Whole seconds, at least 1: how long the session outlives its process. Below 10 a pause of
            etcd's leader may cost the session.
        node_id: This process's name; None: ``ETCD_INFRA_NODE_ID``, else ``POD_NAME`` or the host's name,
            plus a random suffix.
        codec: Turns values of state into bytes and back.
        observer: Is told of each call to etcd.
        random: Source of lease ids and jitter; None: the operating system's.
        boot_clock: Seconds that go on while the machine is suspended; for tests, `trio.current_time`.
        etcd_options: Passed to `open_etcd`, for backends given as URLs.

    Raises:
        ValueError, TypeError: an argument is no good; nothing was sent.
        StorageFullError, AccessDeniedError: etcd refuses a session.

    Cancellation:
        While entering and at the end: the session's lease is revoked, within two seconds.

    Round trips:
        Two to open, one to close.
    """
    environment = os.environ
    keys = Keys(environment.get("ETCD_INFRA_NAMESPACE", "") if namespace is None else namespace)
    check_ttl(ttl)
    draws = random or random_module.SystemRandom()
    name = node_id or environment.get("ETCD_INFRA_NODE_ID") or _default_node_id(environment, draws)
    clock = Clock(boot_clock)
    metrics = Metrics(name, Tally(), SyncMeter(clock))

    def observe(call: Call) -> None:
        metrics.sync.saw(call)
        if observer is not None:
            observer(call)

    async with AsyncExitStack() as stack:
        raw = await stack.enter_async_context(_open_backend(backend, environment, etcd_options))
        carriers = await stack.enter_async_context(open_background())
        observed = Observed(Retrying(Grouped(raw, carriers), draws), observe)
        sessions = _sessions(observed, keys, metrics, clock, draws, ttl=ttl)
        background = await stack.enter_async_context(open_background())
        await background.start(sessions.run)
        space = Space(
            observed, sessions, keys, codec, draws, metrics.tally, TtlLeases(), clock, name, Names(draws)
        )
        combiners = Combiners(space, background)
        candidacies = Candidacies(sessions, keys, background)
        trunks = Trunks(space, background)
        yield Coordinator(
            observed,
            keys,
            sessions,
            space,
            combiners=combiners,
            candidacies=candidacies,
            trunks=trunks,
            node_id=name,
            metrics=metrics,
        )


def _sessions(  # noqa: PLR0913, PLR0917
    backend: Backend, keys: Keys, metrics: Metrics, clock: Clock, random: Random, ttl: int
) -> CurrentSession:
    who = {"node": metrics.node_id, "host": socket.gethostname(), "since": clock.wall()}
    opening = partial(
        open_session,
        backend,
        keys,
        ttl=ttl,
        node_id=metrics.node_id,
        info=msgspec.json.encode(who),
        clock=clock,
        random=random,
        tally=metrics.tally,
    )
    return CurrentSession(opening, random)


@asynccontextmanager
async def _open_backend(
    backend: Backend | str | Sequence[str] | None, environment: Mapping[str, str], options: dict[str, Any]
) -> AsyncGenerator[Backend]:
    if isinstance(backend, Backend):
        _refuse(options, "an open backend")
        yield backend
        return
    endpoints = environment.get("ETCD_INFRA_ENDPOINTS") if backend is None else backend
    if not endpoints:
        msg = "no etcd was named: pass a backend or a URL, or set ETCD_INFRA_ENDPOINTS"
        raise ValueError(msg)
    if endpoints == MEMORY_URL:
        _refuse(options, "a store inside this process")
        from etcd_infra._backends.memory import MemoryEtcd

        yield MemoryEtcd(auto_compact_revisions=10_000)
        return
    from etcd_infra._backends.opening import environment_options, open_etcd

    async with open_etcd(endpoints, **(environment_options(environment) | options)) as opened:
        yield opened


def _refuse(options: dict[str, Any], what: str) -> None:
    if options:
        msg = f"options of open_etcd make no sense with {what}: {sorted(options)}"
        raise TypeError(msg)


def _default_node_id(environment: Mapping[str, str], random: Random) -> str:
    host = environment.get("POD_NAME") or socket.gethostname()
    return f"{host}-{random.getrandbits(32):08x}"
