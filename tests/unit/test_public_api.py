"""The public names: a contract."""

from __future__ import annotations

import enum
import inspect
from pathlib import Path

import etcd_infra
import etcd_infra.abc
import etcd_infra.testing

ROOT = Path(__file__).parents[2]

ERRORS = {
    "EtcdInfraError": None,
    "EtcdError": "EtcdInfraError",
    "UnavailableError": "EtcdError",
    "OutcomeUnknownError": "EtcdError",
    "CompactedError": "EtcdError",
    "FutureRevisionError": "EtcdError",
    "LeaseNotFoundError": "EtcdError",
    "AccessDeniedError": "EtcdError",
    "StorageFullError": "EtcdError",
    "InvalidRequestError": "EtcdError",
    "LeaseExistsError": "InvalidRequestError",
    "InvalidAnswerError": "EtcdError",
    "StoreResetError": "EtcdError",
    "LostError": "EtcdInfraError",
    "SessionLostError": "LostError",
    "LockLostError": "LostError",
    "LeadershipLostError": "LostError",
    "MessagesLostError": "LostError",
    "FencedError": "EtcdInfraError",
    "NotHeldError": "EtcdInfraError",
    "ConflictError": "EtcdInfraError",
    "TransactionTimeoutError": "EtcdInfraError",
    "ForkedError": "EtcdInfraError",
    "AckTimeoutError": "EtcdInfraError",
    "RateLimitedError": "EtcdInfraError",
    "CircuitOpenError": "EtcdInfraError",
    "CodecError": "EtcdInfraError",
}
NAMES = {
    "OrderedMessages",
    "SharedMessages",
    "Retention",
    "DeadLetter",
    "Delivery",
    "GroupInfo",
    "GroupMessage",
    "Message",
    "Publish",
    "Receipt",
    "Messages",
    "Topic",
    "TopicInfo",
    "Call",
    "Cas",
    "CasResult",
    "Codec",
    "Consistency",
    "Coordinator",
    "Counter",
    "CycleInfo",
    "DELETE",
    "Decrement",
    "Delete",
    "Entry",
    "Fence",
    "HealthInfo",
    "Hold",
    "Increment",
    "Inspector",
    "Election",
    "ElectionInfo",
    "MemberInfo",
    "Leadership",
    "Leader",
    "LeaderWatch",
    "LeaderState",
    "LeaderStatus",
    "Quorum",
    "Transition",
    "TransitionKind",
    "Members",
    "Member",
    "MemberEvent",
    "MemberChange",
    "MemberWatch",
    "Isolation",
    "JSON",
    "LeaseInfo",
    "Listing",
    "Lock",
    "LockHistory",
    "LockInfo",
    "LockStatus",
    "Operation",
    "OperationResult",
    "Renewal",
    "MultiLock",
    "RWLock",
    "RWLockInfo",
    "Semaphore",
    "SemaphoreInfo",
    "LockLike",
    "Session",
    "SessionInfo",
    "SessionStatus",
    "Set",
    "State",
    "StateChange",
    "StateInfo",
    "StateSnapshot",
    "StateWatch",
    "Tenure",
    "TlsConfig",
    "Transaction",
    "TransactionInfo",
    "TransactionResult",
    "TransactionStatus",
    "TwoPhaseTransaction",
    "WriteBehind",
    "environment_options",
    "open_coordinator",
    "open_etcd",
}


def test_names_of_the_package_root():
    """The package root offers exactly these names, and each exists."""
    assert NAMES | set(ERRORS) == set(etcd_infra.__all__)
    assert all(hasattr(etcd_infra, name) for name in etcd_infra.__all__)


def test_names_for_tests():
    """`etcd_infra.testing` offers exactly these names."""
    expected = {
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
    }
    assert expected == set(etcd_infra.testing.__all__)


def test_error_tree():
    """Each error stands under its parent, and no other error exists."""
    for name, parent in ERRORS.items():
        bases = [base.__name__ for base in getattr(etcd_infra, name).__mro__[1:]]
        assert (parent or "Exception") == bases[0]
    defined = {
        name
        for name, value in vars(etcd_infra.errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert set(ERRORS) == defined


def test_enums_have_the_source_documents_values():
    """Status and renewal modes are string enums with the values of the source document."""
    assert ["acquired", "released", "expired", "fenced", "failed"] == list(etcd_infra.LockStatus)
    assert ["auto", "manual"] == list(etcd_infra.Renewal)
    assert ["linearizable", "serializable"] == list(etcd_infra.Consistency)
    assert issubclass(etcd_infra.LockStatus, enum.StrEnum)


def test_every_public_name_is_in_the_docs():
    """The reference page lists every public name."""
    text = (ROOT / "docs" / "reference.md").read_text()
    public = [*etcd_infra.__all__, *etcd_infra.testing.__all__, *etcd_infra.abc.__all__]
    assert [] == [name for name in public if f"`{name}`" not in text]


def test_public_callables_say_what_they_do():
    """Every public class, function and method has a docstring."""
    silent = []
    for name in etcd_infra.__all__:
        thing = getattr(etcd_infra, name)
        if not inspect.getdoc(thing):
            silent.append(name)
        if inspect.isclass(thing):
            silent += [
                f"{name}.{member}"
                for member, value in vars(thing).items()
                if not member.startswith("_") and inspect.isfunction(value) and not value.__doc__
            ]
    assert [] == silent
