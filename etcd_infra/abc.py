"""The public door for implementers."""

from __future__ import annotations

from etcd_infra._etcd.backend import Backend, WatchStream

__all__ = ["Backend", "WatchStream"]
