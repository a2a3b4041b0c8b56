"""Who is pinged and who is dropped (docs/protocol.md §3 rule 11), on a clock of the test's own."""

from __future__ import annotations

from kohakuriver.tunnel.keepalive import Act, Keepalive, Step


def pinged_at_15() -> Keepalive:
    """A peer that was silent for 15 s and was pinged then, when 100 bytes had come and 57 had gone."""
    keepalive = Keepalive(idle_ping=15, pong_wait=20)
    step = keepalive.tick(15, heard_at=0, received=100, written=50, reading=True)
    assert step == Step(Act.PING, 15)
    keepalive.pinged(received=100, written=57)
    return keepalive


def test_a_peer_that_was_heard_lately_is_not_pinged() -> None:
    keepalive = Keepalive(idle_ping=15, pong_wait=20)
    assert keepalive.tick(15, heard_at=10, received=1, written=0, reading=True) == Step(Act.WAIT, 10)


def test_a_peer_that_never_answers_is_dropped_after_pong_wait() -> None:
    keepalive = pinged_at_15()
    assert keepalive.tick(30, heard_at=0, received=100, written=57, reading=True) == Step(Act.WAIT, 5)
    assert keepalive.tick(35, heard_at=0, received=100, written=57, reading=True).act is Act.DROP


def test_the_bytes_of_a_ping_do_not_spare_a_dead_peer() -> None:
    """Were 50 remembered instead of 57, the ping itself would look like progress."""
    assert pinged_at_15().tick(35, heard_at=0, received=100, written=57, reading=True).act is Act.DROP


def test_an_answer_within_the_same_tick_of_the_clock_counts() -> None:
    assert pinged_at_15().tick(35, heard_at=15, received=102, written=57, reading=True) == Step(Act.PING, 15)


def test_a_slow_peer_that_takes_bytes_is_waited_for_again_and_dropped_when_it_stops() -> None:
    keepalive = pinged_at_15()
    assert keepalive.tick(35, heard_at=0, received=100, written=58, reading=True) == Step(Act.WAIT, 15)
    assert keepalive.tick(50, heard_at=0, received=100, written=58, reading=True) == Step(Act.WAIT, 5)
    assert keepalive.tick(55, heard_at=0, received=100, written=58, reading=True).act is Act.DROP


def test_a_timer_that_is_far_too_late_blames_nobody_else() -> None:
    """After a machine's sleep what came meanwhile is still to be read."""
    assert pinged_at_15().tick(1000, heard_at=0, received=100, written=57, reading=True) == Step(Act.WAIT, 15)


def test_whoever_does_not_read_pings_and_drops_nobody() -> None:
    keepalive = pinged_at_15()
    for now in (35, 50, 65):
        assert keepalive.tick(now, heard_at=0, received=100, written=57, reading=False) == Step(Act.PING, 15)
        keepalive.pinged(received=100, written=57)
    assert keepalive.tick(80, heard_at=79, received=100, written=57, reading=True) == Step(Act.WAIT, 14)
