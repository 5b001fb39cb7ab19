"""One machine's way to etcd: how long messages take, which are held up, lost, doubled or late."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from etcd_infra.testing.simulation.faults import FaultKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from etcd_infra.testing.simulation.faults import Fault
    from etcd_infra.testing.simulation.timeline import Timeline

ON_ANY_CALL: Final = frozenset({FaultKind.DELAYED_ANSWER})
STILL_ARRIVES: Final = 0.5


class Link:
    """
    The two directions between one machine and etcd.

    Attributes:
        requests_cut, answers_cut: How many faults cut that direction at present.
        slow: How many faults slow it down.
        denied: How many faults take its user's rights away.
    """

    def __init__(self, random: Random, timeline: Timeline) -> None:
        self.requests_cut = 0
        self.answers_cut = 0
        self.slow = 0
        self.denied = 0
        self._random = random
        self._timeline = timeline
        self._for_writes: deque[Fault] = deque()
        self._for_calls: deque[Fault] = deque()
        self._held_requests: list[Callable[[], None]] = []
        self._held_answers: list[Callable[[], None]] = []

    def latency(self) -> float:
        """Draw how long one message takes."""
        usual = 0.0005 + 0.004 * self._random.random()
        return usual + self._random.uniform(0.05, 1.0) if self.slow else usual

    def disturb_next(self, fault: Fault) -> None:
        """Let a fault strike the next write, or the next call of any kind."""
        (self._for_calls if fault.kind in ON_ANY_CALL else self._for_writes).append(fault)

    def fate(self, *, writes: bool) -> Fault | None:
        """Return the fault that strikes the call that is being sent; None: it is spared."""
        if writes and self._for_writes:
            return self._for_writes.popleft()
        return self._for_calls.popleft() if self._for_calls else None

    def forget_faults(self) -> None:
        """Withdraw what has not struck yet."""
        self._for_writes.clear()
        self._for_calls.clear()

    def request(self, arrive: Callable[[], None]) -> None:
        """Let a request in, or hold it up."""
        if self.requests_cut:
            self._held_requests.append(arrive)
        else:
            arrive()

    def answer(self, arrive: Callable[[], None]) -> None:
        """Let an answer or an event out, or hold it up."""
        if self.answers_cut:
            self._held_answers.append(arrive)
        else:
            arrive()

    def release_held(self) -> None:
        """Deliver what was held up by a cut that is over; some of it was lost with its connection."""
        if not self.requests_cut:
            requests, self._held_requests = self._held_requests, []
            for arrive in requests:
                if self._random.random() < STILL_ARRIVES:
                    self._timeline.after(self.latency(), arrive)
        if not self.answers_cut:
            answers, self._held_answers = self._held_answers, []
            for arrive in answers:
                arrive()
