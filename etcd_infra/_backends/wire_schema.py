"""
The messages of etcd's protocol that we speak, as one table, built into a descriptor pool of our own.

Private, so that another etcd client in the process may register its `etcdserverpb` in protobuf's default
pool, in whatever version, and neither notices the other. Built at import by protobuf's runtime, so that one
source works on every protobuf release from 5 on, where generated code is tied to the release that made it.

Source: the field numbers of etcd's `rpc.proto` and `kv.proto`, which are frozen by the protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

# A message's name, then its fields: number, type, name; `*` repeats it, `=group` puts it into a oneof. Enums
# travel as int32 does, and unknown values must not get lost, so `int32` it is.
_MESSAGES: Final = """
KeyValue
     1 bytes key               2 int64 create_revision    3 int64 mod_revision
     4 int64 version           5 bytes value              6 int64 lease
Event
     1 int32 type              2 KeyValue kv              3 KeyValue prev_kv
ResponseHeader
     1 uint64 cluster_id       2 uint64 member_id         3 int64 revision
     4 uint64 raft_term

RangeRequest
     1 bytes key               2 bytes range_end          3 int64 limit
     4 int64 revision          5 int32 sort_order         6 int32 sort_target
     7 bool serializable       8 bool keys_only           9 bool count_only
    10 int64 min_mod_revision                            11 int64 max_mod_revision
    12 int64 min_create_revision                         13 int64 max_create_revision
RangeResponse
     1 ResponseHeader header   2 *KeyValue kvs            3 bool more
     4 int64 count
PutRequest
     1 bytes key               2 bytes value              3 int64 lease
     4 bool prev_kv            5 bool ignore_value        6 bool ignore_lease
PutResponse
     1 ResponseHeader header   2 KeyValue prev_kv
DeleteRangeRequest
     1 bytes key               2 bytes range_end          3 bool prev_kv
DeleteRangeResponse
     1 ResponseHeader header   2 int64 deleted            3 *KeyValue prev_kvs

Compare
     1 int32 result            2 int32 target             3 bytes key
     4 int64 version=operand   5 int64 create_revision=operand
     6 int64 mod_revision=operand
     7 bytes value=operand     8 int64 lease=operand     64 bytes range_end
RequestOp
     1 RangeRequest request_range=request
     2 PutRequest request_put=request
     3 DeleteRangeRequest request_delete_range=request
     4 TxnRequest request_txn=request
ResponseOp
     1 RangeResponse response_range=response
     2 PutResponse response_put=response
     3 DeleteRangeResponse response_delete_range=response
     4 TxnResponse response_txn=response
TxnRequest
     1 *Compare compare        2 *RequestOp success       3 *RequestOp failure
TxnResponse
     1 ResponseHeader header   2 bool succeeded           3 *ResponseOp responses

CompactionRequest
     1 int64 revision          2 bool physical
CompactionResponse
     1 ResponseHeader header

AuthenticateRequest
     1 string name             2 string password
AuthenticateResponse
     1 ResponseHeader header   2 string token

WatchRequest
     1 WatchCreateRequest create_request=request
     2 WatchCancelRequest cancel_request=request
WatchCreateRequest
     1 bytes key               2 bytes range_end          3 int64 start_revision
     4 bool progress_notify    5 *int32 filters           6 bool prev_kv
     7 int64 watch_id          8 bool fragment
WatchCancelRequest
     1 int64 watch_id
WatchResponse
     1 ResponseHeader header   2 int64 watch_id           3 bool created
     4 bool canceled           5 int64 compact_revision   6 string cancel_reason
     7 bool fragment          11 *Event events

LeaseGrantRequest
     1 int64 TTL               2 int64 ID
LeaseGrantResponse
     1 ResponseHeader header   2 int64 ID                 3 int64 TTL
LeaseRevokeRequest
     1 int64 ID
LeaseRevokeResponse
     1 ResponseHeader header
LeaseKeepAliveRequest
     1 int64 ID
LeaseKeepAliveResponse
     1 ResponseHeader header   2 int64 ID                 3 int64 TTL
LeaseTimeToLiveRequest
     1 int64 ID                2 bool keys
LeaseTimeToLiveResponse
     1 ResponseHeader header   2 int64 ID                 3 int64 TTL
     4 int64 grantedTTL        5 *bytes keys
LeaseLeasesRequest
LeaseStatus
     1 int64 ID
LeaseLeasesResponse
     1 ResponseHeader header   2 *LeaseStatus leases

StatusRequest
StatusResponse
     1 ResponseHeader header   2 string version           3 int64 dbSize
     4 uint64 leader           5 uint64 raftIndex         6 uint64 raftTerm
     7 uint64 raftAppliedIndex
     8 *string errors          9 int64 dbSizeInUse       10 bool isLearner
"""

_PACKAGE: Final = "etcdserverpb"
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS: Final = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint64": _Field.TYPE_UINT64,
}


def _triples(line: str) -> Iterator[tuple[int, str, str]]:
    words = iter(line.split())
    for number in words:
        yield int(number), next(words), next(words)


def _add_field(message: descriptor_pb2.DescriptorProto, number: int, kind: str, name: str) -> None:
    name, _, group = name.partition("=")
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind.startswith("*"):
        field.label = _Field.LABEL_REPEATED
    element = kind.removeprefix("*")
    if element in _SCALARS:
        field.type = _SCALARS[element]
    else:
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{element}"
    if group:
        if not message.oneof_decl:
            message.oneof_decl.add(name=group)
        field.oneof_index = 0


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="etcd_infra/wire.proto", package=_PACKAGE, syntax="proto3")
    for line in filter(None, _MESSAGES.splitlines()):
        if line.startswith(" "):
            for number, kind, name in _triples(line):
                _add_field(file.message_type[-1], number, kind, name)
        else:
            file.message_type.add(name=line)
    return file


def _build() -> dict[str, type[Message]]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(_file().SerializeToString())
    messages = pool.FindFileByName("etcd_infra/wire.proto").message_types_by_name
    return {name: message_factory.GetMessageClass(messages[name]) for name in messages}


MESSAGES: Final[dict[str, Any]] = _build()
"""The message classes by name. They are made at run time, which no type checker can see: hence `Any`."""
