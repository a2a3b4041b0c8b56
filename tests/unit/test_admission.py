"""What a session may open: a user's rate holds over all of their sessions."""

from __future__ import annotations

from typing import Any

import pytest

from kohakuriver.limits import Limits
from kohakuriver.relay.admission import Admission, ConnectRates, OpenStreams
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.protocol import PROTO_TERMINAL, PROTO_UDP


def ticket(user: str, connects: int | None = None) -> Ticket:
    about: dict[str, Any] = {"task": 1, "container": "c", "user": user, "connects": connects}
    return Ticket(node="n", scope="forward", id="x", expires_at=0, **about)


@pytest.fixture
def now() -> list[float]:
    return [0.0]


def session(rates: ConnectRates, user: str | None, connects: int | None = None) -> Admission:
    shown = None if user is None else ticket(user, connects)
    return Admission(Limits(max_connects=rates.rate), rates, shown, None)


def opened(admission: Admission, tries: int) -> int:
    return sum(admission.refusal(80, 0) is None for _ in range(tries))


def test_a_terminal_is_opened_in_its_own_session_alone_and_once() -> None:
    rates = ConnectRates(0)
    forward = Admission(Limits(), rates, ticket("ann"), None)
    terminal = Admission(Limits(), rates, ticket("ann"), None, terminal=True)
    assert forward.refusal(0, 0, PROTO_TERMINAL) is not None
    assert terminal.refusal(0, 0, PROTO_TERMINAL) is None
    for refused in (terminal.refusal(80, 0), terminal.refusal(0, 0, PROTO_UDP), terminal.refusal(0, 1, PROTO_TERMINAL)):
        assert refused is not None


def test_the_sessions_of_one_user_share_one_rate_also_one_after_the_other(now: list[float]) -> None:
    rates = ConnectRates(10, lambda: now[0])
    assert [opened(session(rates, "eve"), 4) for _ in range(5)] == [4, 4, 2, 0, 0]
    assert opened(session(rates, "ann"), 20) == 10
    now[0] = 0.5
    assert opened(session(rates, "eve"), 20) == 5


def test_what_a_user_took_is_not_forgotten_when_others_come(now: list[float]) -> None:
    rates = ConnectRates(10, lambda: now[0])
    assert opened(session(rates, "eve"), 20) == 10
    for other in range(100):
        assert opened(session(rates, f"user{other}"), 1) == 1
    assert opened(session(rates, "eve"), 20) == 0


def test_sessions_of_nobody_in_particular_have_a_rate_each() -> None:
    rates = ConnectRates(10, lambda: 0.0)
    assert [opened(session(rates, None), 20) for _ in range(2)] == [10, 10]


def test_a_rate_of_nothing_is_no_limit() -> None:
    assert opened(session(ConnectRates(0), "eve"), 10_000) == 10_000


def test_the_rate_that_a_ticket_names_goes_before_the_runners_own(now: list[float]) -> None:
    rates = ConnectRates(10, lambda: now[0])
    assert opened(session(rates, "ann", 3), 20) == 3
    assert opened(session(rates, "bob", 0), 1000) == 1000
    refusal = session(rates, "ann", 3).refusal(80, 0)
    assert refusal is not None
    assert "more than 3 connections a second" in refusal.message


def test_a_user_whose_rate_is_another_one_now_gets_no_second_burst_by_that(now: list[float]) -> None:
    rates = ConnectRates(10, lambda: now[0])
    assert opened(session(rates, "ann", 10), 20) == 10
    assert [opened(session(rates, "ann", rate), 20) for rate in (100, 10, 100)] == [0, 0, 0]
    now[0] = 1.0
    assert opened(session(rates, "ann", 100), 200) == 100


def of(user: str, streams: OpenStreams) -> Admission:
    return Admission(Limits(max_connects=0), ConnectRates(0), ticket(user), None, streams)


def fills(admission: Admission, tries: int) -> int:
    """How many streams a session gets that ends none."""
    for have in range(tries):
        if admission.refusal(80, have) is not None:
            return have
        admission.count(have + 1)
    return tries


def test_the_streams_of_a_user_are_bounded_over_all_sessions_and_those_that_end_make_room() -> None:
    streams = OpenStreams(share=10)
    first, second = of("eve", streams), of("eve", streams)
    assert [fills(first, 7), fills(second, 7), fills(of("ann", streams), 7)] == [7, 3, 7]
    refusal = second.refusal(80, 3)
    assert refusal is not None
    assert str(refusal) == "EMFILE: your forwards have 10 connections open on this node, which is as many as it allows"
    first.count(0)
    assert streams.total == 10
    assert second.refusal(80, 3) is None


def test_where_a_node_has_as_many_streams_as_it_allows_who_has_few_still_gets_some() -> None:
    streams = OpenStreams(most=100)
    assert fills(of("eve", streams), 1000) == 100
    assert fills(of("ann", streams), 1000) == 100 // 2
    assert fills(of("bob", streams), 1000) == 100 // 3 + 1
    assert of("eve", streams).refusal(80, 0) is not None
    assert streams.total < 2 * 100
