"""An etcd-native coordination toolkit for Python services on Trio."""

from __future__ import annotations

from etcd_infra._backends.opening import TlsConfig, open_etcd
from etcd_infra._etcd.calls import Call
from etcd_infra._primitives._hold import Hold, LockStatus
from etcd_infra._primitives.fence import Fence
from etcd_infra._primitives.lock import Lock, Renewal
from etcd_infra._primitives.lock_info import LockInfo
from etcd_infra._session.keepalive import SessionStatus
from etcd_infra._session.session import Session
from etcd_infra.coordinator import Coordinator, open_coordinator
from etcd_infra.errors import (
    AccessDeniedError,
    AckTimeoutError,
    CircuitOpenError,
    CodecError,
    CompactedError,
    ConflictError,
    EtcdError,
    EtcdInfraError,
    FencedError,
    ForkedError,
    FutureRevisionError,
    InvalidAnswerError,
    InvalidRequestError,
    LeadershipLostError,
    LeaseExistsError,
    LeaseNotFoundError,
    LockLostError,
    LostError,
    MessagesLostError,
    NotHeldError,
    OutcomeUnknownError,
    RateLimitedError,
    SessionLostError,
    StorageFullError,
    StoreResetError,
    TransactionTimeoutError,
    UnavailableError,
)
from etcd_infra.inspector import HealthInfo, Inspector, LeaseInfo, SessionInfo

__all__ = [
    "AccessDeniedError",
    "AckTimeoutError",
    "Call",
    "CircuitOpenError",
    "CodecError",
    "CompactedError",
    "ConflictError",
    "Coordinator",
    "EtcdError",
    "EtcdInfraError",
    "Fence",
    "FencedError",
    "ForkedError",
    "FutureRevisionError",
    "HealthInfo",
    "Hold",
    "Inspector",
    "InvalidAnswerError",
    "InvalidRequestError",
    "LeadershipLostError",
    "LeaseExistsError",
    "LeaseInfo",
    "LeaseNotFoundError",
    "Lock",
    "LockInfo",
    "LockLostError",
    "LockStatus",
    "LostError",
    "MessagesLostError",
    "NotHeldError",
    "OutcomeUnknownError",
    "RateLimitedError",
    "Renewal",
    "Session",
    "SessionInfo",
    "SessionLostError",
    "SessionStatus",
    "StorageFullError",
    "StoreResetError",
    "TlsConfig",
    "TransactionTimeoutError",
    "UnavailableError",
    "open_coordinator",
    "open_etcd",
]
