"""What host and runner have in common as HTTP programs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import signal
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fastapi import APIRouter

from kohakuriver.cli.pki import Authority
from kohakuriver.errors import KohakuRiverError, LocalAddressError
from kohakuriver.tls import ServerCertificate
from kohakuriver.tunnel.accept import serve_ws
from kohakuriver.web.app import bind, bind_with_loopback, new_app, print_event, socket_url, warn_if_in_clear
from kohakuriver.web.listener import ACCEPTED_AT_ONCE
from kohakuriver.web.logging import LONGEST_VALUE, configure_logging
from kohakuriver.web.repeats import REFUSALS_AT_ONCE, SECONDS, TUNNELS_AT_ONCE, Repeats, _Seen
from kohakuriver.web.server import Server
from tests.support.serving import a_server, serving

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_a_port_that_is_taken_is_named(taken_port: int) -> None:
    with pytest.raises(LocalAddressError, match=str(taken_port)):
        bind("127.0.0.1", taken_port)


@pytest.mark.parametrize("host", ["192.0.2.77", "no such name", "256.1.1.1"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(LocalAddressError, match=host):
        bind(host, 0)


def test_a_socket_on_every_address_is_reached_through_loopback() -> None:
    with bind("0.0.0.0", 0) as sock:
        assert socket_url(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize(
    ("host", "addresses"),
    [("127.0.0.1", ["127.0.0.1", "::1"]), ("0.0.0.0", ["0.0.0.0", "::1"]), ("::1", ["::1", "127.0.0.1"])],
)
def test_the_port_is_on_both_loopback_addresses_so_that_nobody_else_gets_what_browsers_send(
    host: str, addresses: list[str]
) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(sock) for sock in bind_with_loopback(host, 0)]
        assert [sock.getsockname()[0] for sock in socks] == addresses
        assert len({sock.getsockname()[1] for sock in socks}) == 1


def test_where_another_program_has_the_port_on_the_other_loopback_address_that_is_said() -> None:
    with bind("::1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LocalAddressError, match=f"::1:{port}"):
            bind_with_loopback("127.0.0.1", port)
    with bind("127.0.0.1", port) as free:
        assert free.getsockname()[1] == port


@pytest.mark.parametrize(("host", "said"), [("0.0.0.0", 1), ("127.0.0.1", 0), ("::1", 0)])
def test_plain_http_to_other_machines_is_warned_of(host: str, said: int, capsys: pytest.CaptureFixture[str]) -> None:
    with bind(host, 0) as sock:
        warn_if_in_clear(sock, None)
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("plain HTTP to other machines") == said


def test_a_program_ends_with_an_error_when_work_that_it_is_no_use_without_fails(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> None:
        raise RuntimeError("a bolt is loose")

    async def check() -> None:
        async def ready() -> None:
            server.keep(fail(), "holding the door")

        async def stop() -> None:
            pass

        server = Server(new_app("host", "1"), ws=serve_ws([]), on_ready=ready, on_stop=stop)
        await server.serve([bind("127.0.0.1", 0)])
        assert server.exit_code == 1

    run(check())
    captured = capsys.readouterr()
    assert "holding the door" in captured.out + captured.err
    assert "a bolt is loose" in captured.out + captured.err


def test_a_program_that_fails_when_it_listens_already_listens_no_more(run: Run) -> None:
    async def check() -> None:
        async def fail() -> None:
            raise KohakuRiverError("No.")

        sock = bind("127.0.0.1", 0)
        server = Server(new_app("host", "1"), ws=serve_ws([]), on_ready=fail, on_stop=fail)
        with pytest.raises(KohakuRiverError, match=r"^No\.$"):
            await server.serve([sock])
        assert sock.fileno() == -1

    run(check())


def test_lines_that_can_not_be_written_are_lost_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
        nowhere = io.TextIOWrapper(full, write_through=True)
        monkeypatch.setattr("sys.stderr", nowhere)
        monkeypatch.setattr("sys.stdout", nowhere)
        configure_logging()
        structlog.get_logger("kohakuriver.test").error("the disk is full")
        print_event("ready", False, "It is ready.")
        monkeypatch.undo()


def test_a_second_ctrl_c_ends_what_the_end_waits_for(run: Run) -> None:
    async def check() -> None:
        leaving, draining = asyncio.Event(), asyncio.Event()
        told: list[str] = []

        async def ready() -> None:
            signal.raise_signal(signal.SIGINT)

        async def wait(said: asyncio.Event, what: str) -> None:
            said.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                told.append(what)

        async def stop() -> None:
            await server.unless_hurried(wait(draining, "drain"))
            told.append("stopped")

        server = Server(
            new_app("host", "1"),
            ws=serve_ws([]),
            on_ready=ready,
            on_stop=stop,
            on_leave=lambda: wait(leaving, "leave"),
        )
        serving = asyncio.ensure_future(server.serve([bind("127.0.0.1", 0)]))
        await leaving.wait()
        assert not told
        signal.raise_signal(signal.SIGINT)
        await serving
        assert told == ["leave", "drain", "stopped"]
        assert server.exit_code == 0

    run(check())


def test_an_ipv6_address_stands_in_brackets() -> None:
    with bind("::1", 0) as sock:
        assert socket_url(sock, "https") == f"https://[::1]:{sock.getsockname()[1]}"


def test_the_routes_of_an_application_are_worked_out_once_however_often_it_is_made() -> None:
    router = APIRouter(prefix="/api")
    router.add_api_route("/one", lambda: {})
    for _ in range(2):
        assert router.routes[0] in new_app("host", "1", routers=[router]).routes


def test_a_crash_answers_with_a_sentence_and_no_traceback(run: Run) -> None:
    async def check() -> None:
        app = new_app("host", "1")

        @app.get("/crash")
        async def crash() -> None:
            raise ZeroDivisionError("secret detail")

        async with serving(app) as url, httpx.AsyncClient(trust_env=False, verify=False) as client:
            answer = await client.get(f"{url}/crash", headers={"X-Request-Id": "ab" * 16})
            assert answer.status_code == 500
            assert set(answer.json()) == {"error", "message", "request_id"}
            assert answer.json()["request_id"] == "ab" * 16
            assert "secret" not in answer.text

    run(check())


def test_a_server_closes_no_connection_that_our_clients_still_take_for_good(run: Run) -> None:
    async def check() -> None:
        async with a_server(new_app("host", "1")) as (server, _):
            expiry = httpx.Limits().keepalive_expiry
            assert expiry is not None
            assert server.config.timeout_keep_alive >= expiry + 5  # seconds by which either may be late

    run(check())


def test_a_request_for_a_websocket_whose_upgrade_was_dropped_on_the_way_is_told_so(run: Run) -> None:
    async def check() -> None:
        async with serving(new_app("host", "1")) as url, httpx.AsyncClient(trust_env=False, verify=False) as client:
            answer = await client.get(f"{url}/ws/forward/7/8800")
            assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
            assert answer.json()["error"] == "upgrade_required"
            assert "Upgrade and Connection" in answer.json()["message"]
            assert (await client.get(f"{url}/nothing")).status_code == 404

    run(check())


def test_one_more_listener_serves_its_own_application_until_the_end(run: Run) -> None:
    async def check() -> None:
        ready, ended = asyncio.Event(), asyncio.Event()

        async def is_ready() -> None:
            ready.set()

        async def is_ended() -> None:
            ended.set()

        first, second = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
        server = Server(new_app("one", "1", documented=True), ws=serve_ws([]), on_ready=is_ready, on_stop=is_ended)
        running = asyncio.ensure_future(server.serve([first]))
        await ready.wait()
        url = socket_url(second)
        server.add_listener(second, new_app("other", "1", documented=True), serve_ws([]))
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            assert (await client.get(f"{socket_url(first)}/openapi.json")).json()["info"]["title"] == "one"
            assert (await client.get(f"{url}/openapi.json")).json()["info"]["title"] == "other"
        server.stop()
        await running
        assert ended.is_set()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*url.removeprefix("http://").split(":"))

    run(check())


def test_a_client_that_keeps_a_tls_connection_for_later_does_not_hold_up_the_end(run: Run, tmp_path: Path) -> None:
    made = Authority(tmp_path).issue(["localhost"], 1)

    def keep_one_open(port: int) -> ssl.SSLSocket:
        trusted = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        connection = trusted.wrap_socket(socket.create_connection(("127.0.0.1", port), 30), server_hostname="localhost")
        connection.sendall(b"GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 404")
        return connection

    async def check() -> None:
        certificate = ServerCertificate(made.cert, made.key)
        async with a_server(new_app("t", "1"), certificate=certificate) as (_, sock):
            connection = await asyncio.to_thread(keep_one_open, sock.getsockname()[1])
        connection.close()

    with structlog.testing.capture_logs() as logged:
        run(check())
    assert not logged


@pytest.mark.parametrize("busy", [False, True])
def test_a_server_ends_as_soon_as_the_last_answer_is_given(
    run: Run, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    app, asked, answer = new_app("t", "1"), asyncio.Event(), asyncio.Event()

    @app.get("/slow")
    async def slow() -> str:
        asked.set()
        await answer.wait()
        return "done"

    async def sleep(seconds: float, _sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep) -> None:
        assert not seconds, "it looks from time to time"
        await _sleep(0)

    async def check() -> None:
        async with a_server(app) as (server, sock), httpx.AsyncClient(trust_env=False, verify=False) as client:
            assert (await client.get(f"{socket_url(sock)}/none")).status_code == 404
            asking = asyncio.ensure_future(client.get(f"{socket_url(sock)}/slow"))
            await asked.wait()
            if not busy:
                answer.set()
                await asking
            monkeypatch.setattr(asyncio, "sleep", sleep)
            ending = asyncio.ensure_future(server.shutdown())
            await asyncio.sleep(0)
            assert not ending.done()
            answer.set()
            await ending
            assert (await asking).json() == "done"

    run(check())


def test_a_crowd_that_connects_at_once_leaves_others_their_turn(run: Run) -> None:
    async def main() -> None:
        async with a_server(new_app("test", "0")) as (server, sock):
            address = sock.getsockname()
            with contextlib.ExitStack() as stack:
                for _ in range(500):  # nobody accepts them yet: this thread is the server's
                    stack.enter_context(socket.create_connection(address, 30))
                seen, most = 0, 0
                while seen < 500:
                    await asyncio.sleep(0)
                    now = len(server.server_state.connections)
                    seen, most = now, max(most, now - seen)
                assert most <= ACCEPTED_AT_ONCE

    run(main())


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The lines of a log in JSON, without their times."""
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    for line in lines:
        assert line.pop("time").endswith("Z")
    return lines


def test_a_log_in_json_has_one_line_for_each_event_tracebacks_and_those_of_libraries_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # a program begins without one
    configure_logging(style="json")
    structlog.get_logger().info("tunnel connected", peer="127.0.0.1:7", version=2)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("a.library").exception("it %s", "failed")
    first, second, third = logged(capsys)
    assert first == {"level": "info", "event": "tunnel connected", "peer": "127.0.0.1:7", "version": 2}
    assert list(first) == ["level", "event", "peer", "version"]
    assert second.pop("exception").endswith("ValueError: two\nlines")
    assert second == {"level": "error", "event": "failed"}
    assert third.pop("exception").endswith("ValueError: two\nlines")
    assert third == {"level": "error", "event": "it failed", "logger": "a.library"}


@pytest.mark.parametrize("style", ["text", "json"])
def test_what_is_logged_of_a_peers_choice_is_cut(capsys: pytest.CaptureFixture[str], style: str) -> None:
    configure_logging(style=style)
    structlog.get_logger().info("refused", task="x" * 1_000_000, others=["y" * 1_000_000])
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 3 * LONGEST_VALUE
    assert "999000 characters more" in line


class Moments:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def a_log_of_repeats(monkeypatch: pytest.MonkeyPatch) -> Moments:
    clock = Moments()
    monkeypatch.setattr("kohakuriver.web.logging.Repeats", lambda: Repeats(clock))
    configure_logging(style="json")
    return clock


def test_the_same_refusal_is_told_once_and_then_how_often_it_was_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = a_log_of_repeats(monkeypatch)
    log = structlog.get_logger()
    for port in range(5):
        log.info("session refused", task="web", peer=f"10.0.0.9:{port}", reason="not yours")
    log.info("session refused", task="lab", peer="10.0.0.9:5", reason="not yours")
    assert [line["task"] for line in logged(capsys)] == ["web", "lab"]
    clock.now += SECONDS
    log.warning("something else")
    repeated, other = logged(capsys)
    assert (repeated["event"], repeated["task"], repeated["repeated"]) == ("session refused", "web", 4)
    assert other["event"] == "something else"
    log.info("session refused", task="web", peer="10.0.0.9:7", reason="not yours")
    assert [line["event"] for line in logged(capsys)] == ["session refused"]


def test_refusals_that_differ_do_not_flood_a_log_and_their_number_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = a_log_of_repeats(monkeypatch)
    log = structlog.get_logger()
    for number in range(5000):
        log.info("session refused", task=f"guess-{number}", reason=f"There is no task 'guess-{number}'.")
    assert len(logged(capsys)) == REFUSALS_AT_ONCE
    clock.now += SECONDS
    log.warning("something else")
    assert [line.get("left_out") for line in logged(capsys)] == [5000 - REFUSALS_AT_ONCE, None]


def test_what_happens_again_in_good_order_is_told_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(style="json")
    for _ in range(50):
        structlog.get_logger().info("tunnel connected", container="c")
    assert len(logged(capsys)) == 50


def test_a_container_that_comes_and_goes_does_not_flood_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = a_log_of_repeats(monkeypatch)
    log = structlog.get_logger()
    for number in range(5000):
        log.info("tunnel connected", container=f"c{number}")
        log.info("tunnel disconnected", container=f"c{number}", reason="the tunnel client ends")
    assert len(logged(capsys)) == 2 * TUNNELS_AT_ONCE
    clock.now += SECONDS
    log.warning("something else")
    assert [line.get("left_out") for line in logged(capsys)] == [4000, 4000, None]


def test_a_count_is_told_when_its_time_is_over_though_nothing_else_is_logged(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        monkeypatch.setattr("kohakuriver.web.repeats.SECONDS", -0.99)
        counted = Repeats()
        structlog.configure(processors=[counted, tell])
        told.clear()
        counted._seen["line", 1] = _Seen(time.monotonic(), "warning", {"event": "the same"}, more=3)
        counted._wake_at_end()
        await heard.wait()
        assert told == [{"event": "the same", "repeated": 3}]

    told: list[Any] = []
    heard = asyncio.Event()

    def tell(_logger: object, _method: str, event: Any) -> Any:
        told.append(event)
        heard.set()
        raise structlog.DropEvent

    run(check())


def test_what_a_stranger_sends_stays_on_its_line_in_the_log_and_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    structlog.get_logger().info("refused", task="\x1b[2J\x9b2J", reason="two\nlines")
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        structlog.get_logger().exception("failed")
    first, second, *traceback = capsys.readouterr().err.splitlines()
    assert r"\x1b[2J\x9b2J" in first
    assert r"two\nlines" in first
    assert "failed" in second
    assert traceback[-1] == r"ValueError: \x1b[2J"
