"""What a session may open: a user's rate holds over all of their sessions."""

from __future__ import annotations

import pytest

from kohakuriver.limits import Limits
from kohakuriver.runner.services.admission import Admission, ConnectRates
from kohakuriver.session.ticket import Ticket


def ticket(user: str) -> Ticket:
    return Ticket(node="n", scope="forward", id="x", expires_at=0, task=1, container="c", user=user)


@pytest.fixture
def now() -> list[float]:
    return [0.0]


def session(rates: ConnectRates, user: str | None) -> Admission:
    return Admission(Limits(max_connects=rates.rate), rates, None if user is None else ticket(user), None)


def opened(admission: Admission, tries: int) -> int:
    return sum(admission.refusal(80, 0) is None for _ in range(tries))


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
