"""What users' tests, and our own, are made with."""

from __future__ import annotations

from etcd_infra.testing.server import EtcdServer, find_etcd

__all__ = ["EtcdServer", "find_etcd"]
