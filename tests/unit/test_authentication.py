"""Tokens: got once for all who wait, renewed when etcd does not accept them, never by the wrong one's failure."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import count
from math import inf

import pytest
import trio

from etcd_infra._backends.authentication import TokenChannel, Tokens
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.status import StatusCode
from etcd_infra._backends.wire_schema import MESSAGES
from etcd_infra._etcd.background import open_background
from tests.helpers.scripted_channel import ScriptedChannel

AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"
EXPIRED = ChannelError(StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token")
NOT_ENABLED = ChannelError(StatusCode.FAILED_PRECONDITION, "etcdserver: authentication is not enabled")
WRONG = ChannelError(
    StatusCode.INVALID_ARGUMENT, "etcdserver: authentication failed, invalid user ID or password"
)


def token(text):
    """What etcd answers to user and password."""
    return MESSAGES["AuthenticateResponse"](token=text).SerializeToString()


@asynccontextmanager
async def authenticated(*answers):
    """Open a channel under test on a scripted one."""
    script = ScriptedChannel()
    script.answers.extend(answers)
    async with open_background() as background:
        tokens = Tokens("alice", "secret", background, time_limit=5.0)
        yield TokenChannel(script, tokens), script


def sent(script):
    """Which calls were made with which tokens."""
    return [(method.rpartition("/")[2], dict(metadata).get("token")) for method, _, _, metadata in script.calls]


async def test_token_travels_with_each_call(autojump_clock):
    """User and password are sent once, the token with every call, beside what else there is."""
    async with authenticated(token(b"t1"), b"one", b"two") as (channel, script):
        metadata = (("hasleader", "true"),)
        assert b"one" == await channel.unary("/KV/Range", b"", time_limit=5.0, metadata=metadata)
        assert b"two" == await channel.unary("/KV/Range", b"", time_limit=5.0)
        assert [("Authenticate", None), ("Range", "t1"), ("Range", "t1")] == sent(script)
        assert (("hasleader", "true"), ("token", "t1")) == script.calls[1][3]
        request = MESSAGES["AuthenticateRequest"].FromString(script.calls[0][1])
        assert ("alice", "secret") == (request.name, request.password)


@pytest.mark.parametrize(
    "refusal",
    [
        EXPIRED,
        ChannelError(StatusCode.INVALID_ARGUMENT, "etcdserver: revision of auth store is old"),
        ChannelError(StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty"),
    ],
)
async def test_call_is_sent_again_with_a_new_token(refusal, autojump_clock):
    """A token that is not accepted is renewed, and the call, which was not applied, is sent once more."""
    async with authenticated(token(b"t1"), b"", refusal, token(b"t2"), b"done") as (channel, script):
        await channel.unary("/KV/Range", b"", time_limit=5.0)
        assert b"done" == await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert [("Txn", "t1"), ("Authenticate", None), ("Txn", "t2")] == sent(script)[2:]


async def test_second_refusal_is_believed(autojump_clock):
    """With a token of a moment ago a refusal is an answer: there is no third try."""
    async with authenticated(token(b"t1"), EXPIRED, token(b"t2"), EXPIRED) as (channel, script):
        with pytest.raises(ChannelError) as caught:
            await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert StatusCode.UNAUTHENTICATED == caught.value.code
        assert 4 == len(script.calls)


async def test_denial_is_not_sent_again(autojump_clock):
    """Who may not do something is told so at once."""
    denied = ChannelError(StatusCode.PERMISSION_DENIED, "etcdserver: permission denied")
    async with authenticated(token(b"t1"), denied) as (channel, script):
        with pytest.raises(ChannelError):
            await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert 2 == len(script.calls)


async def test_many_callers_cause_one_request(autojump_clock):
    """All whose token expired wait for one new one."""
    answers = [token(b"t1"), b"", *[EXPIRED] * 20, 0.5, token(b"t2"), *[b"done"] * 20]
    async with authenticated(*answers) as (channel, script):
        await channel.unary("/KV/Range", b"", time_limit=5.0)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(lambda: channel.unary("/KV/Txn", b"x", time_limit=5.0))
        assert 2 == [method for method, _ in sent(script)].count("Authenticate")
        assert 20 == sent(script).count(("Txn", "t2"))


async def test_cancelled_caller_fails_nobody_else(autojump_clock):
    """The task that noticed gives up while the token is fetched: the others get it."""
    async with authenticated(0.5, token(b"t1"), b"done") as (channel, script):
        with trio.move_on_after(0.1) as given_up:
            await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert given_up.cancelled_caught
        assert b"done" == await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert [("Authenticate", None), ("Txn", "t1")] == sent(script)


async def test_server_without_authentication_gets_no_token(autojump_clock):
    """It says so once; when it asks for a user later on, there is one."""
    empty = ChannelError(StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty")
    async with authenticated(NOT_ENABLED, b"", b"", empty, token(b"t1"), b"done") as (channel, script):
        for _ in range(3):
            await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        plain = ("Txn", None)
        assert [("Authenticate", None), plain, plain, plain, ("Authenticate", None), ("Txn", "t1")] == sent(
            script
        )


async def test_authentication_that_was_disabled_drops_the_token(autojump_clock):
    """Etcd 3.4 refuses tokens then: the call is sent without one, and there is no loop."""
    async with authenticated(token(b"t1"), b"", EXPIRED, NOT_ENABLED, b"done") as (channel, script):
        await channel.unary("/KV/Range", b"", time_limit=5.0)
        assert b"done" == await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert ("Txn", None) == sent(script)[-1]


@pytest.mark.parametrize(
    ("failure", "never_sent"),
    [
        (WRONG, False),
        (ChannelError(StatusCode.UNAVAILABLE, "Socket closed"), True),
        (ChannelError(StatusCode.DEADLINE_EXCEEDED, "no answer in time"), True),
    ],
)
async def test_call_without_a_token_was_never_sent(failure, never_sent, autojump_clock):
    """A wrong password is etcd's own word; else nothing is known but that the call itself was not sent."""
    async with authenticated(failure) as (channel, script):
        with pytest.raises(ChannelError) as caught:
            await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert (failure.code, never_sent) == (caught.value.code, caught.value.never_sent)
        assert "secret" not in str(caught.value)
        assert 1 == len(script.calls)


async def test_token_takes_no_longer_than_the_call_may(autojump_clock):
    """The call's own limit holds for the token, too; and for what is left of it afterwards."""
    async with authenticated(3.0, token(b"t1"), 1.5, EXPIRED, 0.2, token(b"t2"), b"") as (channel, script):
        began = trio.current_time()
        with pytest.raises(ChannelError) as caught:
            await channel.unary("/KV/Txn", b"x", time_limit=1.0)
        assert (StatusCode.DEADLINE_EXCEEDED, True) == (caught.value.code, caught.value.never_sent)
        assert 1.0 == pytest.approx(trio.current_time() - began)
        await trio.sleep(5)
        await channel.unary("/KV/Txn", b"x", time_limit=2.0)
        limits = [limit for method, _, limit, _ in script.calls if method != AUTHENTICATE]
        assert [2.0, 0.3] == limits


async def test_stream_begins_with_a_fresh_token(autojump_clock):
    """A stream's token is checked for as long as it lasts: two at once share one, a later one has its own."""
    async with authenticated(token(b"t1"), b"", token(b"t2")) as (channel, script):
        await channel.unary("/KV/Range", b"", time_limit=5.0)
        async with channel.stream("/Watch/Watch"), channel.stream("/Watch/Watch"):
            pass
        await trio.sleep(60)
        async with channel.stream("/Watch/Watch"):
            pass
        streams = [dict(metadata)["token"] for _, _, limit, metadata in script.calls if limit == inf]
        assert ["t1", "t1", "t2"] == streams


async def test_fetching_a_fresh_token_holds_up_nobody_else(autojump_clock):
    """While a stream waits for a fresh token on a member that hangs, calls elsewhere go on with the one there is."""
    hanging, well = ScriptedChannel(), ScriptedChannel()
    hanging.answers.extend([5.0, ChannelError(StatusCode.DEADLINE_EXCEEDED, "no answer")])
    well.answers.extend([token(b"t1"), *[b"done"] * 5])
    async with open_background() as background, trio.open_nursery() as nursery:
        tokens = Tokens("alice", "secret", background, time_limit=5.0)
        channel = TokenChannel(well, tokens)
        await channel.unary("/KV/Txn", b"x", time_limit=0.8)
        await trio.sleep(60)

        async def open_stream():
            with pytest.raises(ChannelError):
                async with TokenChannel(hanging, tokens).stream("/Watch/Watch"):
                    pass

        nursery.start_soon(open_stream)
        await trio.sleep(0.1)
        for _ in range(4):
            assert b"done" == await channel.unary("/KV/Txn", b"x", time_limit=0.8)
    assert [("Authenticate", None), *[("Txn", "t1")] * 5] == sent(well)


async def test_member_that_hangs_holds_up_its_own_callers_only(autojump_clock):
    """Whoever needs a token gets it from the member that it calls."""
    hanging, well = ScriptedChannel(), ScriptedChannel()
    hanging.answers.extend([5.0, ChannelError(StatusCode.DEADLINE_EXCEEDED, "no answer")])
    well.answers.extend([token(b"t1"), b"done"])
    async with open_background() as background, trio.open_nursery() as nursery:
        tokens = Tokens("alice", "secret", background, time_limit=5.0)

        async def call_in_vain():
            with pytest.raises(ChannelError):
                await TokenChannel(hanging, tokens).unary("/KV/Txn", b"x", time_limit=0.8)

        nursery.start_soon(call_in_vain)
        await trio.sleep(0.1)
        assert b"done" == await TokenChannel(well, tokens).unary("/KV/Txn", b"x", time_limit=0.8)


async def test_answer_that_makes_no_sense_is_no_token(autojump_clock):
    """Rubbish instead of a token fails the call, which was not sent, and nothing else; nothing of it is shown."""
    async with authenticated(b"\xff\xff secret", token(b"t1"), b"done") as (channel, _):
        with pytest.raises(ChannelError, match="makes no sense") as caught:
            await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert caught.value.never_sent
        assert "secret" not in str(caught.value)
        assert b"done" == await channel.unary("/KV/Txn", b"x", time_limit=5.0)


async def test_token_is_asked_for_where_there_is_a_leader(autojump_clock):
    """A member without a leader says so at once, as for any other write."""
    async with authenticated(token(b"t1"), b"done") as (channel, script):
        await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert (("hasleader", "true"),) == script.calls[0][3]


async def test_closing_does_not_leave_anybody_waiting(autojump_clock):
    """Whoever waits for a token when the backend is closed learns that it was not sent."""
    caught = []

    async def call(channel):
        with pytest.raises(ChannelError) as error:
            await channel.unary("/KV/Txn", b"x", time_limit=50.0)
        caught.append(error.value.never_sent)

    async with trio.open_nursery() as nursery:
        async with authenticated(60.0, token(b"t1")) as (channel, _):
            nursery.start_soon(call, channel)
            await trio.sleep(1)
    assert [True] == caught


class SlowMember(ScriptedChannel):
    """A member that gives out a token at once, and whose answer is under way for a while."""

    numbers = count()

    def __init__(self, valid, delay=0.0):
        super().__init__()
        self.valid = valid
        self.delay = delay

    async def unary(self, method, request, /, *, time_limit, metadata=()):
        """Give out a token, or look at one."""
        self.calls.append((method, request, time_limit, metadata))
        await trio.lowlevel.checkpoint()
        if method != AUTHENTICATE:
            if dict(metadata).get("token") not in self.valid:
                raise EXPIRED
            return b"done"
        given = f"t{next(self.numbers)}"
        self.valid.append(given)
        await trio.sleep(self.delay)
        return token(given.encode())


async def test_refused_call_waits_for_no_older_request(autojump_clock):
    """A token that was given out before the refusal may be void as well: another one is asked for."""
    member = SlowMember([])
    async with open_background() as background, trio.open_nursery() as nursery:
        channel = TokenChannel(member, Tokens("alice", "secret", background, time_limit=5.0))
        await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        await trio.sleep(60)
        member.delay = 0.3

        async def open_stream():
            async with channel.stream("/Watch/Watch"):
                pass

        nursery.start_soon(open_stream)
        await trio.sleep(0.1)
        member.valid.clear()
        async with trio.open_nursery() as callers:
            for _ in range(3):
                callers.start_soon(lambda: channel.unary("/KV/Txn", b"x", time_limit=5.0))
    assert 3 == [method for method, *_ in member.calls].count(AUTHENTICATE)


async def test_of_two_tokens_the_later_request_counts(autojump_clock):
    """The answer of a slow member, asked earlier, does not take the place of a newer token."""
    valid = []
    slow, quick = SlowMember(valid, 1.0), SlowMember(valid)
    async with open_background() as background, trio.open_nursery() as nursery:
        tokens = Tokens("alice", "secret", background, time_limit=5.0)
        nursery.start_soon(lambda: TokenChannel(slow, tokens).unary("/KV/Txn", b"x", time_limit=5.0))
        await trio.sleep(0.1)
        channel = TokenChannel(quick, tokens)
        await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        await trio.sleep(2)
        await channel.unary("/KV/Txn", b"x", time_limit=5.0)
    first, second = (given for method, given in sent(quick) if method == "Txn")
    assert first == second


async def test_strangers_refusal_is_not_about_the_token(autojump_clock):
    """A write that a proxy refused is not sent again: only etcd's own words say that it was not applied."""
    stranger = ChannelError(StatusCode.UNAUTHENTICATED, "HTTP status 401 instead of a gRPC answer")
    async with authenticated(token(b"t1"), stranger) as (channel, script):
        with pytest.raises(ChannelError, match="401"):
            await channel.unary("/KV/Txn", b"x", time_limit=5.0)
        assert 2 == len(script.calls)
