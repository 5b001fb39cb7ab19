"""What users' tests, and our own, are made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._backends.memory import MemoryEtcd
from etcd_infra._backends.memory_bugs import ServerBug
from etcd_infra.testing.check_backend import check_backend
from etcd_infra.testing.cluster import EtcdCluster
from etcd_infra.testing.fault_rates import FaultRates
from etcd_infra.testing.faulty import FaultyBackend
from etcd_infra.testing.fences import Claim, Grant, check_fences, check_grants
from etcd_infra.testing.leaks import Inventory, find_leaks, take_inventory
from etcd_infra.testing.linearizability import (
    CompareAndSwap,
    Model,
    Operation,
    Read,
    Register,
    Write,
    check_linearizable,
)
from etcd_infra.testing.ordering import Timed, check_real_time_order
from etcd_infra.testing.proxy import TcpProxy, open_proxy
from etcd_infra.testing.recording import RecordingBackend
from etcd_infra.testing.server import EtcdServer, find_etcd
from etcd_infra.testing.simulation.counters import Counters, Hit
from etcd_infra.testing.simulation.faults import Fault, FaultKind, draw_plan
from etcd_infra.testing.simulation.process import Note, SimulatedProcess
from etcd_infra.testing.simulation.shrinking import shrink
from etcd_infra.testing.simulation.simulation import Settings, Simulation, SimulationRun, Strike, simulate
from etcd_infra.testing.violation import Violation
from etcd_infra.testing.watch_oracle import Watched, check_watch

if TYPE_CHECKING:
    from etcd_infra.testing.container import EtcdContainer, EtcdContainerCluster

__all__ = [
    "Claim",
    "CompareAndSwap",
    "Counters",
    "EtcdCluster",
    "EtcdContainer",
    "EtcdContainerCluster",
    "EtcdServer",
    "Fault",
    "FaultKind",
    "FaultRates",
    "FaultyBackend",
    "Grant",
    "Hit",
    "Inventory",
    "MemoryEtcd",
    "Model",
    "Note",
    "Operation",
    "Read",
    "RecordingBackend",
    "Register",
    "ServerBug",
    "Settings",
    "SimulatedProcess",
    "Simulation",
    "SimulationRun",
    "Strike",
    "TcpProxy",
    "Timed",
    "Violation",
    "Watched",
    "Write",
    "check_backend",
    "check_fences",
    "check_grants",
    "check_linearizable",
    "check_real_time_order",
    "check_watch",
    "draw_plan",
    "find_etcd",
    "find_leaks",
    "open_proxy",
    "shrink",
    "simulate",
    "take_inventory",
]


def __getattr__(name: str) -> object:
    # These need testcontainers, which not everybody has.
    if name in {"EtcdContainer", "EtcdContainerCluster"}:
        from etcd_infra.testing import container

        return getattr(container, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
