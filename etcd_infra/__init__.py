"""An etcd-native coordination toolkit for Python services on Trio."""

from __future__ import annotations

from etcd_infra._backends.opening import environment_options, open_etcd
from etcd_infra._backends.tls import TlsConfig
from etcd_infra._etcd.calls import Call
from etcd_infra._policy.codec import JSON, Codec
from etcd_infra._primitives._hold import Hold, LockStatus
from etcd_infra._primitives._listing import Listing
from etcd_infra._primitives._lock_like import LockLike, Renewal
from etcd_infra._primitives._ordered_group import OrderedMessages
from etcd_infra._primitives._roll import Member
from etcd_infra._primitives._run import Transaction
from etcd_infra._primitives._shared_group import SharedMessages
from etcd_infra._primitives._trimmer import Retention
from etcd_infra._primitives.counter import Counter
from etcd_infra._primitives.election import Election
from etcd_infra._primitives.election_info import ElectionInfo, MemberInfo
from etcd_infra._primitives.entry import DELETE, CasResult, Consistency, Entry
from etcd_infra._primitives.fence import Fence
from etcd_infra._primitives.leader_state import LeaderState, LeaderStatus, Quorum
from etcd_infra._primitives.leader_watch import Leader, LeaderWatch
from etcd_infra._primitives.leadership import Leadership
from etcd_infra._primitives.lock import Lock
from etcd_infra._primitives.lock_cycles import CycleInfo
from etcd_infra._primitives.lock_history import LockHistory, Tenure
from etcd_infra._primitives.lock_info import LockInfo
from etcd_infra._primitives.member_watch import MemberChange, MemberEvent, MemberWatch
from etcd_infra._primitives.members import Members
from etcd_infra._primitives.message import DeadLetter, Delivery, GroupMessage, Message
from etcd_infra._primitives.messages import Messages
from etcd_infra._primitives.multi_lock import MultiLock
from etcd_infra._primitives.operations import (
    Cas,
    Decrement,
    Delete,
    Increment,
    Operation,
    OperationResult,
    Set,
    TransactionResult,
    TransactionStatus,
)
from etcd_infra._primitives.publish import Publish
from etcd_infra._primitives.receipt import Receipt
from etcd_infra._primitives.rwlock import RWLock
from etcd_infra._primitives.rwlock_info import RWLockInfo
from etcd_infra._primitives.semaphore import Semaphore
from etcd_infra._primitives.semaphore_info import SemaphoreInfo
from etcd_infra._primitives.state import State
from etcd_infra._primitives.state_info import StateInfo
from etcd_infra._primitives.state_watch import StateChange, StateSnapshot, StateWatch
from etcd_infra._primitives.stm import Isolation
from etcd_infra._primitives.topic import Topic
from etcd_infra._primitives.topic_info import GroupInfo, TopicInfo
from etcd_infra._primitives.transaction_info import TransactionInfo
from etcd_infra._primitives.transitions import Transition, TransitionKind
from etcd_infra._primitives.two_phase import TwoPhaseTransaction
from etcd_infra._primitives.write_behind import WriteBehind
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
    "DELETE",
    "JSON",
    "AccessDeniedError",
    "AckTimeoutError",
    "Call",
    "Cas",
    "CasResult",
    "CircuitOpenError",
    "Codec",
    "CodecError",
    "CompactedError",
    "ConflictError",
    "Consistency",
    "Coordinator",
    "Counter",
    "CycleInfo",
    "DeadLetter",
    "Decrement",
    "Delete",
    "Delivery",
    "Election",
    "ElectionInfo",
    "Entry",
    "EtcdError",
    "EtcdInfraError",
    "Fence",
    "FencedError",
    "ForkedError",
    "FutureRevisionError",
    "GroupInfo",
    "GroupMessage",
    "HealthInfo",
    "Hold",
    "Increment",
    "Inspector",
    "InvalidAnswerError",
    "InvalidRequestError",
    "Isolation",
    "Leader",
    "LeaderState",
    "LeaderStatus",
    "LeaderWatch",
    "Leadership",
    "LeadershipLostError",
    "LeaseExistsError",
    "LeaseInfo",
    "LeaseNotFoundError",
    "Listing",
    "Lock",
    "LockHistory",
    "LockInfo",
    "LockLike",
    "LockLostError",
    "LockStatus",
    "LostError",
    "Member",
    "MemberChange",
    "MemberEvent",
    "MemberInfo",
    "MemberWatch",
    "Members",
    "Message",
    "Messages",
    "MessagesLostError",
    "MultiLock",
    "NotHeldError",
    "Operation",
    "OperationResult",
    "OrderedMessages",
    "OutcomeUnknownError",
    "Publish",
    "Quorum",
    "RWLock",
    "RWLockInfo",
    "RateLimitedError",
    "Receipt",
    "Renewal",
    "Retention",
    "Semaphore",
    "SemaphoreInfo",
    "Session",
    "SessionInfo",
    "SessionLostError",
    "SessionStatus",
    "Set",
    "SharedMessages",
    "State",
    "StateChange",
    "StateInfo",
    "StateSnapshot",
    "StateWatch",
    "StorageFullError",
    "StoreResetError",
    "Tenure",
    "TlsConfig",
    "Topic",
    "TopicInfo",
    "Transaction",
    "TransactionInfo",
    "TransactionResult",
    "TransactionStatus",
    "TransactionTimeoutError",
    "Transition",
    "TransitionKind",
    "TwoPhaseTransaction",
    "UnavailableError",
    "WriteBehind",
    "environment_options",
    "open_coordinator",
    "open_etcd",
]
