"""
A real etcd for tests in containers, by testcontainers: one member, or a cluster on a network of its own.

The image is that of etcd's releases, or one like it: its program is `/usr/local/bin/etcd`. It comes from the
argument or from the environment's `ETCD_INFRA_TEST_IMAGE`.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.request import urlopen

import trio
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

from etcd_infra.testing.server import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_PROGRAM: Final = "/usr/local/bin/etcd"
_CLIENTS: Final = 2379
_PEERS: Final = 2380
_START_SECONDS: Final = 30.0


class _InThreads:
    """Lets a block of a Trio program do what a plain block does."""

    async def __aenter__(self) -> Self:
        """
        Do what entering a plain block does, in a thread.

        Cancellation:
            No container is left.
        """
        try:
            return await trio.to_thread.run_sync(self.__enter__)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType, reportAttributeAccessIssue] - of whom this is mixed into
        except trio.Cancelled:
            await self.__aexit__(None, None, None)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.__exit__, kind, error, traceback)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType, reportAttributeAccessIssue] - likewise


class EtcdContainer(_InThreads, DockerContainer):
    """
    One member in a container; a plain block or, in a Trio program, an asynchronous one.

    Example:
        >>> async with EtcdContainer("etcd:v3.5.16") as etcd, open_coordinator(etcd.endpoint) as infra:
        ...     async with infra.lock("job"): ...

    Args:
        image: The image; None: what `ETCD_INFRA_TEST_IMAGE` names.
        extra_args: More flags for the program; they win over ours.

    Attributes:
        endpoint: Where it answers, "http://host:port"; stays the same over restarts.

    Raises:
        ValueError: no image is named.
        docker.errors.DockerException: no container engine answers.
    """

    def __init__(self, image: str | None = None, *, extra_args: Sequence[str] = ()) -> None:
        super().__init__(_image(image))
        self._port = free_port()
        self.with_bind_ports(_CLIENTS, self._port)
        self._flags = {
            "name": "member",
            "data-dir": "/data",
            "listen-client-urls": f"http://0.0.0.0:{_CLIENTS}",
            "advertise-client-urls": f"http://127.0.0.1:{self._port}",
        }
        self._extra_args = tuple(extra_args)

    @property
    def endpoint(self) -> str:
        """See the class."""
        return f"http://{self.get_container_host_ip()}:{self._port}"

    def join(self, network: Network, name: str, members: Sequence[str]) -> None:
        """Be one of `members` on `network`; before it is started."""
        own = f"http://{name}:{_PEERS}"
        self.with_network(network).with_network_aliases(name)
        self._flags |= {
            "name": name,
            "listen-peer-urls": f"http://0.0.0.0:{_PEERS}",
            "initial-advertise-peer-urls": own,
            "initial-cluster": ",".join(f"{member}=http://{member}:{_PEERS}" for member in members),
        }

    def launch(self) -> None:
        """Start it, and do not wait until it is healthy."""
        flags = [f"--{name}={value}" for name, value in self._flags.items()]
        self.with_command([_PROGRAM, *flags, *self._extra_args])
        super().start()

    def start(self) -> Self:
        """
        Start it and wait until it is healthy.

        Raises:
            RuntimeError: it ended, or was not within 30 seconds; the text shows the end of its log.
        """
        self.launch()
        self.wait_until_healthy()
        return self

    def wait_until_healthy(self) -> None:
        """
        Wait until it answers, has a leader, and can commit.

        Raises:
            RuntimeError: it ended, or was not within 30 seconds; the text shows the end of its log.
        """
        until = time.monotonic() + _START_SECONDS
        while not self._is_healthy():
            self._engine.reload()
            has_ended = self._engine.status == "exited"
            if has_ended or time.monotonic() > until:
                log = b"".join(self.get_logs()).decode(errors="replace")[-2000:]
                fact = "ended" if has_ended else f"did not get healthy in {_START_SECONDS:g} s"
                raise RuntimeError(f"etcd in a container {fact}; its log ends with:\n{log}")
            time.sleep(0.05)

    def _is_healthy(self) -> bool:
        with suppress(OSError, ValueError), urlopen(f"{self.endpoint}/health", timeout=1.0) as answer:  # noqa: S310 - our own address
            return json.load(answer).get("health") == "true"
        return False

    def pause(self) -> None:
        """Stop all that runs in it: connections stay, nothing is answered any more."""
        self._engine.pause()

    def resume(self) -> None:
        """Let a paused one go on."""
        self._engine.unpause()

    def kill(self) -> None:
        """Kill it as a power cut would; `restart` starts it again on the same data."""
        self._engine.kill()

    def restart(self) -> None:
        """Start it again on the same data (politely ended first if it runs) and wait until it is healthy."""
        self._engine.restart()
        self.wait_until_healthy()

    @property
    def _engine(self) -> Any:
        return self.get_wrapped_container()


class EtcdContainerCluster(_InThreads):
    """
    Members of one cluster, in containers on a network of their own; a plain block or an asynchronous one.

    Args:
        size: How many members, at least 1.
        image: As for `EtcdContainer`.
        extra_args: More flags for each member; they win over ours.

    Attributes:
        members: The containers.
        endpoints: Where they answer, in the same order.
    """

    def __init__(self, size: int = 3, *, image: str | None = None, extra_args: Sequence[str] = ()) -> None:
        if size < 1:
            raise ValueError(f"a cluster has at least one member: {size}")
        self.members = tuple(EtcdContainer(image, extra_args=extra_args) for _ in range(size))
        self._stack = ExitStack()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """See the class."""
        return tuple(member.endpoint for member in self.members)

    def __enter__(self) -> Self:
        """
        Start the members and wait until each is healthy.

        Raises:
            RuntimeError: one ended, or was not within 30 seconds; the text shows the end of its log.
        """
        with ExitStack() as stack:
            network = stack.enter_context(Network())
            names = [f"m{number}" for number in range(len(self.members))]
            for member, name in zip(self.members, names, strict=True):
                member.join(network, name, names)
                stack.callback(member.stop)
                member.launch()
            for member in self.members:
                member.wait_until_healthy()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def _image(named: str | None) -> str:
    image = named or os.environ.get("ETCD_INFRA_TEST_IMAGE")
    if not image:
        raise ValueError("no image of etcd is named; pass one, or set ETCD_INFRA_TEST_IMAGE")
    return image
