"""The straight path without its links: tickets, where a user may go, and what is said of it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver.cli import forward_view
from kohakuriver.client import straight
from kohakuriver.client.forward import Stats, path_choice
from kohakuriver.client.straight import LOOK, PATIENCE, QUESTIONS, QUIET, PathTaken, Silence, checked_url
from kohakuriver.errors import UnauthenticatedError, UnavailableError, UsageError
from kohakuriver.host.services.tunnel_proxy import straight_tells
from kohakuriver.limits import Limits
from kohakuriver.relay.straight import GOOD_SECONDS, Leg, Paths, Straights
from kohakuriver.runner.server import RunnerOptions, _no_direct
from kohakuriver.session import ticket
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.protocol import StraightOffer, WentStraight

TICKET = Ticket("node", "forward", "id", 0.0, 1, "c", "ann", None, tells=5.0)
KEY = b"k" * 32


class OneLeg:
    """A session's link through the host, of which nothing is used here."""

    container = "c"
    user_link = None
    beyond = False

    def let_go(self) -> int:
        return 0

    def passed(self) -> tuple[int, int]:
        return 0, 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def straights(refusal: str = "", clock: Clock | None = None) -> Straights:
    return Straights("https://node:8001", refusal, lease=60.0, clock=clock or Clock())


def paths(of: Straights, shown: Ticket | None = TICKET) -> Paths:
    return Paths(of, cast(Leg, OneLeg()), shown)


def test_a_ticket_names_the_runner_and_opens_the_session_that_it_was_given_to() -> None:
    known = straights()
    session = paths(known)
    offer = session.offer()
    assert offer.url == "wss://node:8001/ws/straight/c"
    assert known.take(offer.shown.hex(), "c") == (session, offer.proof)


def test_a_ticket_is_good_once() -> None:
    known = straights()
    shown = paths(known).offer().shown.hex()
    known.take(shown, "c")
    with pytest.raises(UnauthenticatedError):
        known.take(shown, "c")


def test_a_ticket_is_for_its_own_task_alone() -> None:
    known = straights()
    shown = paths(known).offer().shown.hex()
    with pytest.raises(UnauthenticatedError):
        known.take(shown, "another")


def test_a_ticket_runs_out() -> None:
    clock = Clock()
    known = straights(clock=clock)
    shown = paths(known).offer().shown.hex()
    clock.now = GOOD_SECONDS + 0.1
    with pytest.raises(UnauthenticatedError):
        known.take(shown, "c")


def test_of_a_sessions_tickets_the_last_is_good_and_none_when_it_has_ended() -> None:
    known = straights()
    session = paths(known)
    first, second = session.offer().shown.hex(), session.offer().shown.hex()
    with pytest.raises(UnauthenticatedError):
        known.take(first, "c")
    session.through_closed(1000, "the forward has ended")
    with pytest.raises(UnauthenticatedError):
        known.take(second, "c")


@pytest.mark.parametrize("shown", [None, "", "00" * 16, "\ud800"])
def test_what_is_no_ticket_opens_nothing(shown: str | None) -> None:
    with pytest.raises(UnauthenticatedError):
        straights().take(shown, "c")


def test_a_runner_that_is_not_for_users_says_why_and_gives_no_ticket() -> None:
    assert paths(straights("it is not for users")).offer() == StraightOffer(refusal="it is not for users")


def test_a_session_that_leads_beyond_the_task_is_offered_none() -> None:
    session = paths(straights())
    session.through.beyond = True
    assert "beyond the task" in session.offer().refusal


@pytest.mark.parametrize("shown", [None, Ticket("node", "forward", "id", 0.0, 1, "c", "ann", None)])
def test_what_the_host_did_not_allow_is_not_offered(shown: Ticket | None) -> None:
    assert "host" in paths(straights(), shown).offer().refusal


def test_the_hosts_ticket_says_how_often_it_wants_to_hear() -> None:
    made: dict[str, Any] = {"node": "n", "scope": "forward", "task": 1, "container": "c", "user": "ann"}
    told = ticket.issue(KEY, **made, tells=2.5)
    assert ticket.check(KEY, told, node="n", scope="forward").tells == 2.5
    assert ticket.check(KEY, ticket.issue(KEY, **made), node="n", scope="forward").tells is None


def test_a_session_whose_rate_is_limited_stays_with_the_host_and_an_idle_one_is_told_of_in_time() -> None:
    assert straight_tells(Limits(max_rate=1 << 20)) is None
    assert straight_tells(Limits(idle_timeout=4.0)) == 0.5
    assert straight_tells(Limits()) == 5.0


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=60))
def test_what_went_straight_is_read_as_it_was_told_and_nothing_else_is(there: int, back: int, noise: bytes) -> None:
    told = WentStraight(there, back)
    assert WentStraight.parse(told.pack()) == told
    assert len(noise) == len(told.pack()) or WentStraight.parse(noise) is None


@given(st.binary(max_size=80))
def test_any_bytes_are_an_offer_or_none(data: bytes) -> None:
    offer = StraightOffer.parse(data)
    assert offer is None or offer.url or not offer.shown


def test_an_offer_is_read_as_it_was_made() -> None:
    for offer in (StraightOffer("ws://n:1/x", b"s" * 16, b"p" * 16), StraightOffer(refusal="för nobody")):
        assert StraightOffer.parse(offer.pack()) == offer


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("wss://node:8001/x", "https://host"),
        ("wss://node:8001/x", "http://host:8000"),
        ("ws://node:8001/x", "http://host:8000"),
        ("ws://127.0.0.1:8001/x", "http://127.0.0.1:8000"),
        ("ws://localhost:8001/x", "http://[::1]:8000"),
    ],
)
def test_a_node_is_gone_to_as_safely_as_the_host_or_more_so(url: str, host: str) -> None:
    assert checked_url(url, (host,)) == url


@pytest.mark.parametrize(
    ("url", "host", "why"),
    [
        ("ws://node:8001/x", "https://host", "TLS"),
        ("ws://127.0.0.1:8001/x", "https://127.0.0.1", "TLS"),
        ("http://node:8001/x", "http://host", "TLS"),
        ("file:///etc/passwd", "http://host", "TLS"),
        ("ws://[::1", "http://host", "none"),
        ("ws://node:99999/x", "http://host", "none"),
        ("ws:///x", "http://host", "none"),
        ("ws://127.0.0.1:8001/x", "http://host:8000", "own machine"),
        ("wss://localhost:8001/x", "https://host", "own machine"),
    ],
)
def test_a_login_by_tls_never_goes_in_plain_text_and_no_strangers_loopback_is_dialled(
    url: str, host: str, why: str
) -> None:
    with pytest.raises(UnavailableError, match=why):
        checked_url(url, (host,))


@given(st.text() | st.text().map("ws://".__add__))
def test_whatever_a_node_names_is_gone_to_or_refused_with_a_reason(url: str) -> None:
    with contextlib.suppress(UnavailableError):
        assert checked_url(url, ("http://host",)).startswith("ws")


def test_a_path_that_was_lost_is_tried_again_every_second_and_one_that_never_carried_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("kohakuriver.client.straight.time.monotonic", clock)
    monkeypatch.setattr("random.uniform", lambda least, most: most)  # the longest that it may be
    again = straight.Again()
    again.refused()
    assert again.pause() == straight.FIRST_AGAIN
    again.lost(3600)
    for second in range(int(straight.SOON_FOR)):
        clock.now = second
        assert again.soon
        assert again.pause() <= 1
        again.refused()
    clock.now = straight.SOON_FOR
    assert again.pause() == straight.LONGEST_AGAIN


def test_a_path_that_fails_whenever_it_is_taken_is_taken_ever_more_rarely_until_it_carries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("random.uniform", lambda least, most: most)
    again = straight.Again()
    pauses = []
    for _ in range(10):
        again.lost(1.3)
        pauses.append(again.pause())
    assert pauses == [1, 1, 1, 1, 1, 2, 4, 8, 16, 32]
    for _ in range(10):  # blocked, and free for some seconds
        again.lost(3)
        assert again.pause() == 1


def test_the_setting_is_one_of_three_and_direct_needs_connections_that_are_kept() -> None:
    assert [path_choice(each, keeps=True) for each in (None, "", "auto", "direct", "host")] == [
        "auto", "auto", "auto", "direct", "host",
    ]  # fmt: skip
    assert path_choice("auto", keeps=False) == "host"
    with pytest.raises(UsageError, match="'path'"):
        path_choice("fast", keeps=True)
    with pytest.raises(UsageError, match="--no-resume"):
        path_choice("direct", keeps=False)


@pytest.mark.parametrize(
    ("direct", "url", "why"),
    [
        (None, "https://node:8001", ""),
        (None, "http://127.0.0.1:8001", ""),
        (None, "http://[::1]:8001", ""),
        (None, "http://node:8001", "serves no TLS"),
        (True, "http://node:8001", ""),
        (False, "https://node:8001", "--no-direct"),
        (False, "http://127.0.0.1:8001", "--no-direct"),
    ],
)
def test_a_runner_takes_users_where_it_serves_tls_or_is_on_their_machine_or_is_told_to(
    direct: bool | None, url: str, why: str
) -> None:
    said = _no_direct(RunnerOptions(Path("state"), "http://host:8000", direct=direct), url)
    assert why in said
    assert bool(why) == bool(said)


def test_the_live_line_says_which_path_the_connections_have() -> None:
    through = Stats(1, 1, 0, 0, 0, 0, 0)
    assert "by the host | " in forward_view.status_line(through, through, 1.0)
    assert "direct | " in forward_view.status_line(through, replace(through, direct=1), 1.0)


def test_a_straight_path_that_is_lost_or_comes_back_is_said_in_one_line_and_its_begin_in_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = forward_view.PlainView("lab")
    view.show(PathTaken("lab", "host", "its node serves no TLS", 0))
    view.show(PathTaken("lab", "direct", "", 0))
    view.show(PathTaken("lab", "host", "its node does not answer", 1))
    view.show(PathTaken("lab", "host", "nobody answers", 1))
    view.show(PathTaken("lab", "direct", "", 12))
    view.show(PathTaken("lab", "host", "its node has ended", 0))
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == [
        "Through the host again, since its node does not answer: 1 connection goes on.",
        "Straight to the node of lab again: 12 connections go on.",
        "Through the host again, since its node has ended.",
    ]
    assert PathTaken("lab", "direct", "", 12).to_json() == {
        "event": "path", "task": "lab", "path": "direct", "reason": "", "connections": 12,
    }  # fmt: skip


class Wire:
    """A link as `Silence` sees it, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self.answers = True
        self.out = self.watch = self
        self.given = self.received = 0
        self._silence = Silence(cast(Any, self), lambda: self.now)

    def send_message(self, *_: Any, urgent: bool) -> None:
        assert urgent
        self.asked += 1
        self.given += 8
        if self.answers:
            self.received += 8

    def passes(self, seconds: float) -> float | None:
        """Have time pass; when it is over with the link, if it is."""
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now += LOOK
            if self._silence.look():
                return self.now
        return None


def test_a_link_is_given_up_where_what_came_last_is_no_answer_to_what_was_sent_long_before() -> None:
    wire = Wire()
    wire.given += 1000
    wire.passes(3 * LOOK)
    wire.answers = False
    wire.received += 1000  # it was on its way, and is the last
    assert wire.passes(2) == pytest.approx(3 * LOOK + LOOK + QUIET + PATIENCE, abs=2 * LOOK)


def test_a_link_on_which_nothing_is_sent_is_asked_a_few_times_and_then_left_alone() -> None:
    wire = Wire()
    assert wire.passes(60) is None
    assert wire.asked == QUESTIONS
    wire.received += 10  # as the other side's question whether somebody is there
    assert wire.passes(60) is None
    assert wire.asked == QUESTIONS
    wire.given += 10
    assert wire.passes(LOOK) is None
    assert wire.asked == QUESTIONS  # the answer may well come by itself
    assert wire.passes(60) is None
    assert wire.asked == 2 * QUESTIONS


def test_a_link_that_was_quiet_for_long_is_given_up_when_what_is_sent_then_has_no_answer() -> None:
    wire = Wire()
    wire.passes(60)
    wire.answers = False
    began = wire.now
    ended = None
    while ended is None and wire.now < began + 10:
        wire.given += 100  # on and on
        ended = wire.passes(LOOK)
    assert ended is not None
    assert QUIET + PATIENCE <= ended - began <= QUIET + PATIENCE + 3 * LOOK


def test_a_look_that_comes_late_gives_up_nothing() -> None:
    wire = Wire()
    wire.given += 100
    wire.answers = False
    for _ in range(10):
        wire.now += QUIET  # this machine was asleep, or busy
        assert wire.passes(LOOK) is None
