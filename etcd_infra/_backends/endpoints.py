"""
Which endpoint next: a pure policy, and a holder of one channel per endpoint.

Calls stick to one endpoint while it answers: a client that keeps changing members sees serializable reads go
back in time. One that fails, or accepts and does not answer, sits out for a while that doubles each time.
Keep-alives rotate instead, since behind one stuck member every renewal would wait (an etcd follower holds
them for seven seconds when the leader pauses).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from etcd_infra._backends.channel import Channel

FIRST_REST: Final = 0.5
LONGEST_REST: Final = 10.0


class EndpointPolicy:
    """
    The choice among `count` endpoints, by number; time comes in as seconds of any one clock.

    Invariant: there is always a choice. If all are resting, it is the one whose rest ends first.
    """

    def __init__(self, count: int) -> None:
        self._current = 0
        self._rotation = -1
        self._failures = [0] * count
        self._resting_until = [0.0] * count

    def choose(self, now: float) -> int:
        """Return the endpoint for an ordinary call: the last one while it is well, else the next that is."""
        if self.is_well(self._current, now):
            return self._current
        self._current = self._first_well(self._current, now)
        return self._current

    def rotate(self, now: float) -> int:
        """Return the endpoint for a keep-alive: each time the next one that is well."""
        self._rotation = self._first_well(self._rotation + 1, now)
        return self._rotation

    def failed(self, endpoint: int, now: float) -> None:
        """Note that an endpoint did not answer, or could not."""
        # Calls that were in flight together fail together: one outage, one step of back-off.
        if self.is_well(endpoint, now):
            rest = min(FIRST_REST * 2 ** min(self._failures[endpoint], 10), LONGEST_REST)
            self._failures[endpoint] += 1
            self._resting_until[endpoint] = now + rest

    def succeeded(self, endpoint: int) -> None:
        """Note that an endpoint answered, were it only to refuse."""
        self._failures[endpoint] = 0
        self._resting_until[endpoint] = 0.0

    def is_well(self, endpoint: int, now: float) -> bool:
        """Whether an endpoint is not resting."""
        return self._resting_until[endpoint] <= now

    def _first_well(self, start: int, now: float) -> int:
        count = len(self._failures)
        order = [(start + step) % count for step in range(count)]
        well = (endpoint for endpoint in order if self.is_well(endpoint, now))
        return next(well, min(order, key=self._resting_until.__getitem__))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """
    Where an etcd member listens.

    Attributes:
        host: Without brackets.
        port: From 1 to 65535.
        secure: Whether https or http was said; None: neither.
    """

    host: str
    port: int
    secure: bool | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Endpoints:
    """One channel per endpoint, made when it is first chosen."""

    def __init__(self, endpoints: Sequence[Endpoint], connect: Callable[[Endpoint], Channel]) -> None:
        self.policy = EndpointPolicy(len(endpoints))
        self._endpoints = tuple(endpoints)
        self._connect = connect
        self._channels: dict[int, Channel] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"<Endpoints {', '.join(map(str, self._endpoints))}>"

    def channel(self, endpoint: int) -> Channel:
        """Return the channel to an endpoint that the policy chose."""
        if endpoint not in self._channels:
            if self._closed:
                raise trio.ClosedResourceError("this connection to etcd was closed")
            self._channels[endpoint] = self._connect(self._endpoints[endpoint])
        return self._channels[endpoint]

    def name(self, endpoint: int) -> str:
        """Return "host:port", for messages."""
        return str(self._endpoints[endpoint])

    async def aclose(self) -> None:
        """Close every channel; there will be no others."""
        self._closed = True
        for channel in self._channels.values():
            await channel.aclose()
