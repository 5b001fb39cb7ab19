"""What users' tests, and our own, are made with."""

from __future__ import annotations

from etcd_infra._backends.memory import MemoryEtcd
from etcd_infra.testing.check_backend import check_backend
from etcd_infra.testing.cluster import EtcdCluster
from etcd_infra.testing.faulty import FaultyBackend
from etcd_infra.testing.proxy import TcpProxy, open_proxy
from etcd_infra.testing.recording import RecordingBackend
from etcd_infra.testing.server import EtcdServer, find_etcd

__all__ = [
    "EtcdCluster",
    "EtcdServer",
    "FaultyBackend",
    "MemoryEtcd",
    "RecordingBackend",
    "TcpProxy",
    "check_backend",
    "find_etcd",
    "open_proxy",
]
