"""What users' tests, and our own, are made with."""

from __future__ import annotations

from etcd_infra._backends.memory import MemoryEtcd
from etcd_infra._backends.memory_bugs import ServerBug
from etcd_infra.testing.check_backend import check_backend
from etcd_infra.testing.cluster import EtcdCluster
from etcd_infra.testing.fault_rates import FaultRates
from etcd_infra.testing.faulty import FaultyBackend
from etcd_infra.testing.fences import Claim, Grant, check_fences, check_grants
from etcd_infra.testing.proxy import TcpProxy, open_proxy
from etcd_infra.testing.recording import RecordingBackend
from etcd_infra.testing.server import EtcdServer, find_etcd
from etcd_infra.testing.simulation.counters import Counters, Hit
from etcd_infra.testing.simulation.faults import Fault, FaultKind, draw_plan
from etcd_infra.testing.simulation.process import Note, SimulatedProcess
from etcd_infra.testing.simulation.shrinking import shrink
from etcd_infra.testing.simulation.simulation import Settings, Simulation, SimulationRun, Strike, simulate
from etcd_infra.testing.violation import Violation

__all__ = [
    "Claim",
    "Counters",
    "EtcdCluster",
    "EtcdServer",
    "Fault",
    "FaultKind",
    "FaultRates",
    "FaultyBackend",
    "Grant",
    "Hit",
    "MemoryEtcd",
    "Note",
    "RecordingBackend",
    "ServerBug",
    "Settings",
    "SimulatedProcess",
    "Simulation",
    "SimulationRun",
    "Strike",
    "TcpProxy",
    "Violation",
    "check_backend",
    "check_fences",
    "check_grants",
    "draw_plan",
    "find_etcd",
    "open_proxy",
    "shrink",
    "simulate",
]
