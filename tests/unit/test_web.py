"""What host and runner have in common as HTTP programs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from kohakuriver.cli.pki import Authority
from kohakuriver.errors import LocalAddressError
from kohakuriver.tls import ServerCertificate
from kohakuriver.tunnel.accept import serve_ws
from kohakuriver.web.app import bind, new_app, socket_url, warn_if_in_clear
from kohakuriver.web.listener import ACCEPTED_AT_ONCE
from kohakuriver.web.logging import configure_logging
from kohakuriver.web.server import Server
from tests.support.host_only import serving

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


def test_an_ipv6_address_stands_in_brackets() -> None:
    with bind("::1", 0) as sock:
        assert socket_url(sock, "https") == f"https://[::1]:{sock.getsockname()[1]}"


def test_a_crash_answers_with_a_sentence_and_no_traceback(run: Run) -> None:
    async def check() -> None:
        app = new_app("host", "1")

        @app.get("/crash")
        async def crash() -> None:
            raise ZeroDivisionError("secret detail")

        async with serving(app) as url, httpx.AsyncClient(trust_env=False, verify=False) as client:
            answer = await client.get(f"{url}/crash")
            assert answer.status_code == 500
            assert set(answer.json()) == {"error", "message"}
            assert "secret" not in answer.text

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
        await server.add_listener(second, new_app("other", "1", documented=True), serve_ws([]))
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            assert (await client.get(f"{socket_url(first)}/openapi.json")).json()["info"]["title"] == "one"
            assert (await client.get(f"{url}/openapi.json")).json()["info"]["title"] == "other"
        server.stop()
        await running
        assert ended.is_set()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*url.removeprefix("http://").split(":"))

    run(check())


def test_a_client_that_keeps_a_tls_connection_for_later_does_not_hold_up_the_end(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Authority(tmp_path).issue(["localhost"], 1)

    def keep_one_open(port: int) -> ssl.SSLSocket:
        trusted = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        connection = trusted.wrap_socket(socket.create_connection(("127.0.0.1", port), 30), server_hostname="localhost")
        connection.sendall(b"GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 404")
        return connection

    async def check() -> None:
        ready = asyncio.Event()

        async def is_ready() -> None:
            ready.set()

        async def is_ended() -> None:
            pass

        sock = bind("127.0.0.1", 0)
        certificate = ServerCertificate(made.cert, made.key)
        server = Server(
            new_app("t", "1"), ws=serve_ws([]), on_ready=is_ready, on_stop=is_ended, certificate=certificate
        )
        running = asyncio.ensure_future(server.serve([sock]))
        await ready.wait()
        with await asyncio.to_thread(keep_one_open, sock.getsockname()[1]):
            server.stop()
            await running

    run(check())
    assert "graceful shutdown exceeded" not in caplog.text


def test_a_crowd_that_connects_at_once_leaves_others_their_turn(run: Run) -> None:
    async def main() -> None:
        ready = asyncio.Event()

        async def on_ready() -> None:
            ready.set()

        async def on_stop() -> None:
            pass

        sock = bind("127.0.0.1", 0)
        server = Server(new_app("test", "0"), ws=serve_ws([]), on_ready=on_ready, on_stop=on_stop)
        running = asyncio.ensure_future(server.serve([sock]))
        await ready.wait()
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
        server.stop()
        await running

    run(main())


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
