"""Values to the protocol's bytes and back."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcd_infra._backends import wire
from etcd_infra._backends.wire_schema import MESSAGES
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    DeleteRangeResult,
    Event,
    KeyRange,
    KeyValue,
    LeaseGrant,
    LeaseRenewal,
    LeaseTimeToLive,
    Operator,
    Put,
    PutResult,
    Range,
    RangeResult,
    SortTarget,
    Status,
    Target,
    Txn,
    TxnResult,
    WatchRequest,
    WatchResponse,
)
from etcd_infra.errors import InvalidAnswerError

KV = KeyValue(b"k", b"v", create_revision=2, mod_revision=5, version=3, lease=7)


def message(name, **fields):
    """Build a message as a server would."""
    return MESSAGES[name](**fields)


def header(revision=9):
    """The header of an answer."""
    return message("ResponseHeader", cluster_id=2**64 - 1, member_id=2**63, revision=revision, raft_term=4)


def kv(value):
    """A key-value message."""
    names = ("key", "value", "create_revision", "mod_revision", "version", "lease")
    return message("KeyValue", **{name: getattr(value, name) for name in names})


# ── requests ────────────────────────────────────────────────────────────────────────────────────


# Worked out by hand from the protocol's field numbers: the one test that does not believe our own table.
@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (wire.encode_range(Range(KeyRange(b"a", b"b"), limit=3)), b"\x0a\x01a\x12\x01b\x18\x03"),
        (
            wire.encode_txn(Txn((Compare.absent(b"k"),), (Put(b"k", b"v"),))),
            b"\x0a\x07\x10\x01\x1a\x01k\x28\x00\x12\x08\x12\x06\x0a\x01k\x12\x01v",
        ),
        (wire.encode_lease_grant(5, 0), b"\x08\x05"),
        (wire.encode_lease(5), b"\x08\x05"),
        (wire.encode_compact(300), b"\x08\xac\x02"),
        (wire.encode_watch_cancel(3), b"\x12\x02\x08\x03"),
        (
            wire.encode_watch_create(WatchRequest(KeyRange.one(b"k"), 9, no_delete=True), 3),
            b"\x0a\x0c\x0a\x01k\x18\x09\x2a\x01\x01\x38\x03\x40\x01",
        ),
    ],
)
def test_requests_have_the_bytes_of_the_protocol(encoded, expected):
    """Requests are the bytes that the protocol's field numbers say."""
    assert expected == encoded


def test_every_field_of_a_range_travels():
    """A Range with everything set becomes a RangeRequest with everything set."""
    request = Range(
        KeyRange(b"a", b"z"),
        revision=3,
        limit=4,
        sort_by=SortTarget.MOD,
        descending=True,
        keys_only=True,
        count_only=True,
        serializable=True,
        min_mod_revision=5,
        max_mod_revision=6,
        min_create_revision=7,
        max_create_revision=8,
    )
    sent = MESSAGES["RangeRequest"].FromString(wire.encode_range(request))

    assert len(sent.DESCRIPTOR.fields) == len(sent.ListFields())
    assert (sent.sort_order, sent.sort_target, sent.max_create_revision) == (2, 3, 8)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Range(KeyRange.one(b"k")), (0, 0)),
        (Range(KeyRange.one(b"k"), sort_by=SortTarget.KEY), (1, 0)),
        (Range(KeyRange.one(b"k"), sort_by=SortTarget.CREATE), (1, 2)),
        (Range(KeyRange.one(b"k"), descending=True), (2, 0)),
    ],
)
def test_order_is_asked_for_explicitly(request_, expected):
    """No order is asked for unless the request names one."""
    sent = MESSAGES["RangeRequest"].FromString(wire.encode_range(request_))

    assert expected == (sent.sort_order, sent.sort_target)


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("operator", Operator)
def test_compare_names_its_operand_even_if_it_is_zero(target, operator):
    """A compare carries its operand in the field of its target, zero and empty included."""
    operand = b"" if target is Target.VALUE else 0
    compare = Compare(target, operator, KeyRange(b"a", b"b"), operand)
    (sent,) = MESSAGES["TxnRequest"].FromString(wire.encode_txn(Txn((compare,)))).compare

    field = sent.WhichOneof("operand")
    assert field == ("version", "create_revision", "mod_revision", "value", "lease")[target]
    assert (operator, target, b"a", b"b", operand) == (
        sent.result,
        sent.target,
        sent.key,
        sent.range_end,
        getattr(sent, field),
    )


def test_nested_transactions_travel_in_order():
    """The operations of both branches, nested ones too, keep their kinds and order."""
    inner = Txn(success=(DeleteRange(KeyRange.prefix(b"x"), prev_kv=True),))
    outer = Txn((), (Put(b"a", lease=4, prev_kv=True), inner), (Range(KeyRange.one(b"b")),))
    sent = MESSAGES["TxnRequest"].FromString(wire.encode_txn(outer))

    assert [op.WhichOneof("request") for op in sent.success] == ["request_put", "request_txn"]
    assert sent.success[1].request_txn.success[0].request_delete_range.range_end == b"y"
    assert [op.WhichOneof("request") for op in sent.failure] == ["request_range"]


@pytest.mark.parametrize(
    ("encode", "error"),
    [
        (lambda: wire.encode_range(Range(KeyRange.one("text"))), TypeError),
        (lambda: wire.encode_range(Range(KeyRange.one(b"k"), revision=2**63)), ValueError),
        (lambda: wire.encode_txn(Txn(success=(Put(b"k", None),))), TypeError),
        (lambda: wire.encode_lease_grant(2**63, 0), ValueError),
        (
            lambda: wire.encode_txn(Txn((Compare(Target.MOD, Operator.EQUAL, KeyRange.one(b"k"), b"1"),))),
            TypeError,
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_sent(encode, error):
    """A value of the wrong type, or too big for 64 bits, never reaches the wire."""
    with pytest.raises(error):
        encode()


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def test_range_answer():
    """A RangeResponse becomes a RangeResult with the header's revision."""
    answer = message("RangeResponse", header=header(), kvs=[kv(KV)], count=3, more=True)

    assert RangeResult((KV,), count=3, more=True, revision=9) == wire.decode_range(answer.SerializeToString())


def test_txn_answer_has_one_result_per_operation():
    """Each operation of the taken branch has its result; revisions inside are 0."""
    request = Txn(
        success=(
            Put(b"k"),
            Put(b"k2", prev_kv=True),
            Range(KeyRange.one(b"k")),
            DeleteRange(KeyRange.one(b"d")),
            Txn(failure=(Put(b"n"),)),
        )
    )
    answer = message("TxnResponse", header=header(), succeeded=True)
    answer.responses.add().response_put.SetInParent()
    answer.responses.add().response_put.prev_kv.CopyFrom(kv(KV))
    answer.responses.add().response_range.MergeFrom(message("RangeResponse", header=header(8), count=1))
    answer.responses.add().response_delete_range.MergeFrom(
        message("DeleteRangeResponse", deleted=1, prev_kvs=[kv(KV)])
    )
    answer.responses.add().response_txn.responses.add().response_put.SetInParent()
    expected = TxnResult(
        succeeded=True,
        results=(
            PutResult(),
            PutResult(KV),
            RangeResult(count=1),
            DeleteRangeResult(1, (KV,)),
            TxnResult(succeeded=False, results=(PutResult(),)),
        ),
        revision=9,
    )

    assert expected == wire.decode_txn(answer.SerializeToString(), request)


def test_lease_answers():
    """Lease answers keep the server's words: the granted time, 0 and -1 for a lease that is not there."""
    grant = message("LeaseGrantResponse", header=header(), ID=5, TTL=2).SerializeToString()
    renewal = message("LeaseKeepAliveResponse", header=header(), ID=5).SerializeToString()
    left = message("LeaseTimeToLiveResponse", header=header(), ID=5, TTL=-1, keys=[b"a"]).SerializeToString()
    listed = message("LeaseLeasesResponse", leases=[message("LeaseStatus", ID=n) for n in (1, 2)])

    assert LeaseGrant(5, 2, 9) == wire.decode_lease_grant(grant)
    assert LeaseRenewal(5, 0, 9) == wire.decode_lease_keep_alive(renewal, 5)
    negative = message("LeaseKeepAliveResponse", header=header(), ID=5, TTL=-1).SerializeToString()
    assert LeaseRenewal(5, 0, 9) == wire.decode_lease_keep_alive(negative, 5)
    assert LeaseTimeToLive(5, -1, keys=(b"a",), revision=9) == wire.decode_lease_time_to_live(left, 5)
    assert wire.decode_lease_list(listed.SerializeToString()) == (1, 2)


def test_status_answer():
    """Ids of members and clusters are unsigned: the top bit is no sign."""
    answer = message(
        "StatusResponse",
        header=header(),
        version="3.5.1",
        dbSize=1,
        leader=2**63,
        raftIndex=2,
        raftTerm=3,
        errors=["NOSPACE"],
        isLearner=True,
    )
    expected = Status("3.5.1", 2**63, 2**63, 9, 3, 2, 1, True, ("NOSPACE",), 2**64 - 1)

    assert expected == wire.decode_status(answer.SerializeToString())


def test_watch_answer():
    """Events keep their kinds, and an absent `prev_kv` is told from an empty one."""
    events = [
        message("Event", type=0, kv=kv(KV), prev_kv=message("KeyValue")),
        message("Event", type=1, kv=message("KeyValue", key=b"d", mod_revision=6)),
    ]
    answer = message("WatchResponse", header=header(), watch_id=3, events=events, fragment=True)
    expected = WatchResponse(
        9, (Event.put(KV, KeyValue(b"")), Event.deleted(b"d", mod_revision=6)), fragment=True
    )

    assert (3, expected) == wire.decode_watch(answer.SerializeToString())


def bad_answers():
    """Answers that make no sense, with the decoder that must say so."""
    put = Txn(success=(Put(b"k"),))
    wrong_kind = message("TxnResponse", header=header(), succeeded=True)
    wrong_kind.responses.add().response_range.SetInParent()
    odd_event = message("Event", type=7, kv=kv(KV))
    no_revision = message("Event", kv=message("KeyValue", key=b"k"))
    return [
        (wire.decode_range, b"\xff\xff"),
        (wire.decode_range, message("RangeResponse")),
        (lambda answer: wire.decode_txn(answer, put), message("TxnResponse", header=header(), succeeded=True)),
        (lambda answer: wire.decode_txn(answer, put), wrong_kind),
        (lambda answer: wire.decode_revision("CompactionResponse", answer), b""),
        (wire.decode_lease_grant, message("LeaseGrantResponse", header=header(), TTL=3)),
        (wire.decode_lease_grant, message("LeaseGrantResponse", header=header(), ID=3)),
        (lambda answer: wire.decode_lease_keep_alive(answer, 4), message("LeaseKeepAliveResponse", ID=3)),
        (lambda answer: wire.decode_lease_time_to_live(answer, 4), message("LeaseTimeToLiveResponse", ID=3)),
        (wire.decode_watch, message("WatchResponse", events=[odd_event])),
        (wire.decode_watch, message("WatchResponse", events=[no_revision])),
        (wire.decode_status, b"\x12\x01\xff"),
    ]


@pytest.mark.parametrize(("decode", "answer"), bad_answers())
def test_answers_that_make_no_sense_are_refused(decode, answer):
    """Bytes that are no message, and messages that answer something else, are InvalidAnswerError."""
    with pytest.raises(InvalidAnswerError):
        decode(answer if isinstance(answer, bytes) else answer.SerializeToString())


int64 = st.integers(0, 2**63 - 1)


@given(st.builds(KeyValue, st.binary(), st.binary(), int64, int64, int64, int64))
def test_key_values_survive_the_wire(value):
    """Any key-value, any bytes in it, comes out as it went in."""
    answer = message("RangeResponse", header=header(), kvs=[kv(value)]).SerializeToString()

    assert wire.decode_range(answer).kvs == (value,)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(answer):
    """No bytes whatever make a decoder fail in another way."""
    for decode in (wire.decode_range, wire.decode_watch, wire.decode_status, wire.decode_lease_grant):
        with contextlib.suppress(InvalidAnswerError):
            decode(answer)


# ── other etcd clients in the process ───────────────────────────────────────────────────────────

CONFLICT = """
from google.protobuf import descriptor_pb2, descriptor_pool

def register():
    file = descriptor_pb2.FileDescriptorProto(name="rpc.proto", package="etcdserverpb", syntax="proto3")
    file.message_type.add(name="RangeRequest").field.add(name="other", number=1, type=5, label=1)
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())

def use():
    from etcd_infra._backends import wire
    from etcd_infra._etcd.model import KeyRange, Range
    assert wire.encode_range(Range(KeyRange.one(b"a"))) == bytes([10, 1, 97])
"""


@pytest.mark.parametrize("order", ["register(); use()", "use(); register(); use()"])
def test_another_client_may_register_the_same_names(order):
    """Another client's `etcdserverpb` in the default pool does not clash with ours, whoever comes first."""
    done = subprocess.run(
        [sys.executable, "-c", f"{CONFLICT}\n{order}"], capture_output=True, check=False, text=True
    )

    assert done.returncode == 0, done.stderr
