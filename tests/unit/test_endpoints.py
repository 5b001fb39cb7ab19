"""Which endpoint next; time is an argument."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from etcd_infra._backends.endpoints import FIRST_REST, LONGEST_REST, Endpoint, EndpointPolicy, Endpoints


def test_ordinary_calls_stick():
    """While an endpoint answers, every call goes to it."""
    policy = EndpointPolicy(3)

    assert [policy.choose(now) for now in range(4)] == [0, 0, 0, 0]


def test_failed_endpoint_is_left_and_not_returned_to():
    """A failure moves to the next endpoint, which is kept even when the first has rested."""
    policy = EndpointPolicy(3)
    policy.failed(policy.choose(0.0), 0.0)

    assert [policy.choose(0.0), policy.choose(100.0)] == [1, 1]


def test_failed_endpoint_is_skipped_while_it_rests():
    """The way around does not lead over an endpoint that rests."""
    policy = EndpointPolicy(3)
    policy.failed(0, 0.0)
    policy.failed(1, 0.0)

    assert policy.choose(0.1) == 2
    policy.failed(2, FIRST_REST)
    assert policy.choose(FIRST_REST) == 0


def test_all_resting_means_the_first_to_wake():
    """If every endpoint rests, the one whose rest ends first is tried."""
    policy = EndpointPolicy(2)
    policy.failed(1, 0.0)
    policy.failed(0, 0.1)

    assert policy.choose(0.2) == 1


def test_rest_doubles_up_to_a_bound():
    """Each failure after a rest doubles the next rest, up to the longest."""
    policy, now, rests = EndpointPolicy(1), 0.0, []
    for _ in range(8):
        policy.failed(0, now)
        rests.append(policy._resting_until[0] - now)
        now = policy._resting_until[0]

    assert rests[:3] == [FIRST_REST, FIRST_REST * 2, FIRST_REST * 4]
    assert max(rests) == rests[-1] == LONGEST_REST


def test_calls_that_failed_together_are_one_failure():
    """A hundred calls lost with one connection lengthen the rest no more than one."""
    policy = EndpointPolicy(1)
    for _ in range(100):
        policy.failed(0, 0.0)

    assert policy._resting_until[0] == FIRST_REST


def test_answer_ends_the_rest():
    """An endpoint that answers is well, and its next rest is a short one."""
    policy = EndpointPolicy(2)
    policy.failed(0, 0.0)
    policy.succeeded(0)
    policy.failed(0, 0.0)

    assert policy._resting_until[0] == FIRST_REST


def test_keep_alives_go_round():
    """Each keep-alive goes to the next endpoint that is well, whatever ordinary calls stick to."""
    policy = EndpointPolicy(3)
    policy.failed(1, 0.0)

    assert [policy.rotate(0.1) for _ in range(4)] == [0, 2, 0, 2]
    assert policy.choose(0.1) == 0


@given(st.lists(st.tuples(st.sampled_from("cfsr"), st.integers(0, 2), st.floats(0, 20)), max_size=40))
def test_there_is_always_a_choice(steps):
    """Whatever happened, a valid endpoint is chosen, and a resting one only if all rest."""
    policy, now = EndpointPolicy(3), 0.0
    for action, endpoint, elapsed in steps:
        now += elapsed
        if action == "f":
            policy.failed(endpoint, now)
        elif action == "s":
            policy.succeeded(endpoint)
        else:
            chosen = policy.choose(now) if action == "c" else policy.rotate(now)
            resting = [until > now for until in policy._resting_until]
            assert not resting[chosen] or all(resting)


def test_endpoint_is_shown_as_a_target():
    """An IPv6 host is put into brackets."""
    assert [str(Endpoint("etcd-0", 2379)), str(Endpoint("::1", 1))] == ["etcd-0:2379", "[::1]:1"]


async def test_channels_are_made_on_demand_and_closed():
    """A channel is made once, when its endpoint is first chosen, and closed with the others."""
    made, closed = [], []

    class Recorded:
        def __init__(self, endpoint):
            made.append(endpoint.port)
            self.port = endpoint.port

        async def aclose(self):
            closed.append(self.port)

    endpoints = Endpoints([Endpoint("h", 1), Endpoint("h", 2)], Recorded)
    assert endpoints.channel(1) is endpoints.channel(1)
    await endpoints.aclose()

    assert (made, closed) == ([2], [2])
    with pytest.raises(trio.ClosedResourceError):
        endpoints.channel(0)
