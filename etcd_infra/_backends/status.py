"""
The only place where failures of servers and transports become classes of `errors.py`.

A failure comes in as three neutral facts: a status code, a text, and whether the request was certainly
never handled. The verdict needs all of them: RESOURCE_EXHAUSTED alone has four meanings, and for a write
everything that is not known to be a refusal may have been applied.

Source: etcd `api/v3rpc/rpctypes/error.go` (3.4 to 3.6, whose codes differ), `server/.../v3rpc/interceptor.go`.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from etcd_infra.errors import (
    AccessDeniedError,
    CompactedError,
    EtcdError,
    FutureRevisionError,
    InvalidRequestError,
    LeaseExistsError,
    LeaseNotFoundError,
    OutcomeUnknownError,
    StorageFullError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


class StatusCode(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


# House rule: only what is known to be refused *before* it is applied stands here. What is missing is
# unknown, which is always right for a write; nothing goes in on the strength of its code alone.
# etcd: the whole text must match, so that a proxy's or a library's message is never taken for etcd's.
REFUSALS: Final[Mapping[tuple[StatusCode, str], type[EtcdError]]] = {
    (StatusCode.INVALID_ARGUMENT, "key is not provided"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "key not found"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "value is provided"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "lease is provided"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "too many operations in txn request"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "duplicate key given in txn request"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "request is too large"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "invalid sort option"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "invalid auth management"): InvalidRequestError,
    (StatusCode.INVALID_ARGUMENT, "user name is empty"): AccessDeniedError,
    (StatusCode.INVALID_ARGUMENT, "revision of auth store is old"): AccessDeniedError,
    (
        StatusCode.INVALID_ARGUMENT,
        "authentication failed, invalid user ID or password",
    ): AccessDeniedError,
    (StatusCode.PERMISSION_DENIED, "permission denied"): AccessDeniedError,
    (StatusCode.UNAUTHENTICATED, "invalid auth token"): AccessDeniedError,
    (StatusCode.OUT_OF_RANGE, "mvcc: required revision has been compacted"): CompactedError,
    (StatusCode.OUT_OF_RANGE, "mvcc: required revision is a future revision"): FutureRevisionError,
    (StatusCode.OUT_OF_RANGE, "too large lease TTL"): InvalidRequestError,
    (StatusCode.NOT_FOUND, "requested lease not found"): LeaseNotFoundError,
    (StatusCode.NOT_FOUND, "member not found"): InvalidRequestError,
    (StatusCode.FAILED_PRECONDITION, "lease already exists"): LeaseExistsError,
    (StatusCode.FAILED_PRECONDITION, "authentication is not enabled"): InvalidRequestError,
    (StatusCode.FAILED_PRECONDITION, "user name not found"): AccessDeniedError,
    (StatusCode.FAILED_PRECONDITION, "role name not found"): AccessDeniedError,
    (StatusCode.FAILED_PRECONDITION, "not leader"): UnavailableError,
    (StatusCode.FAILED_PRECONDITION, "rpc not supported for learner"): UnavailableError,
    (StatusCode.UNAVAILABLE, "rpc not supported for learner"): UnavailableError,
    (StatusCode.FAILED_PRECONDITION, "not capable"): UnavailableError,
    (StatusCode.UNAVAILABLE, "not capable"): UnavailableError,
    # etcd: answered by the interceptor that looks at "hasleader", before the request is handled.
    (StatusCode.UNAVAILABLE, "no leader"): UnavailableError,
    (StatusCode.RESOURCE_EXHAUSTED, "mvcc: database space exceeded"): StorageFullError,
    # etcd: refused before it is proposed.
    (StatusCode.RESOURCE_EXHAUSTED, "too many requests"): UnavailableError,
}

# A server that never looked at the request; grpc-go's words, without etcd's prefix.
_TRANSPORT_REFUSALS: Final = (
    (StatusCode.UNIMPLEMENTED, "unknown method "),
    (StatusCode.UNIMPLEMENTED, "unknown service "),
)
# The same words come from a proxy that finds the *answer* too large, when the request was applied (and from our
# own side, as "CLIENT: Received message larger than max"): the first number tells whose size it is.
_TOO_LARGE: Final = re.compile(r"grpc: received message larger than max \((\d+) vs\. \d+\)")

# For a read, where nothing can have been applied, these codes say "do not send that again".
_REFUSED_READ: Final[Mapping[int, type[EtcdError]]] = {
    StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    StatusCode.NOT_FOUND: InvalidRequestError,
    StatusCode.ALREADY_EXISTS: InvalidRequestError,
    StatusCode.FAILED_PRECONDITION: InvalidRequestError,
    StatusCode.OUT_OF_RANGE: InvalidRequestError,
    StatusCode.UNIMPLEMENTED: InvalidRequestError,
    StatusCode.PERMISSION_DENIED: AccessDeniedError,
    StatusCode.UNAUTHENTICATED: AccessDeniedError,
}

_PREFIX: Final = "etcdserver: "
_CODES: Final = frozenset(StatusCode)
_WRAPPED: Final = re.compile(r"rpc error: code = (\w+) desc = (.*)", re.DOTALL)
_CODE_NAMES: Final = {code.name.replace("_", "").casefold(): code for code in StatusCode} | {
    "canceled": StatusCode.CANCELLED,
}

# etcd: a watch's cancel reason is text only, and the duplicate-id and empty-range ones have no prefix.
_WATCH_REASONS: Final[Mapping[str, type[EtcdError]]] = {
    "mvcc: watcher range is empty": InvalidRequestError,
    "mvcc: duplicate watch ID provided on the WatchStream": InvalidRequestError,
}


def refusal(code: int, details: str, *, sent_bytes: int | None = None) -> EtcdError | None:
    """Say what a server refused, or None if the answer does not prove that nothing was applied."""
    too_large = _TOO_LARGE.fullmatch(details) if code == StatusCode.RESOURCE_EXHAUSTED else None
    if too_large and sent_bytes in {None, int(too_large[1])}:
        return InvalidRequestError(details)
    for refused, beginning in _TRANSPORT_REFUSALS:
        if code == refused and details.startswith(beginning):
            return InvalidRequestError(details)
    if not details.startswith(_PREFIX) or code not in _CODES:
        return None
    verdict = REFUSALS.get((StatusCode(code), details.removeprefix(_PREFIX)))
    return verdict(details) if verdict else None


def read_error(code: int, details: str) -> EtcdError:
    """Translate the failure of a request that changes nothing and may be sent again."""
    verdict = _REFUSED_READ.get(code, UnavailableError)
    return refusal(code, details) or verdict(_described(code, details))


def write_error(  # noqa: PLR0913 - the facts, all but two of them named
    code: int,
    details: str,
    *,
    never_sent: bool,
    sent_bytes: int,
    summary: str,
    keys: tuple[bytes, ...] = (),
) -> EtcdError:
    """
    Translate the failure of a request that may have changed something.

    Args:
        code: The gRPC status code; an unknown number is a failure that says nothing.
        details: The status text, as it came.
        never_sent: Whether the server has certainly not handled the request, and never will.
        sent_bytes: The request's size.
        summary: What was asked, without values, for the message.
        keys: The keys that may have been written.
    """
    if never_sent:
        return UnavailableError(_described(code, details))
    refused = refusal(code, details, sent_bytes=sent_bytes)
    return refused or OutcomeUnknownError(f"{summary} ({_described(code, details)})", keys)


def watch_error(reason: str) -> EtcdError:
    """
    Translate the reason of a canceled watch.

    `UnavailableError` means that the watch may be created again, here or elsewhere; a plain `EtcdError`
    is a reason that nobody knows.
    """
    wrapped = _WRAPPED.fullmatch(reason)
    if wrapped:
        code = _CODE_NAMES.get(wrapped[1].casefold(), StatusCode.UNKNOWN)
        return read_error(code, wrapped[2])
    bare = reason.removeprefix(_PREFIX)
    verdict = _WATCH_REASONS.get(bare) or _BY_TEXT.get(bare)
    return (
        verdict(reason)
        if verdict
        else EtcdError(f"the server canceled the watch: {reason or 'no reason given'}")
    )


_BY_TEXT: Final[Mapping[str, type[EtcdError]]] = {text: verdict for (_, text), verdict in REFUSALS.items()}


def _described(code: int, details: str) -> str:
    name = StatusCode(code).name if code in _CODES else f"status {code}"
    return f"{name}: {details or 'no details'}"
