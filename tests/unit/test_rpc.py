"""`RpcBackend` over a channel that a test answers: what is sent, where, and what a failure means."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.endpoints import Endpoint, Endpoints
from etcd_infra._backends.rpc import RpcBackend
from etcd_infra._backends.status import StatusCode
from etcd_infra._backends.wire_schema import MESSAGES
from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, LeaseRenewal, Put, Range, Txn
from etcd_infra.errors import (
    EtcdError,
    InvalidAnswerError,
    InvalidRequestError,
    LeaseExistsError,
    LeaseNotFoundError,
    OutcomeUnknownError,
    UnavailableError,
)
from tests.helpers.scripted_channel import ScriptedChannel

KEY = KeyRange.one(b"k")
LEADER = (("hasleader", "true"),)
LOST = ChannelError(StatusCode.UNAVAILABLE, "Socket closed")
NEVER = ChannelError(StatusCode.UNAVAILABLE, "failed to connect to all addresses", never_sent=True)


@pytest.fixture
async def nursery_(autojump_clock):
    """Where the backend's tasks would run."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


@pytest.fixture
def channels():
    """Three members."""
    return [ScriptedChannel() for _ in range(3)]


@pytest.fixture
def backend(nursery_, channels):
    """A backend over three members."""
    endpoints = Endpoints([Endpoint("h", n) for n in range(3)], lambda endpoint: channels[endpoint.port])
    return RpcBackend(endpoints, nursery_, call_timeout=5.0, draw=lambda: 0.5)


def unary_calls(channel):
    """Count the calls of a channel, without the stream that is open besides."""
    return sum(not method.endswith("Watch") for method, *_ in channel.calls)


def answer(name, revision=7, **fields):
    """An answer's bytes."""
    return MESSAGES[name](header=MESSAGES["ResponseHeader"](revision=revision), **fields).SerializeToString()


async def test_each_call_has_a_deadline_and_asks_for_a_leader(backend, channels, autojump_clock):
    """Calls carry the call time-out and `hasleader`; what a member answers alone does not."""
    channels[0].answers += [answer("RangeResponse"), answer("RangeResponse"), answer("StatusResponse")]
    await backend.range(Range(KEY))
    await backend.range(Range(KEY, serializable=True))
    await backend.status()

    assert [
        (method.rsplit("/", 1)[1], limit, metadata)
        for method, _, limit, metadata in channels[0].calls
        if not method.endswith("Watch")
    ] == [
        ("Range", 5.0, LEADER),
        ("Range", 5.0, ()),
        ("Status", 5.0, ()),
    ]


WRITES = [
    lambda backend: backend.put(b"k", b"v"),
    lambda backend: backend.delete(KEY),
    lambda backend: backend.txn(Txn((Compare.absent(b"k"),), (Range(KEY),), (Put(b"k"),))),
    lambda backend: backend.lease_grant(5, lease=7),
    lambda backend: backend.lease_revoke(7),
    lambda backend: backend.compact(3),
]
READS = [
    lambda backend: backend.get(b"k"),
    lambda backend: backend.txn(Txn(success=(Range(KEY),))),
    lambda backend: backend.lease_keep_alive(7),
    lambda backend: backend.lease_time_to_live(7),
    lambda backend: backend.lease_list(),
    lambda backend: backend.status(),
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (LOST, OutcomeUnknownError),
        (NEVER, UnavailableError),
        (ChannelError(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"), OutcomeUnknownError),
        (ChannelError(StatusCode.UNAVAILABLE, "etcdserver: no leader"), UnavailableError),
        (ChannelError(StatusCode.NOT_FOUND, "etcdserver: requested lease not found"), LeaseNotFoundError),
        (b"\xff\xff", OutcomeUnknownError),
        (b"", OutcomeUnknownError),
    ],
)
async def test_write_is_tried_once_and_never_reported_undone_without_proof(
    backend, channels, write, failure, expected, autojump_clock
):
    """A write is sent once; without an answer that proves the contrary, its outcome is unknown."""
    channels[0].answers += [failure]
    with pytest.raises(EtcdError) as caught:
        await write(backend)

    assert expected is caught.type
    assert [unary_calls(channel) for channel in channels] == [1, 0, 0]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("failure", "expected"),
    [(LOST, UnavailableError), (NEVER, UnavailableError), (b"\xff\xff", InvalidAnswerError)],
)
async def test_read_is_tried_once_and_is_never_unknown(
    backend, channels, read, failure, expected, autojump_clock
):
    """A read that failed can be sent again, so it is unavailable."""
    channels[0].answers += [failure]
    with pytest.raises(EtcdError) as caught:
        await read(backend)

    assert expected is caught.type
    assert [unary_calls(channel) for channel in channels] == [1, 0, 0]


async def test_one_unconditional_operation_travels_as_itself(backend, channels, autojump_clock):
    """A Txn of nothing but a put, or but a deletion, is sent as that; its answer looks like a Txn's."""
    kv = {"key": b"k", "value": b"old", "mod_revision": 5, "create_revision": 5, "version": 1}
    channels[0].answers += [
        answer("PutResponse", prev_kv=kv),
        answer("DeleteRangeResponse", deleted=1, prev_kvs=[kv]),
        answer("TxnResponse", succeeded=True, responses=[{"response_put": {}}]),
        answer("TxnResponse", succeeded=True, responses=[{"response_put": {}}]),
    ]
    put = await backend.txn(Txn(success=(Put(b"k", b"new", prev_kv=True),)))
    delete = await backend.txn(Txn(success=(DeleteRange(KEY, prev_kv=True),)))
    await backend.txn(Txn((Compare.absent(b"k"),), (Put(b"k", b"new"),)))
    # etcd looks at the branch that is not taken, too.
    await backend.txn(Txn((), (Put(b"k", b"new"),), (Put(b"j", b"new"),)))

    methods = [method.rsplit("/", 1)[1] for method, *_ in channels[0].calls if not method.endswith("Watch")]
    assert ["Put", "DeleteRange", "Txn", "Txn"] == methods
    assert (True, 7, b"old") == (put.succeeded, put.revision, put.results[0].prev_kv.value)
    assert (True, 7, 1) == (delete.succeeded, delete.revision, delete.results[0].deleted)
    assert b"old" == delete.results[0].prev_kvs[0].value


async def test_unknown_write_names_its_keys(backend, channels, autojump_clock):
    """An unknown Txn says which keys it may have written, those of both branches."""
    channels[0].answers += [LOST]
    with pytest.raises(OutcomeUnknownError, match="b'a' and 1 more") as caught:
        await backend.txn(Txn((), (Put(b"a"),), (DeleteRange(KeyRange.one(b"b")),)))

    assert caught.value.keys == (b"a", b"b")


async def test_failure_sends_the_next_call_elsewhere(backend, channels, autojump_clock):
    """After a failure that blames the member, calls go to the next one and stay there."""
    channels[0].answers += [LOST]
    channels[1].answers += [answer("RangeResponse")] * 2
    with pytest.raises(UnavailableError):
        await backend.get(b"k")
    await backend.get(b"k")
    await trio.sleep(100)
    await backend.get(b"k")

    assert [unary_calls(channel) for channel in channels] == [1, 2, 0]


@pytest.mark.parametrize(
    "success",
    [
        answer("RangeResponse"),
        ChannelError(StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision"),
    ],
)
async def test_any_answer_clears_its_member(success, autojump_clock):
    """A member that answers, were it a refusal, is well again."""
    channel = ScriptedChannel()
    endpoints = Endpoints([Endpoint("h", 1)], lambda _: channel)
    async with trio.open_nursery() as nursery:
        backend = RpcBackend(endpoints, nursery, call_timeout=5.0, draw=lambda: 0.5)
        channel.answers += [LOST, success]
        with pytest.raises(UnavailableError):
            await backend.get(b"k")
        with suppress(EtcdError):
            await backend.get(b"k")
        nursery.cancel_scope.cancel()
    assert endpoints.policy._failures == [0]


async def test_refusal_blames_nobody(backend, channels, autojump_clock):
    """A member that refuses a request lives: the next call goes to it."""
    exists = ChannelError(StatusCode.FAILED_PRECONDITION, "etcdserver: lease already exists")
    channels[0].answers += [exists, answer("RangeResponse")]
    with pytest.raises(LeaseExistsError):
        await backend.lease_grant(5, lease=7)
    await backend.get(b"k")

    assert [unary_calls(channel) for channel in channels] == [2, 0, 0]


async def test_caller_that_gives_up_late_suspects_the_member(backend, channels, autojump_clock):
    """A call cancelled after a second without an answer moves the next one; one cancelled at once does not."""
    channels[0].answers += [10.0, 10.0]
    channels[1].answers += [answer("RangeResponse")]
    with trio.move_on_after(0.2):
        await backend.get(b"k")
    with trio.move_on_after(2):
        await backend.get(b"k")
    await backend.get(b"k")

    assert [unary_calls(channel) for channel in channels] == [2, 1, 0]


async def test_keep_alives_go_round_the_members(backend, channels, autojump_clock):
    """Each renewal goes to the next member; TTL 0 says that the lease is gone."""
    for channel in channels:
        channel.answers += [answer("LeaseKeepAliveResponse", ID=5, TTL=channels.index(channel))]
    renewals = [await backend.lease_keep_alive(5) for _ in range(3)]

    assert [LeaseRenewal(5, ttl, 7) for ttl in range(3)] == renewals
    assert [unary_calls(channel) for channel in channels] == [1, 1, 1]


@pytest.mark.parametrize(
    "reading",
    [
        Txn(success=(Put(b"k"), Range(KEY, revision=3))),
        Txn(success=(Put(b"k"),), failure=(Range(KEY, revision=3),)),
        Txn(success=(Put(b"k"), Txn(failure=(Range(KEY, revision=3),)))),
    ],
)
async def test_writing_txn_must_not_read_the_past(backend, channels, reading, autojump_clock):
    """A Txn that writes and reads at a revision is refused here: old servers apply it in part."""
    with pytest.raises(InvalidRequestError):
        await backend.txn(reading)

    assert not channels[0].calls


async def test_reading_txn_may_read_the_past(backend, channels, autojump_clock):
    """A Txn that only reads may do so at a revision."""
    channels[0].answers += [answer("TxnResponse", succeeded=True, responses=[{"response_range": {}}])]

    assert (await backend.txn(Txn(success=(Range(KEY, revision=3),)))).succeeded


@pytest.mark.parametrize(
    ("ttl", "lease", "error"),
    [
        (True, 0, TypeError),
        (5.0, 0, TypeError),
        ("5", 0, TypeError),
        (5, -1, ValueError),
        (2**63, 0, ValueError),
    ],
)
async def test_bad_lease_arguments_are_refused(backend, channels, ttl, lease, error, autojump_clock):
    """A TTL that is no whole number of seconds, and a negative id, are never sent."""
    with pytest.raises(error):
        await backend.lease_grant(ttl, lease=lease)

    assert not channels[0].calls


async def test_first_answer_opens_the_stream_of_the_watches(backend, channels, autojump_clock):
    """Once a member has answered, one stream is open although nobody watches, and it is used by the first watch."""
    channels[0].answers += [answer("RangeResponse")]
    await backend.get(b"k")
    stream = await channels[0].next_stream()
    assert not stream.has_request()
    async with trio.open_nursery() as nursery:

        async def watch():
            async with backend.watch(KEY, coordination=True):
                pass

        nursery.start_soon(watch)
        assert b"k" == (await stream.next_request()).key
        stream.answer(1, created=True)
