"""How each kind of fault is brought about, and how it ends."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from etcd_infra._backends.memory_bugs import ServerBug
from etcd_infra._etcd.model import DeleteRange, KeyRange, Put, Range, Txn
from etcd_infra.errors import EtcdError
from etcd_infra.testing.simulation.faults import FaultKind
from etcd_infra.testing.simulation.server import OPERATOR
from etcd_infra.testing.simulation.watch import DEAD_CONNECTION_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from etcd_infra._backends.memory_store import Backup
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra.testing.simulation.faults import Fault
    from etcd_infra.testing.simulation.machine import Machine
    from etcd_infra.testing.simulation.simulation import Simulation

ON_MESSAGES: Final = frozenset(
    {
        FaultKind.LOST_REQUEST,
        FaultKind.LOST_ANSWER,
        FaultKind.LATE,
        FaultKind.DUPLICATE,
        FaultKind.DELAYED_ANSWER,
    }
)
_BUGS: Final = {FaultKind(bug.value): bug for bug in ServerBug}


class Actions:
    """Makes faults happen in one simulation; `end_all` ends those that last."""

    def __init__(self, simulation: Simulation, prefix: bytes) -> None:
        self._simulation = simulation
        self._server = simulation.server
        self._prefix = prefix
        # What undoes each fault that lasts, in the order of their beginning.
        self._lasting: dict[Fault, Callable[[], None]] = {}
        self._backups: dict[Fault, Backup] = {}

    def plan(self, fault: Fault) -> None:
        """Arrange for a fault to happen at its time."""
        timeline = self._simulation.timeline
        timeline.at(fault.at, partial(self._strike, fault))
        if fault.kind is FaultKind.RESTORE:
            timeline.at(max(0.0, fault.at - fault.seconds), partial(self._back_up, fault))

    def end_all(self) -> None:
        """End every fault that lasts, and withdraw every one that has not struck."""
        for fault in tuple(self._lasting):
            self._end(fault)

    def _back_up(self, fault: Fault) -> None:
        self._backups[fault] = self._server.back_up()

    def _strike(self, fault: Fault) -> None:
        if self._simulation.calm:
            return
        machine = self._simulation.machines.get(fault.node)
        if fault.kind in ON_MESSAGES:
            if machine is not None:
                machine.link.disturb_next(fault)
        elif machine is not None:
            self._strike_machine(fault, machine)
        elif fault.kind in _BUGS:
            bug = _BUGS[fault.kind]
            self._server.misbehave(bug, begins=True)
            self._last(fault, partial(self._server.misbehave, bug, begins=False))
        else:
            self._strike_etcd(fault)

    # ── one machine ─────────────────────────────────────────────────────────────────────────────

    def _strike_machine(self, fault: Fault, machine: Machine) -> None:  # noqa: C901 - a table
        match fault.kind:
            case FaultKind.KILL:
                machine.kill()
                self._last(fault, machine.start)
            case FaultKind.PAUSE | FaultKind.BLOCK:
                machine.pause()
                self._last(fault, machine.go_on)
            case FaultKind.SUSPEND:
                machine.suspend()
                self._last(fault, machine.resume)
            case FaultKind.CLOCK_RATE:
                machine.set_rate(0.92 + 0.16 * fault.number / 10**6)
                self._simulation.strike(fault, until=self._simulation.faulty_until)
            case FaultKind.PARTITION | FaultKind.CUT_REQUESTS | FaultKind.CUT_ANSWERS:
                self._cut(fault, machine)
            case FaultKind.RESET:
                machine.break_connections()
                self._simulation.strike(fault)
            case FaultKind.SLOW:
                machine.link.slow += 1
                self._last(fault, partial(self._fast_again, machine))
            case FaultKind.DENY:
                machine.link.denied += 1
                self._last(fault, partial(self._allow, machine))
            case FaultKind.CANCEL:
                self._cancel(fault, machine)
            case _:
                raise AssertionError(fault)

    def _cut(self, fault: Fault, machine: Machine) -> None:
        link = machine.link
        requests = fault.kind is not FaultKind.CUT_ANSWERS
        answers = fault.kind is not FaultKind.CUT_REQUESTS
        link.requests_cut += requests
        link.answers_cut += answers
        self._simulation.timeline.after(DEAD_CONNECTION_SECONDS, machine.notice_dead_connections)

        def heal() -> None:
            link.requests_cut -= requests
            link.answers_cut -= answers
            link.release_held()

        self._last(fault, heal)

    @staticmethod
    def _fast_again(machine: Machine) -> None:
        machine.link.slow -= 1

    @staticmethod
    def _allow(machine: Machine) -> None:
        machine.link.denied -= 1

    def _cancel(self, fault: Fault, machine: Machine) -> None:
        scopes = tuple(machine.process.interruptibles) if machine.process else ()
        if scopes:
            scopes[fault.number % len(scopes)].cancel()
            self._simulation.strike(fault)

    # ── etcd ────────────────────────────────────────────────────────────────────────────────────

    def _strike_etcd(self, fault: Fault) -> None:
        server = self._server
        match fault.kind:
            case FaultKind.LEADER_CHANGE:
                server.change_leader()
                self._simulation.strike(fault)
            case FaultKind.NO_QUORUM:
                server.halt()
                self._last(fault, server.go_on)
            case FaultKind.FULL:
                server.set_full(more=1)
                self._last(fault, partial(server.set_full, more=-1))
            case FaultKind.RESTORE | FaultKind.WIPE:
                server.restore(self._backups.get(fault))
                self._simulation.strike(fault, until=self._simulation.faulty_until)
            case _:
                self._operate(fault)

    def _operate(self, fault: Fault) -> None:
        """Do what somebody with `etcdctl` might do."""
        if self._server.halted:
            return
        self._server.let_expire()
        store, now = self._server.store, self._simulation.now
        request: object = fault.kind
        match fault.kind:
            case FaultKind.COMPACTION:
                action: Callable[[], object] = partial(store.compact, store.revision, now)
            case FaultKind.REVOKE:
                leases = store.lease_list(now)
                if not leases:
                    return
                action = partial(store.lease_revoke, leases[fault.number % len(leases)], now)
            case _:
                key = self._some_key(fault)
                if key is None:
                    return
                again = Put(key.key, key.value, lease=key.lease)
                delete = Txn(success=(DeleteRange(KeyRange.one(key.key)),))
                requests = (delete, Txn(success=(again,)))
                if fault.kind is FaultKind.FOREIGN_DELETE:
                    requests = (delete,)
                action = partial(_apply, [partial(store.txn, request, now) for request in requests])
        self._server.perform(OPERATOR, request, partial(_ignore_refusal, action))
        self._simulation.strike(fault)

    def _some_key(self, fault: Fault) -> KeyValue | None:
        keys = self._server.store.range(Range(KeyRange.prefix(self._prefix)), self._simulation.now).kvs
        return keys[fault.number % len(keys)] if keys else None

    # ── faults that last ────────────────────────────────────────────────────────────────────────

    def _last(self, fault: Fault, undo: Callable[[], None]) -> None:
        self._lasting[fault] = undo
        self._simulation.strike(fault, until=self._simulation.now + fault.seconds)
        self._simulation.timeline.after(fault.seconds, partial(self._end, fault))

    def _end(self, fault: Fault) -> None:
        undo = self._lasting.pop(fault, None)
        if undo is not None:
            undo()


def _apply(requests: list[Callable[[], object]]) -> None:
    for request in requests:
        request()


def _ignore_refusal(action: Callable[[], object]) -> None:
    try:
        action()
    except EtcdError:
        return
