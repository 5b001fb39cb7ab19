"""
Every error that etcd-infra raises, on one page, with one root.

A class answers the caller's next question: fix my code, run recovery, or send it again. Bad arguments
are `ValueError` and `TypeError`, raised before anything is sent.
"""

from __future__ import annotations


class EtcdInfraError(Exception):
    """The root of all errors of this package."""


# ── the backend could not do it ─────────────────────────────────────────────────────────────────


class EtcdError(EtcdInfraError):
    """Etcd, or the way to it, could not do what was asked."""


class UnavailableError(EtcdError):
    """The request was certainly not applied; sending it again is safe."""


class OutcomeUnknownError(EtcdError):
    """
    A write was sent and no answer came, so it may or may not have been applied.

    It may even be applied later: a read that does not show it proves nothing. Re-send the identical
    guarded request, or make its guard stale first.
    """

    def __init__(self, summary: str, keys: tuple[bytes, ...] = ()) -> None:
        super().__init__(summary, keys)
        self.summary = summary
        self.keys = keys

    def __str__(self) -> str:
        return f"no answer to {self.summary}"


class CompactedError(EtcdError):
    """The history that was asked for is gone; `compact_revision` is the oldest that is left (0: not told)."""

    def __init__(self, message: str, compact_revision: int = 0) -> None:
        super().__init__(message, compact_revision)
        self.message = message
        self.compact_revision = compact_revision

    def __str__(self) -> str:
        return self.message


class FutureRevisionError(EtcdError):
    """A revision was named that this member has not reached yet."""


class LeaseNotFoundError(EtcdError):
    """The lease does not exist (any more); nothing was written."""


class AccessDeniedError(EtcdError):
    """Etcd refused this user or token; nothing was written."""


class StorageFullError(EtcdError):
    """
    The database quota is used up (NOSPACE): nothing was written.

    Reads, deletes, revokes and keep-alives still work; puts and grants do not until space was made
    (compact, defragment) and the alarm is disarmed.
    """


class InvalidRequestError(EtcdError):
    """Etcd rejects the request as written; nothing was written."""


class LeaseExistsError(InvalidRequestError):
    """A lease of this id exists: with an id of one's own choice, the first copy of the grant worked."""


class InvalidAnswerError(EtcdError):
    """The server's answer makes no sense."""


class StoreResetError(EtcdError):
    """The store's revision went back: it was restored from a snapshot or wiped."""


# ── we had it; the world took it ────────────────────────────────────────────────────────────────


class LostError(EtcdInfraError):
    """Something that was held is held no more, by no doing of the caller."""


class SessionLostError(LostError):
    """The session's lease is gone or can not be proven any more."""


class LockLostError(LostError):
    """A lock was taken away: its lease ran out, or its key was deleted."""


class LeadershipLostError(LostError):
    """Leadership was taken away."""


class MessagesLostError(LostError):
    """
    Messages are gone that were never delivered here; iteration may go on after them.

    Attributes:
        after: Revisions before this one are not concerned; of this one some messages may have been delivered.
        up_to: Nor are revisions after this one.
    """

    def __init__(self, message: str, after: int = 0, up_to: int = 0) -> None:
        super().__init__(message, after, up_to)
        self.message = message
        self.after = after
        self.up_to = up_to

    def __str__(self) -> str:
        return self.message


# ── single facts ────────────────────────────────────────────────────────────────────────────────


class FencedError(EtcdInfraError):
    """A write carried a proof that is no longer true; nothing was written."""


class NotHeldError(EtcdInfraError):
    """The caller released or used what it does not hold."""


class ConflictError(EtcdInfraError):
    """
    Others kept winning, or a condition that the caller set was not met.

    Attributes:
        key: The key that was not as expected.
        version: Its version at that moment (0: absent), if it was read.
        index: Which operation of a transaction failed.
    """

    def __init__(
        self, message: str, key: str | None = None, version: int | None = None, index: int | None = None
    ) -> None:
        super().__init__(message, key, version, index)
        self.message = message
        self.key = key
        self.version = version
        self.index = index

    def __str__(self) -> str:
        return self.message


class TransactionTimeoutError(EtcdInfraError):
    """The transaction's time was over before its commit; nothing was changed."""


class ForkedError(EtcdInfraError):
    """The process was forked after the connection was opened; open a new one in the child."""


class AckTimeoutError(EtcdInfraError):
    """A message was not acknowledged in time: its handler was cancelled, and it will be delivered again."""


class RateLimitedError(EtcdInfraError):
    """Over the limit; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after


class CircuitOpenError(EtcdInfraError):
    """The breaker is open; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after


class CodecError(EtcdInfraError):
    """A stored value does not decode; carries its `key` and `version`."""

    def __init__(self, message: str, key: str, version: int) -> None:
        super().__init__(message, key, version)
        self.key = key
        self.version = version
