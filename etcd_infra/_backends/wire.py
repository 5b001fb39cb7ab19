"""
Between `model.py`'s values and the protocol's bytes.

Encoding raises `TypeError` or `ValueError` for what does not fit (a number beyond 64 bits), before anything
is sent. Decoding believes nothing: bytes that are no such message, or a message that can not be the answer
to its request, are `InvalidAnswerError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

from etcd_infra._backends.wire_schema import MESSAGES
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    DeleteRangeResult,
    Event,
    EventKind,
    KeyValue,
    LeaseGrant,
    LeaseRenewal,
    LeaseTimeToLive,
    Put,
    PutResult,
    Range,
    RangeResult,
    Status,
    Target,
    Txn,
    TxnResult,
    WatchRequest,
    WatchResponse,
)
from etcd_infra.errors import InvalidAnswerError

if TYPE_CHECKING:
    from etcd_infra._etcd.model import Op, OpResult

# etcd: with this header a member that has lost its leader says so at once instead of after seven seconds, and
# ends streams after 3.5 s; without it a watch on a cut-off member is silent for ever.
HAS_LEADER: Final = (("hasleader", "true"),)

_ASCENDING: Final = 1
_DESCENDING: Final = 2
_NO_PUT: Final = 0
_NO_DELETE: Final = 1
_OPERANDS: Final = {
    Target.VERSION: "version",
    Target.CREATE: "create_revision",
    Target.MOD: "mod_revision",
    Target.VALUE: "value",
    Target.LEASE: "lease",
}


# ── requests ────────────────────────────────────────────────────────────────────────────────────


def encode_range(request: Range) -> bytes:
    """Encode a RangeRequest."""
    return MESSAGES["RangeRequest"](**_range(request)).SerializeToString()


def encode_txn(request: Txn) -> bytes:
    """Encode a TxnRequest."""
    return MESSAGES["TxnRequest"](**_txn(request)).SerializeToString()


def encode_put(request: Put) -> bytes:
    """Encode a PutRequest."""
    return MESSAGES["PutRequest"](**_put(request)).SerializeToString()


def encode_delete_range(request: DeleteRange) -> bytes:
    """Encode a DeleteRangeRequest."""
    return MESSAGES["DeleteRangeRequest"](**_delete_range(request)).SerializeToString()


def encode_compact(revision: int) -> bytes:
    """Encode a CompactionRequest."""
    return _message("CompactionRequest", revision=revision).SerializeToString()


def encode_authenticate(username: str, password: str) -> bytes:
    """Encode an AuthenticateRequest."""
    return _message("AuthenticateRequest", name=username, password=password).SerializeToString()


def encode_lease_grant(ttl: int, lease: int) -> bytes:
    """Encode a LeaseGrantRequest."""
    return _message("LeaseGrantRequest", TTL=ttl, ID=lease).SerializeToString()


def encode_lease(lease: int) -> bytes:
    """Encode a LeaseKeepAliveRequest or a LeaseRevokeRequest, which look the same."""
    return _message("LeaseRevokeRequest", ID=lease).SerializeToString()


def encode_lease_time_to_live(lease: int, *, keys: bool) -> bytes:
    """Encode a LeaseTimeToLiveRequest."""
    return _message("LeaseTimeToLiveRequest", ID=lease, keys=keys).SerializeToString()


def encode_watch_create(request: WatchRequest, watch_id: int) -> bytes:
    """Encode a WatchRequest that creates a watch, in fragments if the events are big."""
    filters = [_NO_PUT] * request.no_put + [_NO_DELETE] * request.no_delete
    create = _fields(
        key=request.range.key,
        range_end=request.range.end,
        start_revision=request.start_revision,
        progress_notify=request.progress_notify,
        filters=filters,
        prev_kv=request.prev_kv,
        watch_id=watch_id,
        fragment=True,
    )
    return _message("WatchRequest", create_request=create).SerializeToString()


def encode_watch_cancel(watch_id: int) -> bytes:
    """Encode a WatchRequest that cancels a watch."""
    cancel = {"watch_id": watch_id}
    return _message("WatchRequest", cancel_request=cancel).SerializeToString()


def _message(name: str, /, **fields: Any) -> Any:
    return MESSAGES[name](**_fields(**fields))


def _fields(**fields: Any) -> dict[str, Any]:
    # Fields at their default are not on the wire anyway. Parts are dictionaries until the whole message is
    # made: a message made of messages copies each of them, once per level.
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if value:
            given[name] = value
        elif value is None:
            # protobuf takes it for "not set": it would be written as an empty value.
            raise TypeError(f"None is no value for {name}")
    return given


def _range(request: Range) -> dict[str, Any]:
    if request == Range(request.range):
        # Most ask for nothing but the keys.
        return _fields(key=request.range.key, range_end=request.range.end)
    order = 0
    if request.sort_by is not None or request.descending:
        order = _DESCENDING if request.descending else _ASCENDING
    return _fields(
        key=request.range.key,
        range_end=request.range.end,
        limit=request.limit,
        revision=request.revision,
        sort_order=order,
        sort_target=request.sort_by or 0,
        serializable=request.serializable,
        keys_only=request.keys_only,
        count_only=request.count_only,
        min_mod_revision=request.min_mod_revision,
        max_mod_revision=request.max_mod_revision,
        min_create_revision=request.min_create_revision,
        max_create_revision=request.max_create_revision,
    )


def _put(request: Put) -> dict[str, Any]:
    return _fields(
        key=request.key,
        value=request.value,
        lease=request.lease,
        prev_kv=request.prev_kv,
        ignore_value=request.ignore_value,
        ignore_lease=request.ignore_lease,
    )


def _delete_range(request: DeleteRange) -> dict[str, Any]:
    return _fields(key=request.range.key, range_end=request.range.end, prev_kv=request.prev_kv)


def _compare(compare: Compare) -> dict[str, Any]:
    fields = _fields(
        result=compare.operator,
        target=compare.target,
        key=compare.range.key,
        range_end=compare.range.end,
    )
    fields[_OPERANDS[compare.target]] = compare.operand
    return fields


def _op(op: Op) -> dict[str, Any]:
    if isinstance(op, Put):
        return {"request_put": _put(op)}
    if isinstance(op, Range):
        return {"request_range": _range(op)}
    if isinstance(op, DeleteRange):
        return {"request_delete_range": _delete_range(op)}
    return {"request_txn": _txn(op)}


def _txn(request: Txn) -> dict[str, Any]:
    return {
        "compare": [_compare(compare) for compare in request.compare],
        "success": [_op(op) for op in request.success],
        "failure": [_op(op) for op in request.failure],
    }


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def decode_range(answer: bytes) -> RangeResult:
    """Decode a RangeResponse."""
    message = _parsed("RangeResponse", answer)
    return _range_result(message, _revision(message))


def decode_txn(answer: bytes, request: Txn) -> TxnResult:
    """Decode the TxnResponse to `request`, whose shape it must have."""
    message = _parsed("TxnResponse", answer)
    return _txn_result(message, request, _revision(message))


def decode_put(answer: bytes) -> TxnResult:
    """Decode a PutResponse, as the answer to a Txn of nothing but the put."""
    message = _parsed("PutResponse", answer)
    return TxnResult(True, (_put_result(message),), _revision(message))


def decode_delete_range(answer: bytes) -> TxnResult:
    """Decode a DeleteRangeResponse, as the answer to a Txn of nothing but the deletion."""
    message = _parsed("DeleteRangeResponse", answer)
    return TxnResult(True, (_delete_range_result(message),), _revision(message))


def decode_revision(name: str, answer: bytes) -> int:
    """Decode an answer of which only the header's revision is of interest."""
    return _revision(_parsed(name, answer))


def decode_authenticate(answer: bytes) -> str:
    """Decode an AuthenticateResponse: the token."""
    return str(_parsed("AuthenticateResponse", answer).token)


def decode_lease_grant(answer: bytes) -> LeaseGrant:
    """Decode a LeaseGrantResponse."""
    message = _parsed("LeaseGrantResponse", answer)
    if not message.ID or message.TTL <= 0:
        raise InvalidAnswerError(f"a lease was granted without id or time: id {message.ID}, TTL {message.TTL}")
    return LeaseGrant(message.ID, message.TTL, message.header.revision)


def decode_lease_keep_alive(answer: bytes, lease: int) -> LeaseRenewal:
    """Decode the LeaseKeepAliveResponse for `lease`; TTL 0 says that it does not exist."""
    message = _parsed("LeaseKeepAliveResponse", answer)
    _same_lease(message.ID, lease)
    return LeaseRenewal(lease, max(message.TTL, 0), message.header.revision)


def decode_lease_time_to_live(answer: bytes, lease: int) -> LeaseTimeToLive:
    """Decode the LeaseTimeToLiveResponse for `lease`; TTL -1 says that it does not exist."""
    message = _parsed("LeaseTimeToLiveResponse", answer)
    _same_lease(message.ID, lease)
    return LeaseTimeToLive(lease, message.TTL, message.grantedTTL, tuple(message.keys), message.header.revision)


def decode_lease_list(answer: bytes) -> tuple[int, ...]:
    """Decode a LeaseLeasesResponse."""
    return tuple(lease.ID for lease in _parsed("LeaseLeasesResponse", answer).leases)


def decode_status(answer: bytes) -> Status:
    """Decode a StatusResponse."""
    message = _parsed("StatusResponse", answer)
    return Status(
        version=message.version,
        member=message.header.member_id,
        leader=message.leader,
        revision=message.header.revision,
        raft_term=message.raftTerm,
        raft_index=message.raftIndex,
        db_size_bytes=message.dbSize,
        is_learner=message.isLearner,
        errors=tuple(message.errors),
        cluster=message.header.cluster_id,
    )


def decode_watch(answer: bytes) -> tuple[int, WatchResponse]:
    """Decode a WatchResponse: the id of the watch that it is about, and what it says."""
    message = _parsed("WatchResponse", answer)
    return message.watch_id, WatchResponse(
        revision=message.header.revision,
        events=tuple(_event(event) for event in message.events),
        created=message.created,
        canceled=message.canceled,
        compact_revision=message.compact_revision,
        reason=message.cancel_reason,
        fragment=message.fragment,
    )


def _parsed(name: str, answer: bytes) -> Any:
    try:
        return MESSAGES[name].FromString(answer)
    except (DecodeError, ValueError) as error:  # ValueError: text that is no UTF-8, in pure Python
        raise InvalidAnswerError(f"the answer is no {name}: {len(answer)} bytes that do not decode") from error


def _revision(message: Any) -> int:
    # etcd: a store starts at revision 1, so 0 means that the header is missing.
    revision = message.header.revision
    if revision <= 0:
        raise InvalidAnswerError(f"the {message.DESCRIPTOR.name} carries no revision")
    return revision


def _same_lease(answered: int, asked: int) -> None:
    if answered != asked:
        raise InvalidAnswerError(f"asked about lease {asked:x}, answered about {answered:x}")


def _kv(message: Any) -> KeyValue:
    return KeyValue(
        message.key,
        message.value,
        message.create_revision,
        message.mod_revision,
        message.version,
        message.lease,
    )


def _event(message: Any) -> Event:
    if message.type not in {EventKind.PUT, EventKind.DELETE} or message.kv.mod_revision <= 0:
        raise InvalidAnswerError(f"an event of kind {message.type} at revision {message.kv.mod_revision}")
    prev_kv = _kv(message.prev_kv) if message.HasField("prev_kv") else None
    return Event(EventKind(message.type), _kv(message.kv), prev_kv)


def _range_result(message: Any, revision: int) -> RangeResult:
    return RangeResult(tuple(map(_kv, message.kvs)), message.count, message.more, revision)


def _txn_result(message: Any, request: Txn, revision: int) -> TxnResult:
    asked = request.success if message.succeeded else request.failure
    if len(message.responses) != len(asked):
        raise InvalidAnswerError(f"a Txn of {len(asked)} operations was answered by {len(message.responses)}")
    results = tuple(_op_result(answer, op) for answer, op in zip(message.responses, asked, strict=True))
    return TxnResult(message.succeeded, results, revision)


def _put_result(message: Any) -> PutResult:
    return PutResult(_kv(message.prev_kv) if message.HasField("prev_kv") else None)


def _delete_range_result(message: Any) -> DeleteRangeResult:
    return DeleteRangeResult(message.deleted, tuple(_kv(kv) for kv in message.prev_kvs))


def _op_result(message: Any, op: Op) -> OpResult:
    kind = message.WhichOneof("response")
    match op, kind:
        case Put(), "response_put":
            return _put_result(message.response_put)
        case Range(), "response_range":
            return _range_result(message.response_range, 0)
        case DeleteRange(), "response_delete_range":
            return _delete_range_result(message.response_delete_range)
        case Txn(), "response_txn":
            return _txn_result(message.response_txn, op, 0)
        case _:
            raise InvalidAnswerError(f"a {type(op).__name__} was answered by {kind}")
