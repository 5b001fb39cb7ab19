"""Failures of servers and transports as classes of errors."""

from __future__ import annotations

import pytest

from etcd_infra import errors
from etcd_infra._backends.status import StatusCode as S
from etcd_infra._backends.status import read_error, watch_error, write_error

# Every text of etcd's `rpctypes/error.go` that the ten verbs can meet, with the codes of 3.4 to 3.6, and the
# transport's own. What stands on the right is the verdict for a write.
TEXTS = [
    (S.INVALID_ARGUMENT, "etcdserver: key is not provided", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: key not found", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: value is provided", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: lease is provided", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: too many operations in txn request", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: request is too large", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: invalid sort option", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: invalid auth management", errors.InvalidRequestError),
    (S.INVALID_ARGUMENT, "etcdserver: user name is empty", errors.AccessDeniedError),
    (S.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", errors.AccessDeniedError),
    (
        S.INVALID_ARGUMENT,
        "etcdserver: authentication failed, invalid user ID or password",
        errors.AccessDeniedError,
    ),
    (S.PERMISSION_DENIED, "etcdserver: permission denied", errors.AccessDeniedError),
    (S.UNAUTHENTICATED, "etcdserver: invalid auth token", errors.AccessDeniedError),
    (S.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", errors.CompactedError),
    (S.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision", errors.FutureRevisionError),
    (S.OUT_OF_RANGE, "etcdserver: too large lease TTL", errors.InvalidRequestError),
    (S.NOT_FOUND, "etcdserver: requested lease not found", errors.LeaseNotFoundError),
    (S.NOT_FOUND, "etcdserver: member not found", errors.InvalidRequestError),
    (S.FAILED_PRECONDITION, "etcdserver: lease already exists", errors.LeaseExistsError),
    (S.FAILED_PRECONDITION, "etcdserver: authentication is not enabled", errors.InvalidRequestError),
    (S.FAILED_PRECONDITION, "etcdserver: not leader", errors.UnavailableError),
    (S.FAILED_PRECONDITION, "etcdserver: rpc not supported for learner", errors.UnavailableError),
    (S.UNAVAILABLE, "etcdserver: rpc not supported for learner", errors.UnavailableError),
    (S.FAILED_PRECONDITION, "etcdserver: not capable", errors.UnavailableError),
    (S.UNAVAILABLE, "etcdserver: not capable", errors.UnavailableError),
    (S.UNAVAILABLE, "etcdserver: no leader", errors.UnavailableError),
    (S.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", errors.StorageFullError),
    (S.RESOURCE_EXHAUSTED, "etcdserver: too many requests", errors.UnavailableError),
    (
        S.RESOURCE_EXHAUSTED,
        "grpc: received message larger than max (3000000 vs. 2097152)",
        errors.InvalidRequestError,
    ),
    (S.UNIMPLEMENTED, "unknown service etcdserverpb.KV", errors.InvalidRequestError),
    (
        S.RESOURCE_EXHAUSTED,
        "CLIENT: Received message larger than max (6291585 vs. 4194304)",
        errors.OutcomeUnknownError,
    ),
    (S.UNAVAILABLE, "etcdserver: leader changed", errors.OutcomeUnknownError),
    (S.UNAVAILABLE, "etcdserver: server stopped", errors.OutcomeUnknownError),
    (S.UNAVAILABLE, "etcdserver: request timed out", errors.OutcomeUnknownError),
    (
        S.UNAVAILABLE,
        "etcdserver: request timed out, possibly due to previous leader failure",
        errors.OutcomeUnknownError,
    ),
    (
        S.UNAVAILABLE,
        "etcdserver: request timed out, possibly due to connection lost",
        errors.OutcomeUnknownError,
    ),
    (
        S.UNAVAILABLE,
        "etcdserver: request timed out, waiting for the applied index took too long",
        errors.OutcomeUnknownError,
    ),
    (S.UNAVAILABLE, "etcdserver: unhealthy cluster", errors.OutcomeUnknownError),
    (S.DATA_LOSS, "etcdserver: corrupt cluster", errors.OutcomeUnknownError),
    (S.UNAVAILABLE, "Socket closed", errors.OutcomeUnknownError),
    (S.UNKNOWN, "Stream removed", errors.OutcomeUnknownError),
    (S.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.OutcomeUnknownError),
    (S.CANCELLED, "Channel closed!", errors.OutcomeUnknownError),
    (S.INTERNAL, "Received RST_STREAM with error code 2", errors.OutcomeUnknownError),
    # Texts that are etcd's in part only, or under another code, prove nothing.
    (S.INVALID_ARGUMENT, "a proxy's idea of an argument", errors.OutcomeUnknownError),
    (S.UNKNOWN, "etcdserver: key is not provided", errors.OutcomeUnknownError),
    (S.UNAVAILABLE, "etcdserver: no leader, they say", errors.OutcomeUnknownError),
    (99, "a code from the future", errors.OutcomeUnknownError),
]


@pytest.mark.parametrize(("code", "text", "expected"), TEXTS)
def test_failed_write_is_judged_by_code_and_text(code, text, expected):
    """A write is certainly not applied only if a known refusal says so; all else is unknown."""
    error = write_error(code, text, never_sent=False, sent_bytes=3_000_000, summary="a Txn", keys=(b"k",))

    assert expected is type(error)
    assert text in str(error)


def test_size_that_is_not_the_requests_proves_nothing():
    """A proxy that finds the answer too large uses grpc-go's words, too: the write was applied."""
    text = "grpc: received message larger than max (6291585 vs. 4194304)"
    error = write_error(
        S.RESOURCE_EXHAUSTED, text, never_sent=False, sent_bytes=60, summary="a Txn", keys=(b"k",)
    )

    assert errors.OutcomeUnknownError is type(error)


@pytest.mark.parametrize(("code", "text", "_expected"), TEXTS)
def test_request_that_never_left_is_unavailable(code, text, _expected):
    """Whatever the code says, a request that was never sent was not applied."""
    error = write_error(code, text, never_sent=True, sent_bytes=3_000_000, summary="a Txn", keys=(b"k",))

    assert errors.UnavailableError is type(error)


@pytest.mark.parametrize(("code", "text", "expected"), TEXTS)
def test_failed_read_is_never_unknown(code, text, expected):
    """A read that got no answer is unavailable; a refused one is refused as a write is."""
    error = read_error(code, text)

    if expected is not errors.OutcomeUnknownError:
        assert expected is type(error)
    elif code == S.INVALID_ARGUMENT:
        assert errors.InvalidRequestError is type(error)
    else:
        assert errors.UnavailableError is type(error)


def test_unknown_outcome_names_the_keys():
    """An unknown outcome says what was asked, of which keys, and how it ended."""
    error = write_error(
        S.UNAVAILABLE,
        "Socket closed",
        never_sent=False,
        sent_bytes=3_000_000,
        summary="a Txn",
        keys=(b"a", b"b"),
    )

    assert isinstance(error, errors.OutcomeUnknownError)
    assert error.keys == (b"a", b"b")
    assert str(error) == "no answer to a Txn (UNAVAILABLE: Socket closed)"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("mvcc: watcher range is empty", errors.InvalidRequestError),
        ("mvcc: duplicate watch ID provided on the WatchStream", errors.InvalidRequestError),
        ("rpc error: code = PermissionDenied desc = etcdserver: permission denied", errors.AccessDeniedError),
        ("rpc error: code = Unauthenticated desc = etcdserver: invalid auth token", errors.AccessDeniedError),
        (
            "rpc error: code = InvalidArgument desc = etcdserver: revision of auth store is old",
            errors.AccessDeniedError,
        ),
        ("rpc error: code = Unavailable desc = etcdserver: no leader", errors.UnavailableError),
        ("rpc error: code = Canceled desc = etcdserver: watch canceled", errors.UnavailableError),
        ("rpc error: code = Novel desc = whatever", errors.UnavailableError),
        ("etcdserver: permission denied", errors.AccessDeniedError),
        ("etcdserver: no leader", errors.UnavailableError),
        ("etcdserver: mvcc: required revision has been compacted", errors.CompactedError),
        ("something new", errors.EtcdError),
        ("", errors.EtcdError),
    ],
)
def test_cancel_reason_of_a_watch_is_text_only(reason, expected):
    """A canceled watch is judged by its reason; a reason that nobody knows is a plain error."""
    error = watch_error(reason)

    assert expected is type(error)
    assert (reason or "no reason given") in str(error) or reason.startswith("rpc error")
