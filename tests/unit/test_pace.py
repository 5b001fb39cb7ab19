"""The pace of writers of one key: nobody alone rests, nobody among others takes more than a turn."""

from __future__ import annotations

from etcd_infra._policy.pace import CONTENDED_SECONDS, REST_SECONDS, TURN, Pace


def test_writer_alone_never_rests():
    """Without a loss there is no wait, however many writes there are."""
    pace = Pace()
    for _ in range(10 * TURN):
        pace.won()
        assert 0.0 == pace.before_next(0.0, 0.5)


def test_first_loss_costs_no_wait():
    """A number that was only out of date is written again at once; the next loss waits, with jitter, bounded."""
    pace = Pace()
    assert 0.0 == pace.lost(0.0, 1, 0.5)
    waits = [pace.lost(0.1, losses, draw) for losses in (1, 2, 50) for draw in (0.0, 0.99)]
    assert all(0 < wait <= 2 * REST_SECONDS for wait in waits)
    assert len(set(waits)) >= 4


def test_turns_end_while_there_are_others():
    """After a loss a writer rests after each turn, until nobody else was seen for a while."""
    pace = Pace()
    pace.lost(0.0, 1, 0.5)
    rests = []
    for _ in range(3 * TURN):
        pace.won()
        rests.append(pace.before_next(CONTENDED_SECONDS / 2, 0.5))
    assert 3 == sum(rest > 0 for rest in rests)
    for _ in range(TURN):
        pace.won()
    assert 0.0 == pace.before_next(CONTENDED_SECONDS, 0.5)
