from __future__ import annotations

import time
from pathlib import Path

import jwt
import pytest

from kohakuriver.errors import NotAllowedError, UnauthenticatedError, UnavailableError
from kohakuriver.session import ticket
from kohakuriver.session.ticket import UsedTickets

KEY = b"k" * 32
OTHER_KEY = b"o" * 32


def forward_ticket(**changes: object) -> str:
    values: dict[str, object] = {"node": "n1", "scope": "forward", "task": 7, "container": "vm-7", "user": "ann"}
    return ticket.issue(KEY, **(values | changes))  # type: ignore[arg-type]


def signed(**changes: object) -> str:
    claims: dict[str, object] = {
        "aud": "n1",
        "iat": int(time.time()),
        "exp": int(time.time()) + 60,
        "jti": "x",
        "scope": "control",
    }
    return jwt.encode({k: v for k, v in (claims | changes).items() if v is not None}, KEY, algorithm="HS256")


def test_a_ticket_says_what_it_was_issued_for() -> None:
    got = ticket.check(KEY, forward_ticket(ports=[80, 443]), node="n1", scope="forward")
    assert (got.task, got.container, got.user, got.ports) == (7, "vm-7", "ann", frozenset({80, 443}))
    assert 0 < got.expires_at - time.time() <= 60


def test_a_ticket_for_named_ports_allows_no_other() -> None:
    got = ticket.check(KEY, forward_ticket(ports=[80]), node="n1", scope="forward")
    assert got.allows(80)
    assert not got.allows(81)


def test_a_ticket_without_named_ports_allows_any() -> None:
    assert ticket.check(KEY, forward_ticket(), node="n1", scope="forward").allows(65535)


def test_two_tickets_are_never_the_same() -> None:
    assert forward_ticket() != forward_ticket()


@pytest.mark.parametrize(("node", "scope"), [("n2", "forward"), ("n1", "control")])
def test_a_ticket_is_good_for_its_node_and_purpose_alone(node: str, scope: ticket.Scope) -> None:
    with pytest.raises(NotAllowedError) as caught:
        ticket.check(KEY, forward_ticket(), node=node, scope=scope)
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("forged", "scope"),
    [
        ("", "control"),
        ("no.ticket.at-all", "control"),
        (ticket.issue(OTHER_KEY, node="n1", scope="control"), "control"),
        (signed(exp=None), "control"),
        (signed(jti=None), "control"),
        (signed(aud=None), "control"),
        (jwt.encode({"aud": "n1", "scope": "control"}, "", algorithm="none"), "control"),
        (signed(scope="forward"), "forward"),
        (signed(scope="forward", task=1, container="c", user="u", ports=["x"]), "forward"),
        (signed(scope="forward", task=1, container="c", user="u", ports=5), "forward"),
    ],
)
def test_what_the_host_did_not_sign_as_a_ticket_is_refused(forged: str, scope: ticket.Scope) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        ticket.check(KEY, forged, node="n1", scope=scope)
    assert caught.value.status == 401


def test_a_ticket_that_has_run_out_is_refused() -> None:
    with pytest.raises(UnauthenticatedError, match="run out"):
        ticket.check(KEY, signed(exp=int(time.time()) - 31), node="n1", scope="control")


def test_a_ticket_from_the_future_is_refused() -> None:
    with pytest.raises(UnauthenticatedError, match="future"):
        ticket.check(KEY, signed(iat=int(time.time()) + 90), node="n1", scope="control")


def test_clocks_that_differ_by_some_seconds_are_no_obstacle() -> None:
    early, late = signed(iat=int(time.time()) + 20), signed(exp=int(time.time()) - 20)
    for slightly_off in (early, late):
        assert ticket.check(KEY, slightly_off, node="n1", scope="control").scope == "control"


@pytest.mark.parametrize("ttl", [0, -1, 61])
def test_no_ticket_lives_longer_than_a_minute(ttl: float) -> None:
    with pytest.raises(ValueError, match="60"):
        ticket.issue(KEY, node="n1", scope="control", ttl=ttl)


def test_a_forward_ticket_without_a_container_can_not_be_issued() -> None:
    with pytest.raises(ValueError, match="container"):
        ticket.issue(KEY, node="n1", scope="forward", task=1, user="ann")


def test_a_ticket_that_would_be_good_for_longer_than_a_minute_is_refused_whoever_signed_it() -> None:
    with pytest.raises(UnauthenticatedError, match="60 s"):
        ticket.check(KEY, signed(exp=int(time.time()) + 61), node="n1", scope="control")


def test_a_control_ticket_says_which_container_it_is_about() -> None:
    about = ticket.issue(KEY, node="n1", scope="control", container="c1")
    assert ticket.check(KEY, about, node="n1", scope="control").container == "c1"
    about_none = ticket.issue(KEY, node="n1", scope="control")
    assert ticket.check(KEY, about_none, node="n1", scope="control").container is None


def checked(**changes: object) -> ticket.Ticket:
    return ticket.check(KEY, forward_ticket(**changes), node="n1", scope="forward")


def test_a_ticket_is_taken_once_also_by_a_runner_that_was_started_again(tmp_path: Path) -> None:
    first, second = checked(), checked()
    used = UsedTickets(tmp_path / "used")
    used.take(first)
    with pytest.raises(UnauthenticatedError, match="used before"):
        used.take(first)
    # No close(): the runner was killed.
    again = UsedTickets(tmp_path / "used")
    with pytest.raises(UnauthenticatedError, match="used before"):
        again.take(first)
    again.take(second)
    for tickets in (used, again):
        tickets.close()


def test_used_tickets_are_forgotten_once_they_have_run_out_here_and_on_disk(tmp_path: Path) -> None:
    now = time.time()
    used = UsedTickets(tmp_path / "used", clock=lambda: now)
    for _ in range(50):
        used.take(checked())
    assert len((tmp_path / "used").read_text().splitlines()) == 50
    now += 120
    used.take(checked())
    used.close()
    assert len((tmp_path / "used").read_text().splitlines()) == 1


def test_more_tickets_than_can_be_remembered_are_refused_rather_than_forgotten(tmp_path: Path) -> None:
    used = UsedTickets(tmp_path / "used", most=3)
    taken = [checked() for _ in range(3)]
    for each in taken:
        used.take(each)
    with pytest.raises(UnavailableError, match="too many"):
        used.take(checked())
    with pytest.raises(UnauthenticatedError):
        used.take(taken[0])
    used.close()


def test_a_damaged_file_of_used_tickets_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "used").write_bytes(b"\xff\x00 nonsense\n\n1 x y z\n")
    used = UsedTickets(tmp_path / "used")
    used.take(checked())
    used.close()
