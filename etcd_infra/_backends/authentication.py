"""
User and password become a token that travels with each call, until etcd forgets it and a new one is got.

House rules. One request for a token at a time to each member, whoever waits for it: checking a password is slow
on the server, and a member that hangs must hold up its own callers only. The backend owns that request, not the
task that noticed, so that a cancelled caller fails nobody else. Neither password nor token is ever shown.

Source: etcd `server/etcdserver/api/v3rpc/interceptor.go`, `client/v3/retry_interceptor.go`.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._backends import wire
from etcd_infra._backends.channel import ByteStream, Channel, ChannelError, Metadata
from etcd_infra._backends.status import StatusCode, refusal
from etcd_infra.errors import InvalidAnswerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from etcd_infra._etcd.background import Background

_AUTHENTICATE: Final = "/etcdserverpb.Auth/Authenticate"
_NOT_ENABLED: Final = "etcdserver: authentication is not enabled"
# etcd: what it says when a token is void, is missing, or is older than a change of users and roles. Others who
# refuse a call may not know what became of it.
_TOKEN_TEXTS: Final = frozenset(
    {
        "etcdserver: invalid auth token",
        "etcdserver: user name is empty",
        "etcdserver: revision of auth store is old",
    }
)
_FRESH_SECONDS: Final = 1.0
_LEAST_SECONDS: Final = 0.1


class Tokens:
    """
    The one token of a backend.

    Args:
        username: Who we are.
        password: The proof.
        background: Where tokens are fetched.
        time_limit: Seconds that etcd may take.
    """

    def __init__(self, username: str, password: str, background: Background, *, time_limit: float) -> None:
        self._request = wire.encode_authenticate(username, password)
        self._background = background
        self._time_limit = time_limit
        self._token: str | None = None
        self._known_since: float | None = None
        self._fetches: dict[Channel, _Fetch] = {}
        self._begun = 0
        self._kept = 0

    async def get(self, channel: Channel, *, fresh: bool = False) -> str | None:
        """
        Return the token, fetched through `channel` if there is none; None: etcd does without.

        Args:
            channel: Where to ask.
            fresh: One of more than a second ago will not do.

        Raises:
            ChannelError: there is none to be had; `never_sent` unless etcd refused user and password.

        Cancellation:
            Others get the token all the same.
        """
        # While a fresh one is fetched for somebody, the old one is still good for all others.
        if self._known_since is not None and (
            not fresh or trio.current_time() < self._known_since + _FRESH_SECONDS
        ):
            return self._token
        fetch = self._fetches.get(channel)
        if fetch is None:
            self._begun += 1
            fetch = self._fetches[channel] = _Fetch(self._begun)
            self._background.start_soon(self._run, fetch, channel)
        await fetch.done.wait()
        if fetch.error is not None:
            raise fetch.error.again()
        return fetch.token

    def reject(self, token: str | None) -> None:
        """Take in that etcd did not accept a token."""
        if token == self._token and self._known_since is not None:
            self._known_since = None
            # Race: what is being fetched may have been given out before this one was refused, and be void, too.
            self._fetches.clear()
            self._kept = self._begun

    async def _run(self, fetch: _Fetch, channel: Channel) -> None:
        try:
            answer = await channel.unary(
                _AUTHENTICATE, self._request, time_limit=self._time_limit, metadata=wire.HAS_LEADER
            )
            fetch.token, fetch.error = wire.decode_authenticate(answer), None
        except ChannelError as error:
            if error.details == _NOT_ENABLED:
                fetch.token, fetch.error = None, None
            else:
                fetch.error = _Failure(error.code, error.details)
        except InvalidAnswerError:
            fetch.error = _Failure(StatusCode.INTERNAL, "the answer to user and password makes no sense")
        finally:
            if fetch.error is None and fetch.number > self._kept:
                self._token, self._known_since, self._kept = fetch.token, trio.current_time(), fetch.number
            if self._fetches.get(channel) is fetch:
                del self._fetches[channel]
            fetch.done.set()


class _Failure:
    """Why there is no token."""

    def __init__(self, code: int, details: str) -> None:
        self._code = code
        self._details = details

    def again(self) -> ChannelError:
        """Return the error for one of those who waited: their own calls were never sent."""
        refused = refusal(self._code, self._details) is not None
        return ChannelError(self._code, self._details, never_sent=not refused)


class _Fetch:
    """One request for a token, and those who wait for it; of two, the one that began later counts."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.done = trio.Event()
        self.token: str | None = None
        self.error: _Failure | None = _Failure(StatusCode.UNAVAILABLE, "this connection to etcd was closed")


class TokenChannel(Channel):
    """
    A channel whose calls carry the backend's token.

    A call that is refused for its token's sake was certainly not applied: it is sent once more with a new one.
    """

    renews_access = True

    def __init__(self, channel: Channel, tokens: Tokens) -> None:
        self._channel = channel
        self._tokens = tokens

    async def unary(
        self, method: str, request: bytes, /, *, time_limit: float, metadata: Metadata = ()
    ) -> bytes:
        """Implement `Channel.unary`."""
        deadline = trio.current_time() + time_limit
        token = await self._token_by(deadline)
        try:
            left = _left(deadline, time_limit)
            return await self._channel.unary(method, request, time_limit=left, metadata=_with(token, metadata))
        except ChannelError as error:
            if not _is_about_token(error):
                raise
        self._tokens.reject(token)
        token = await self._token_by(deadline)
        left = _left(deadline, time_limit)
        return await self._channel.unary(method, request, time_limit=left, metadata=_with(token, metadata))

    @asynccontextmanager
    async def stream(self, method: str, /, *, metadata: Metadata = ()) -> AsyncGenerator[ByteStream]:
        """Implement `Channel.stream`."""
        # etcd: each watch on a stream is checked with the stream's token, which may have expired meanwhile.
        token = await self._tokens.get(self._channel, fresh=True)
        async with self._channel.stream(method, metadata=_with(token, metadata)) as stream:
            yield stream

    async def aclose(self) -> None:
        """Implement `Channel.aclose`."""
        await self._channel.aclose()

    async def _token_by(self, deadline: float) -> str | None:
        with trio.CancelScope(deadline=deadline):
            return await self._tokens.get(self._channel)
        raise ChannelError(StatusCode.DEADLINE_EXCEEDED, "no token in time", never_sent=True)


def _left(deadline: float, time_limit: float) -> float:
    # In tenths, so that few different values are ever sent: their headers are remembered.
    left = deadline - trio.current_time()
    return time_limit if left > time_limit - _LEAST_SECONDS else max(_LEAST_SECONDS, round(left, 1))


def _with(token: str | None, metadata: Metadata) -> Metadata:
    return metadata if token is None else (*metadata, ("token", token))


def _is_about_token(error: ChannelError) -> bool:
    return error.details in _TOKEN_TEXTS
