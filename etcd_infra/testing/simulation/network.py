"""Messages between simulated processes and the simulated etcd: each takes its time, and may meet a fault."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import outcome
import trio

from etcd_infra.errors import AccessDeniedError, EtcdError
from etcd_infra.testing.simulation.faults import Fault, FaultKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from etcd_infra.testing.simulation.process import SimulatedProcess
    from etcd_infra.testing.simulation.server import SimulatedServer
    from etcd_infra.testing.simulation.timeline import Event, Timeline

CALL_TIMEOUT: Final = 5.0


class Call:
    """
    One call of a process: it ends with the first of answer, time-out, broken connection and cancellation.

    Attributes:
        verb, request: What is asked.
        writes: Whether it may change anything.
        apply: Asks the store.
        unanswered: Makes the error of a call that had no answer.
    """

    __slots__ = ("apply", "process", "request", "task", "timeout", "unanswered", "verb", "writes")

    def __init__(  # noqa: PLR0913
        self,
        process: SimulatedProcess,
        verb: str,
        request: object,
        apply: Callable[[float], object],
        unanswered: Callable[[], EtcdError],
        *,
        writes: bool,
    ) -> None:
        self.process = process
        self.verb = verb
        self.request = request
        self.apply = apply
        self.unanswered = unanswered
        self.writes = writes
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        self.timeout: Event | None = None

    def end(self, result: outcome.Outcome[Any]) -> None:
        """Give the caller its answer, unless it waits no more, or is dead."""
        if self.task is not None and not self.process.dead:
            task = self._forget()
            trio.lowlevel.reschedule(task, result)

    def break_off(self) -> None:
        """End without an answer."""
        self.end(outcome.Error(self.unanswered()))

    def abort(self, _: object) -> trio.lowlevel.Abort:
        """Let the caller go: it was cancelled. The request goes its way."""
        self._forget()
        return trio.lowlevel.Abort.SUCCEEDED

    def _forget(self) -> trio.lowlevel.Task:
        assert self.task is not None
        task, self.task = self.task, None
        if self.timeout is not None:
            self.timeout.call_off()
        self.process.calls.pop(self, None)
        return task


class Network:
    """Carries calls; `sent` counts them, `log` has each that was applied, `leases` says who granted which."""

    def __init__(self, timeline: Timeline, server: SimulatedServer) -> None:
        self.timeline = timeline
        self.server = server
        self.sent = 0
        self.struck: Callable[[Fault, SimulatedProcess], None] = lambda _fault, _process: None
        self.log: list[tuple[float, str, str, object]] = []
        self.leases: dict[int, str] = {}

    def send(self, call: Call) -> None:
        """Send a call; a dead process's calls go nowhere."""
        process, link = call.process, call.process.link
        if process.dead:
            return
        self.sent += 1
        process.calls[call] = None
        call.timeout = self.timeline.after(CALL_TIMEOUT, call.break_off)
        fault = link.fate(writes=call.writes)
        way = link.latency()
        if fault is None:
            self.timeline.after(way, partial(self._arrive, call, 0.0))
            return
        self.struck(fault, process)
        match fault.kind:
            case FaultKind.LOST_REQUEST:
                self._break_off_soon(call, fault)
            case FaultKind.LOST_ANSWER:
                self._break_off_soon(call, fault)
                self.timeline.after(way, partial(self._arrive, call, None))
            case FaultKind.LATE:
                self._break_off_soon(call, fault)
                self.timeline.after(fault.seconds, partial(self._arrive, call, None))
            case FaultKind.DUPLICATE:
                self.timeline.after(way, partial(self._arrive, call, 0.0))
                self.timeline.after(way + fault.seconds, partial(self._arrive, call, None))
            case _:
                self.timeline.after(way, partial(self._arrive, call, fault.seconds))

    def _break_off_soon(self, call: Call, fault: Fault) -> None:
        if fault.number % 2:  # otherwise the connection seems to live, and the call runs into its time-out
            self.timeline.after(2 * call.process.link.latency(), call.break_off)

    def _arrive(self, call: Call, answer_takes: float | None) -> None:
        perform = partial(self.server.when_in_order, partial(self._perform, call, answer_takes))
        call.process.link.request(perform)

    def _perform(self, call: Call, answer_takes: float | None) -> None:
        result: outcome.Outcome[object] = outcome.Error(call.unanswered())

        def apply() -> None:
            nonlocal result
            try:
                if call.process.link.denied:
                    raise AccessDeniedError("etcdserver: permission denied")
                result = outcome.Value(call.apply(self.server.now))
            except EtcdError as error:
                result = outcome.Error(error)

        self.server.perform(call.process.id, call.request, apply)
        if call.verb == "lease_grant" and isinstance(call.request, int):
            self.leases[call.request] = call.process.id
        self.log.append((self.server.now, call.process.id, call.verb, result))
        if answer_takes is not None:
            link = call.process.link
            self.timeline.after(link.latency() + answer_takes, partial(link.answer, partial(call.end, result)))
