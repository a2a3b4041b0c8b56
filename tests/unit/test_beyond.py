"""What leads beyond a task: how it is said on a command line and on the wire, and who may have it."""

from __future__ import annotations

import pytest

from kohakuriver.client.beyond import Address, Back, parse_address, parse_back
from kohakuriver.errors import UsageError
from kohakuriver.limits import Limits
from kohakuriver.relay.admission import Admission, ConnectRates
from kohakuriver.tunnel.ports import beyond_of
from kohakuriver.tunnel.protocol import PROTO_TCP, PROTO_TERMINAL
from kohakuriver.tunnel.terminal import LIST_SESSIONS, Start, beyond, beyond_in


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5432:db.internal:5432", Address(5432, "db.internal", 5432)),
        ("0:10.0.0.7:80", Address(0, "10.0.0.7", 80)),
        ("9000:[2001:db8::1]:80", Address(9000, "2001:db8::1", 80)),
        *((other, None) for other in ("8888", "9999:8888", "53/udp", "unix:/a:80", "1:2:3", "1:a/b:3")),
    ],
)
def test_an_address_has_a_local_port_a_host_and_a_port(text: str, expected: Address | None) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9000", Back(9000, "127.0.0.1", 9000)),
        ("9000:3000", Back(9000, "127.0.0.1", 3000)),
        ("27000:licence.example.org:27001", Back(27000, "licence.example.org", 27001)),
        ("9000:[::1]:3000", Back(9000, "::1", 3000)),
    ],
)
def test_a_way_back_has_a_port_of_the_task_and_one_here(text: str, expected: Back) -> None:
    assert parse_back(text) == expected


@pytest.mark.parametrize("text", ["0:80", "9000:", "a:80", "9000:70000", "1:2:3:4", "9000:h", ""])
def test_what_is_no_way_back_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"^.*(REMOTE:LOCAL|out of range).*\.$"):
        parse_back(text)


def test_a_port_of_an_address_that_can_not_be_is_refused() -> None:
    with pytest.raises(UsageError, match="out of range"):
        parse_address("0:db:65536")


def test_a_start_tells_which_way_it_leads_and_where_to() -> None:
    onward, back = beyond("to", "db", "5432"), beyond("on", "9000")
    assert (beyond_in(onward), beyond_in(back)) == ("to", "on")
    assert Start.command_in(onward) == ["forward", "to", "db", "5432"]
    assert not any(map(beyond_in, (b"", LIST_SESSIONS, Start(["to", "db", "1"]).to_bytes(), Start().for_files())))
    assert beyond_in(onward[:1]) == "?"


@pytest.mark.parametrize(("query", "way"), [({}, ""), ({"beyond": "to"}, "to"), ({"beyond": "on"}, "on")])
def test_a_sessions_url_says_which_way_it_is_for(query: dict[str, str], way: str) -> None:
    assert beyond_of(query) == way
    with pytest.raises(UsageError, match="to or on"):
        beyond_of({"beyond": "both"})


def test_a_session_that_leads_beyond_has_many_streams_and_no_port() -> None:
    rates = ConnectRates(0)
    admission = Admission(Limits(), rates, None, None, terminal=True, beyond="to")
    assert admission.refusal(0, 5, PROTO_TERMINAL) is None
    assert admission.refusal(80, 0, PROTO_TCP) is not None
    assert Admission(Limits(), rates, None, None, terminal=True).refusal(0, 1, PROTO_TERMINAL) is not None
