"""What a forward is made of, and how its view tells of it."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

import kohakuriver
from kohakuriver import runtime
from kohakuriver.cli import forward_view, output
from kohakuriver.client import forward as forwarding
from kohakuriver.client.forward import (
    Event,
    Gone,
    Listening,
    NotListening,
    OutOfDescriptors,
    PortForward,
    Reconnecting,
    Resumed,
    Stats,
    StreamError,
    parse_port,
)
from kohakuriver.errors import UsageError
from kohakuriver.tunnel.protocol import CloseCode
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.user_endpoint import UserEndpoint

NOTHING = Stats(streams=0, opened=0, bytes_sent=0, bytes_received=0, udp_dropped=0, stalls=0, unknown_messages=0)


@pytest.mark.parametrize(
    ("spec", "port"),
    [
        (8888, PortForward(8888, 8888)),
        ("8888", PortForward(8888, 8888)),
        ("0:8888", PortForward(0, 8888)),
        ("9999:8888", PortForward(9999, 8888)),
        ("5060/udp", PortForward(5060, 5060, "udp")),
        ("0:5060/udp", PortForward(0, 5060, "udp")),
        ("1:65535/tcp", PortForward(1, 65535)),
        ("unix:/a/x.sock:80", PortForward(0, 80, "tcp", "/a/x.sock")),
        ("unix:a:b:80/tcp", PortForward(0, 80, "tcp", "a:b")),
    ],
)
def test_a_port_is_remote_or_local_and_remote_and_may_say_its_protocol(spec: int | str, port: PortForward) -> None:
    assert parse_port(spec) == port


def test_the_protocol_that_a_port_names_beats_the_default() -> None:
    assert parse_port("53", proto="udp").proto == "udp"
    assert parse_port("53/tcp", proto="udp").proto == "tcp"


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "0",
        "-1",
        "65536",
        "x",
        ":80",
        "80:",
        "1:2:3",
        "80/",
        "80/icmp",
        "٨٠",
        "1" * 5000,
        "unix:80",
        "unix::80",
        "unix:/x:",
        "unix:/x:0:",
        "unix:/x:80/udp",
    ],
)
def test_what_is_no_port_is_refused(spec: str) -> None:
    with pytest.raises(UsageError):
        parse_port(spec)


@pytest.mark.parametrize(
    ("host", "open_to_others"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True),
     ("10.1.2.3", True), ("my-name", True)],
)  # fmt: skip
def test_only_loopback_keeps_other_machines_out(host: str, open_to_others: bool) -> None:
    assert forwarding.exposes(host) is open_to_others


def test_a_fixed_local_port_goes_with_one_remote_port_only() -> None:
    with pytest.raises(UsageError, match="one remote port"):
        kohakuriver.forward("t", [1, 2], local_port=9)


def test_a_forward_that_is_not_open_says_so() -> None:
    with pytest.raises(UsageError, match="not open"):
        _ = kohakuriver.forward("t", 80).local_port
    assert repr(kohakuriver.forward("t", 80)) == repr(kohakuriver.forward_sync("t", 80)) == "<forward to t: not open>"


def test_the_line_that_scripts_wait_for_is_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.PlainView("my-task")
    view.show(Listening("127.0.0.1", 8888, 80, "tcp"))
    view.show(Listening("::1", 5060, 5060, "udp"))
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "Forwarding 127.0.0.1:8888 -> my-task:80 (tcp)",
        "Forwarding [::1]:5060 -> my-task:5060 (udp)",
    ]
    assert captured.err == ""


def test_beside_a_command_stdout_is_left_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    forward_view.PlainView("t", beside_command=True).show(Listening("127.0.0.1", 1, 2, "tcp"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Forwarding" in captured.err


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr, without the time that each begins with."""
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    return [line[9:] for line in lines]


def test_people_read_the_tasks_name_and_no_symbols(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.PlainView("lab")
    view.show(StreamError(80, "ENOTCONN: the connection to the host is lost"))
    view.show(Reconnecting("the tunnel of kohakuriver-vps-9338324824 is not connected", 0.1))
    view.show(OutOfDescriptors(3))
    view.show(NotListening("::1", 80, "another program listens there"))
    assert said(capsys) == [
        "lab:80: the connection to the host is lost",
        "Reconnecting: the tunnel of lab is not connected",
        "Out of file descriptors, 3 connections wait: raise the limit (ulimit -n), or close some.",
        "[::1]:80 does not lead to lab: another program listens there; what opens `localhost` may get that.",
    ]


def test_the_second_loopback_address_is_no_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.PlainView("lab")
    view.show(Listening("127.0.0.1", 80, 80, "tcp"))
    view.show(Listening("::1", 80, 80, "tcp"))
    assert capsys.readouterr().out == "Forwarding 127.0.0.1:80 -> lab:80 (tcp)\n"


def test_the_same_failure_again_and_again_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.PlainView("t")
    for _ in range(100):
        view.show(StreamError(80, "ECONNREFUSED: nothing listens on port 80 in the task"))
    view.show(StreamError(81, "ECONNREFUSED: nothing listens on port 81 in the task"))
    assert said(capsys) == [
        "t:80: nothing listens on port 80 in the task",
        "t:81: nothing listens on port 81 in the task",
    ]


def test_a_failure_that_comes_back_later_is_said_with_how_often_it_happened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    view = forward_view.PlainView("t")
    for _ in range(4):
        view.show(StreamError(80, "it broke"))
    now += 60
    view.show(StreamError(80, "it broke"))
    assert said(capsys) == ["t:80: it broke", "t:80: it broke (3 more like this)"]


def test_what_waits_for_the_host_is_said_once_and_so_is_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.PlainView("t")
    for reason in ("lost", "refused", "refused"):
        view.show(Reconnecting(reason, 0.1, waiting=12))
    view.show(Resumed("t", 2, waiting=12, seconds=8.2))
    assert said(capsys) == [
        "Connection to the host lost: 12 connections wait.",
        "Back after 8 s: 12 connections go on.",
    ]


def test_what_was_lost_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.PlainView("t")
    view.show(Reconnecting("the task's tunnel went away", 0.1, waiting=12, lost="task"))
    view.show(Resumed("t", 2, waiting=12, seconds=0.4))
    assert said(capsys)[0] == "The task's tunnel went away: 12 connections wait."


@pytest.mark.parametrize(
    ("code", "reason", "lost"),
    [
        (CloseCode.SERVICE_RESTART, "the task's tunnel went away", "task"),
        (CloseCode.GOING_AWAY, "the runner is shutting down", "task"),
        (CloseCode.INTERNAL_ERROR, "the connection to the task's node was lost", "task"),
        (CloseCode.GOING_AWAY, "the host is shutting down", "host"),
        (CloseCode.GOING_AWAY, "the server is shutting down", "host"),
        (CloseCode.ABNORMAL, "", "host"),
        (CloseCode.ABNORMAL, "no answer to a ping for 20 s", "host"),
    ],
)
def test_it_is_the_host_that_was_lost_unless_it_said_that_something_behind_it_was(
    code: CloseCode, reason: str, lost: str
) -> None:
    link: Any = SimpleNamespace(closing=SimpleNamespace(code=int(code), reason=reason))
    assert forwarding._lost(link) == lost
    assert forwarding._lost(None) == "host"


def test_nothing_is_said_again_of_a_link_that_comes_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.PlainView("t")
    for _ in range(5):
        view.show(Reconnecting("lost", 0.0, waiting=1))
        view.show(Resumed("t", 2, waiting=1, seconds=0.3))
    assert said(capsys) == [
        "Connection to the host lost: 1 connection waits.",
        "Back after 0 s: 1 connection goes on.",
    ]


def test_reconnecting_is_said_once_per_reason(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.PlainView("t")
    for reason in ("lost", "lost", "lost", "refused"):
        view.show(Reconnecting(reason, 0.1))
    view.show(Resumed("t", 2))
    view.show(Reconnecting("refused", 0.1))
    assert said(capsys) == [
        "Reconnecting: lost", "Reconnecting: refused", "Connected again.", "Reconnecting: refused",
    ]  # fmt: skip


def test_json_is_one_event_a_line_and_statistics_only_when_they_change(capsys: pytest.CaptureFixture[str]) -> None:
    view = forward_view.JsonView()
    view.show(Listening("127.0.0.1", 8888, 80, "tcp"))
    view.tick(NOTHING)
    view.tick(NOTHING)
    listening, stats = map(json.loads, capsys.readouterr().out.splitlines())
    assert listening == {
        "event": "listening", "local_host": "127.0.0.1", "local_port": 8888, "remote_port": 80, "proto": "tcp",
    }  # fmt: skip
    assert stats["event"] == "stats"


def test_events_of_several_forwards_tell_of_which_they_are_and_statistics_are_of_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    views = forward_view.views_for(["one", "two"], json=True, beside_command=False)
    together = forward_view.Together(views)
    views[1].show(Listening("127.0.0.1", 8888, 80, "tcp"))
    together.tick(NOTHING)
    listening, stats = map(json.loads, capsys.readouterr().out.splitlines())
    assert listening["task"] == "two"
    assert "task" not in stats


def test_lines_of_several_forwards_share_the_live_line_below_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "paints", lambda stream: True)
    monkeypatch.setattr(output, "draws", lambda stream: True)
    views = forward_view.views_for(["one", "two"], json=False, beside_command=False)
    together = forward_view.Together(views)
    together.tick(NOTHING)
    together.tick(NOTHING)
    views[1].show(Listening("127.0.0.1", 8888, 80, "tcp"))
    drawn = capsys.readouterr().out
    assert "0 open" in drawn
    assert f"{forward_view.CLEAR}Forwarding 127.0.0.1:8888 -> two:80 (tcp)" in drawn


def test_a_unix_socket_is_told_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    event = Listening("", 0, 80, "tcp", None, "/run/x.sock")
    assert event.to_json() == {
        "event": "listening", "local_path": "/run/x.sock", "remote_port": 80, "proto": "tcp",
    }  # fmt: skip
    forward_view.PlainView("t").show(event)
    assert capsys.readouterr().out == "Forwarding unix:/run/x.sock -> t:80 (tcp)\n"


def test_the_live_line_says_streams_and_rates() -> None:
    later = Stats(2, 5, 1000, 3_000_000, 0, 0, 0)
    line = forward_view.status_line(NOTHING, later, 2.0)
    assert "2 open, 5 so far" in line
    assert "down 1.5 MB/s, up 500 B/s" in line


@pytest.mark.parametrize(
    ("columns", "shown"),
    [(10, "one | two"), (9, "one | two"), (8, "one"), (3, "one"), (2, "on"), (99, "one | two | three")],
)
def test_what_has_no_room_in_the_live_line_is_left_out_whole(columns: int, shown: str) -> None:
    assert forward_view.fitting("one | two | three", columns) == shown


def test_what_is_shown_holds_up_nobody_and_keeps_its_order() -> None:
    shown: list[Event] = []
    held = threading.Event()

    class Slow(forward_view.View):
        def show(self, event: Event) -> None:
            held.wait()
            shown.append(event)

    view = forward_view.Aside(Slow())
    failures: list[Event] = [StreamError(number, "it broke") for number in range(2 * forward_view.MOST_WAITING)]
    with view:
        for failure in failures:
            view.tell(failure)
        held.set()
    # The thread may take its first one only after some were left out, and then there is room for one more.
    places = [failures.index(event) for event in shown]
    assert places == sorted(places)
    assert len(shown) >= forward_view.MOST_WAITING
    assert len(shown) + view.left_out >= len(failures)


def test_once_the_host_has_been_away_for_a_minute_a_connection_is_reset_at_once() -> None:
    failed: list[str] = []

    async def connect() -> None:
        config = EndpointConfig(reattach_wait=3600.0, outage=0.0)  # the minute is over
        endpoint = UserEndpoint(config=config, on_stream_error=lambda port, text: failed.append(str(text)))
        listening = await endpoint.listen_tcp("127.0.0.1", 0, 80)
        reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        await endpoint.close()

    runtime.run(asyncio.wait_for(connect(), 20))
    assert failed == ["ENOTCONN: the connection to the host is lost"]
    assert EndpointConfig().outage == 60.0


def test_the_package_shows_what_it_offers_and_with_which_parameters() -> None:
    assert {name for name in dir(kohakuriver) if not name.startswith("_")} <= set(kohakuriver.__all__)
    assert {"forward", "forward_sync", "Forward"} <= set(dir(kohakuriver))
    parameters = inspect.signature(kohakuriver.forward).parameters
    assert inspect.signature(kohakuriver.forward_sync).parameters == parameters
    assert all(
        f"`{name}`" in (kohakuriver.forward_sync.__doc__ or "") for name in ("task", "ports", "token", "on_event")
    )


def test_a_port_that_goes_is_told_once_of_both_addresses_and_again_when_it_comes_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = forward_view.PlainView("lab")
    for _ in range(2):
        for host in ("127.0.0.1", "::1"):
            view.show(Listening(host, 40000, 8888, "tcp", 8888))
        for host in ("127.0.0.1", "::1"):
            view.show(Gone(host, 40000, 8888, "tcp"))
    assert (
        capsys.readouterr().out.splitlines()
        == [
            "Forwarding 127.0.0.1:40000 -> lab:8888 (tcp), since 8888 can't be had",
            "No longer forwarding 127.0.0.1:40000 -> lab:8888 (tcp)",
        ]
        * 2
    )


def test_an_event_has_the_port_that_was_wanted_only_where_it_is_another() -> None:
    assert "instead_of" not in Listening("::1", 1, 1, "tcp").to_json()
    assert Listening("::1", 2, 1, "tcp", 1).to_json()["instead_of"] == 1
