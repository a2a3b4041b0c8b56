"""What leads beyond a task: how it is said on a command line and on the wire, and who may have it."""

from __future__ import annotations

import socket
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kohakuriver._frame import FrameViolation
from kohakuriver.cli.on_connect import ports_in_environment
from kohakuriver.client.beyond import Address, Back, Reversed, by_kind, parse_address, parse_back
from kohakuriver.client.forward import Listening
from kohakuriver.errors import UnavailableError, UsageError
from kohakuriver.host.services.tunnel_proxy import ProxySession
from kohakuriver.limits import Limits
from kohakuriver.relay.admission import Admission, ConnectRates
from kohakuriver.tunnel.local_listeners import ListeningSocket
from kohakuriver.tunnel.ports import beyond_of
from kohakuriver.tunnel.protocol import PROTO_TCP, PROTO_TERMINAL
from kohakuriver.tunnel.terminal import LIST_SESSIONS, Start, beyond_in


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5432:db.internal:5432", Address(5432, "db.internal", 5432)),
        ("0:10.0.0.7:80", Address(0, "10.0.0.7", 80)),
        ("9000:[2001:db8::1]:80", Address(9000, "2001:db8::1", 80)),
        ("unix:./db.sock:db.internal:5432", Address(0, "db.internal", 5432, path="./db.sock")),
        ("2375:unix:/var/run/docker.sock", Address(2375, socket="/var/run/docker.sock")),
        ("0:unix:/run/a:b c.sock", Address(0, socket="/run/a:b c.sock")),
        ("unix:./d.sock:unix:/run/d.sock", Address(0, socket="/run/d.sock", path="./d.sock")),
        *((other, None) for other in ("8888", "9999:8888", "53/udp", "unix:/a:80", "1:2:3", "1:a/b:3")),
    ],
)
def test_an_address_leads_to_a_host_with_a_port_or_to_a_socket_of_the_task(text: str, expected: Address | None) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9000", Back(9000, "127.0.0.1", 9000)),
        ("9000:3000", Back(9000, "127.0.0.1", 3000)),
        ("27000:licence.example.org:27001", Back(27000, "licence.example.org", 27001)),
        ("9000:[::1]:3000", Back(9000, "::1", 3000)),
        ("6010:unix:/tmp/.X11-unix/X0", Back(6010, path="/tmp/.X11-unix/X0")),
        ("unix:/run/a.sock:unix:./b:c.sock", Back(0, socket="/run/a.sock", path="./b:c.sock")),
        ("unix:/run/a.sock:3000", Back(0, "127.0.0.1", 3000, "/run/a.sock")),
        ("unix:/run/a.sock:licence.example.org:3000", Back(0, "licence.example.org", 3000, "/run/a.sock")),
    ],
)
def test_a_way_back_has_a_port_of_the_task_and_one_here(text: str, expected: Back) -> None:
    assert parse_back(text) == expected


@pytest.mark.parametrize("text", ["0:80", "9000:", "a:80", "9000:70000", "1:2:3:4", "9000:h", ""])
def test_what_is_no_way_back_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"^.*(REMOTE:LOCAL|out of range).*\.$"):
        parse_back(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unix:a.sock:80", "must begin with a slash"),
        ("unix:/run/a.sock", "does not say where /run/a.sock leads to here"),
        ("unix::80", "must begin with a slash"),
        ("9000:unix:", "lacks the path"),
    ],
)
def test_a_way_back_by_a_socket_that_can_not_be_is_refused_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_back(text)


@pytest.mark.parametrize("text", ["0:unix:", "0:unix:run/docker.sock", "unix:./a:unix:b"])
def test_a_socket_of_the_task_is_named_by_all_of_its_path(text: str) -> None:
    with pytest.raises(UsageError, match=r"is one in the task: it must begin with a slash\.$"):
        parse_address(text)


def test_sockets_and_other_addresses_have_sessions_of_their_own() -> None:
    socket, other, another = Address(1, socket="/a"), Address(2, "h", 1), Address(3, "h", 2)
    assert by_kind([other, socket, another]) == [[other, another], [socket]]
    assert by_kind([]) == []


def test_events_name_sockets_by_their_paths_and_no_ports() -> None:
    listening = Listening("127.0.0.1", 2375, 0, "tcp", remote_path="/run/d.sock")
    assert listening.to_json() == {
        "event": "listening", "local_host": "127.0.0.1", "local_port": 2375, "proto": "tcp",
        "remote_path": "/run/d.sock",
    }  # fmt: skip
    back = Back(0, socket="/run/a.sock", path="b.sock")
    assert Reversed.of(back).to_json() == {"event": "reversed", "remote_path": "/run/a.sock", "local_path": "b.sock"}


def test_a_command_finds_a_socket_of_the_task_by_its_name() -> None:
    with socket.socket() as sock:
        made = partial(ListeningSocket, "127.0.0.1", 2375, 0, "tcp", sock.close, sock)
        assert ports_in_environment([made(remote_path="/run/docker.sock")]) == {
            "KOHAKURIVER_PORT_DOCKER_SOCK": "2375", "KOHAKURIVER_PORT_DOCKER_SOCK_TCP": "2375",
        }  # fmt: skip
        there = made(path="/tmp/5432", remote_path="/run/.s.PGSQL.5432")
        assert ports_in_environment([there]) == {"KOHAKURIVER_SOCKET_S_PGSQL_5432": "/tmp/5432"}


def test_a_command_finds_sockets_of_one_name_by_all_of_their_paths() -> None:
    with socket.socket() as sock:
        paths = ["/run/a/api.sock", "/run/b/api.sock", "/run/\u6570"]
        found = ports_in_environment(
            [
                ListeningSocket("127.0.0.1", port, 0, "tcp", sock.close, sock, remote_path=path)
                for port, path in enumerate(paths, 1)
            ]
        )
    named = {name: port for name, port in found.items() if not name.endswith("_TCP")}
    assert named == {
        "KOHAKURIVER_PORT_RUN_A_API_SOCK": "1", "KOHAKURIVER_PORT_RUN_B_API_SOCK": "2", "KOHAKURIVER_PORT_RUN": "3",
    }  # fmt: skip


def test_a_start_that_can_not_be_written_down_ends_the_session() -> None:
    def need_room() -> None:
        raise UnavailableError("no room", code="too_many_requests", status=429)

    session = SimpleNamespace(_beyond="to", _told=set(), carried=SimpleNamespace(need_room=need_room))
    with pytest.raises(FrameViolation, match="more was asked for than can be written down"):
        ProxySession._started(cast("Any", session), Address(0, "db", 5432).start)


def test_a_port_of_an_address_that_can_not_be_is_refused() -> None:
    with pytest.raises(UsageError, match="out of range"):
        parse_address("0:db:65536")


def test_a_start_tells_which_way_it_leads_and_where_to() -> None:
    onward, back = Address(0, "db", 5432).start, Back(9000).start
    assert (beyond_in(onward), beyond_in(back)) == ("to", "on")
    assert Start.command_in(Address(0, socket="/run/a b").start) == ["forward", "at", "/run/a b"]
    assert Start.command_in(Back(0, socket="/run/a").start) == ["forward", "on", "/run/a"]
    assert Start.command_in(onward) == ["forward", "to", "db", "5432"]
    assert not any(map(beyond_in, (b"", LIST_SESSIONS, Start(["to", "db", "1"]).to_bytes(), Start().for_files())))
    assert beyond_in(onward[:1]) == "?"


@pytest.mark.parametrize(("query", "way"), [({}, ""), *(({"beyond": way}, way) for way in ("to", "at", "on"))])
def test_a_sessions_url_says_which_way_it_is_for(query: dict[str, str], way: str) -> None:
    assert beyond_of(query) == way
    with pytest.raises(UsageError, match="to, at or on"):
        beyond_of({"beyond": "both"})


def test_a_session_that_leads_beyond_has_many_streams_and_no_port() -> None:
    rates = ConnectRates(0)
    admission = Admission(Limits(), rates, None, None, terminal=True, beyond="to")
    assert admission.refusal(0, 5, PROTO_TERMINAL) is None
    assert admission.refusal(80, 0, PROTO_TCP) is not None
    assert Admission(Limits(), rates, None, None, terminal=True).refusal(0, 1, PROTO_TERMINAL) is not None
