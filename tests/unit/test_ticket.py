from __future__ import annotations

import time

import jwt
import pytest

from kohakuriver.errors import NotAllowedError, UnauthenticatedError
from kohakuriver.tunnel import ticket

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
