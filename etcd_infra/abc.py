"""The public door for implementers, and etcd's own vocabulary for whoever talks to a backend directly."""

from __future__ import annotations

from etcd_infra._etcd.backend import Backend, WatchStream
from etcd_infra._etcd.calls import Call, Observer
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    DeleteRangeResult,
    Event,
    EventKind,
    KeyRange,
    KeyValue,
    LeaseGrant,
    LeaseRenewal,
    LeaseTimeToLive,
    Op,
    Operator,
    OpResult,
    Put,
    PutResult,
    Range,
    RangeResult,
    SortTarget,
    Status,
    Target,
    Txn,
    TxnResult,
    WatchBatch,
)
from etcd_infra._etcd.wrapping import Wrapping

__all__ = [
    "Backend",
    "Call",
    "Compare",
    "DeleteRange",
    "DeleteRangeResult",
    "Event",
    "EventKind",
    "KeyRange",
    "KeyValue",
    "LeaseGrant",
    "LeaseRenewal",
    "LeaseTimeToLive",
    "Observer",
    "Op",
    "OpResult",
    "Operator",
    "Put",
    "PutResult",
    "Range",
    "RangeResult",
    "SortTarget",
    "Status",
    "Target",
    "Txn",
    "TxnResult",
    "WatchBatch",
    "WatchStream",
    "Wrapping",
]
