"""
A real etcd cluster for tests: members that can be killed, paused and cut off from their clients.

Clients dial proxies, one in front of each member; the members speak to each other directly. So `partition`
and the proxies' verbs come between clients and members; what cuts a member off from its peers is `pause`.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import trio

from etcd_infra.testing.plain_http import call_gateway
from etcd_infra.testing.proxy import TcpProxy, open_proxy
from etcd_infra.testing.server import EtcdServer, free_ports

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, Sequence
    from types import TracebackType

_ASK_AGAIN_SECONDS: Final = 0.05
_START_TRIES: Final = 3


class EtcdCluster:
    """
    Members of one cluster, each with a data directory of its own and a proxy in front of it.

    Example:
        >>> async with EtcdCluster(3) as cluster, open_etcd(cluster.endpoints) as backend:
        ...     leader = await cluster.leader()
        ...     leader.pause()  # the others elect a new one
        ...     await backend.put(b"k", b"v")
        ...     leader.resume()

    Args:
        size: How many members, at least 1.
        binary: The program; None: the one that `find_etcd` finds.
        election_timeout: Seconds without a sign of the leader after which a member stands for election; the
            leader gives one ten times as often. The shortest TTL is this and a half, rounded up: 1 s at 0.3,
            2 s at etcd's own second.
        quota_bytes: How large each member's database may grow before it refuses every put; None: 2 GiB.
        extra_args: More flags for each member; they win over ours.
        log_directory: Where each member's log is kept, as "m0.log" and so on; None: the logs go with the
            cluster.

    Attributes:
        members: The members: `kill`, `restart`, `pause`, `resume`, and an `endpoint` without a proxy.
        proxies: One in front of each member, in the same order.
    """

    def __init__(  # noqa: PLR0913 - all but the first are named
        self,
        size: int = 3,
        *,
        binary: str | os.PathLike[str] | None = None,
        election_timeout: float = 0.3,
        quota_bytes: int | None = None,
        extra_args: Sequence[str] = (),
        log_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"a cluster has at least one member: {size}")
        if not 0.05 <= election_timeout <= 50:  # noqa: PLR2004 - etcd's own limits
            raise ValueError(f"election_timeout must be 0.05 to 50 seconds: {election_timeout}")
        self.members: tuple[EtcdServer, ...] = ()
        self.proxies: tuple[TcpProxy, ...] = ()
        self._size = size
        self._binary = binary
        self._log_directory = Path(log_directory) if log_directory is not None else None
        self._ids: dict[str, EtcdServer] = {}
        self._stack = AsyncExitStack()
        milliseconds = round(election_timeout * 1000)
        self._flags = (
            f"--election-timeout={milliseconds}",
            f"--heartbeat-interval={max(1, milliseconds // 10)}",
            *([f"--quota-backend-bytes={quota_bytes}"] if quota_bytes is not None else []),
            *extra_args,
        )

    def __repr__(self) -> str:
        return f"<EtcdCluster {', '.join(self.endpoints)}>"

    async def __aenter__(self) -> Self:
        """
        Start the members and wait until each is healthy.

        Raises:
            FileNotFoundError: there is no etcd program here.
            RuntimeError: a member ended, or did not get healthy in 20 seconds; the text shows its log's end.

        Cancellation:
            No process, directory or port is left, here as at the end of the block.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self._stop_members)
            await self._start_members()
            self.proxies = await stack.enter_async_context(self.open_road())
            for member in self.members:
                status = await call_gateway(member.endpoint, "/v3/maintenance/status", {})
                self._ids[status["header"]["member_id"]] = member
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where clients dial: the proxies' endpoints, which stay the same over restarts."""
        return tuple(proxy.endpoint for proxy in self.proxies)

    # ── between clients and members ─────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def open_road(self) -> AsyncGenerator[tuple[TcpProxy, ...]]:
        """Open more proxies, one per member, for one client alone: its own network, to be cut by itself."""
        async with AsyncExitStack() as stack:
            yield tuple(
                [await stack.enter_async_context(open_proxy(member.endpoint)) for member in self.members]
            )

    def partition(self, member: EtcdServer) -> None:
        """Put a black hole between clients and a member until `heal`; its peers still reach it."""
        self.proxies[self.members.index(member)].black_hole()

    def heal(self) -> None:
        """End the faults of all proxies in `proxies`; members stay as they are."""
        for proxy in self.proxies:
            proxy.heal()

    # ── the cluster itself ──────────────────────────────────────────────────────────────────────

    async def leader(self) -> EtcdServer:
        """
        Wait until a running member knows itself to be the leader, and return it.

        A member that is paused is never the answer: the others elect another one, after a while. Without a
        quorum it waits for ever: use `trio.fail_after`.
        """
        while True:
            answers: list[dict[str, Any]] = []
            async with trio.open_nursery() as nursery:
                for member in self.members:
                    nursery.start_soon(self._ask_status, member, answers)
            newest = max(answers, key=lambda answer: int(answer["raftTerm"]), default=None)
            for answer in answers:
                leads = answer.get("leader") == answer["header"]["member_id"]
                if newest and leads and answer["raftTerm"] == newest["raftTerm"]:
                    return self._ids[answer["leader"]]
            await trio.sleep(_ASK_AGAIN_SECONDS)

    async def move_leader(self, to: EtcdServer | None = None) -> EtcdServer:
        """
        Hand the leadership over (MoveLeader), and return the new leader.

        Args:
            to: Who shall lead; None: the next member after the leader.

        Raises:
            RuntimeError: etcd refused; the leader may be another one.
            OSError: the leader did not answer.
        """
        leader = await self.leader()
        chosen = to or self.members[(self.members.index(leader) + 1) % len(self.members)]
        if chosen is leader:
            return leader
        (target,) = [number for number, member in self._ids.items() if member is chosen]
        await call_gateway(leader.endpoint, "/v3/maintenance/transfer-leadership", {"targetID": target})
        return chosen

    async def compact(self, revision: int = 0) -> int:
        """
        Forget the history before `revision` (0: the newest), and return that revision.

        Raises:
            RuntimeError: etcd refused: it is compacted already, or not reached.
            OSError: the leader did not answer; it may be compacted all the same.
        """
        endpoint = (await self.leader()).endpoint
        if not revision:
            found = await call_gateway(endpoint, "/v3/kv/range", {"key": "AA==", "count_only": True})
            revision = int(found["header"]["revision"])
        await call_gateway(endpoint, "/v3/kv/compaction", {"revision": revision})
        return revision

    @staticmethod
    async def _ask_status(member: EtcdServer, answers: list[dict[str, Any]]) -> None:
        try:
            answers.append(await call_gateway(member.endpoint, "/v3/maintenance/status", {}))
        except (OSError, RuntimeError, ValueError):
            # Killed, paused, or just about to start: it is not the leader that is looked for.
            return

    # ── starting and stopping ───────────────────────────────────────────────────────────────────

    async def _start_members(self) -> None:
        for left in reversed(range(_START_TRIES)):
            self.members = self._make_members()
            failures: list[Exception] = []
            # etcd: no member is healthy before a quorum runs.
            async with trio.open_nursery() as nursery:
                for member in self.members:
                    nursery.start_soon(self._start_member, member, failures, nursery.cancel_scope)
            if not failures:
                return
            self._stop_members()
            # Race: between the choice of a port and its use somebody else may take it.
            if not left or "address already in use" not in str(failures[0]):
                raise failures[0]

    @staticmethod
    async def _start_member(member: EtcdServer, failures: list[Exception], scope: trio.CancelScope) -> None:
        try:
            await member.__aenter__()
        except (OSError, RuntimeError) as error:
            failures.append(error)
            scope.cancel()

    def _make_members(self) -> tuple[EtcdServer, ...]:
        peers = {f"m{number}": f"http://127.0.0.1:{port}" for number, port in enumerate(free_ports(self._size))}
        everybody = ",".join(f"{name}={peer}" for name, peer in peers.items())
        return tuple(
            EtcdServer(
                self._binary,
                extra_args=[
                    f"--name={name}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster={everybody}",
                    *self._flags,
                ],
                log=self._log_directory / f"{name}.log" if self._log_directory else None,
            )
            for name, peer in peers.items()
        )

    def _stop_members(self) -> None:
        for member in self.members:
            member.reap()
