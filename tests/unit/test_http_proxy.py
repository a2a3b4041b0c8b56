"""Which HTTP proxy a program uses, and every answer that one can give."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kohakuriver.client.host import HostClient
from kohakuriver.config import Settings
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, UsageError
from kohakuriver.http_proxy import Connect, HttpProxy, connect_through, http_proxy
from kohakuriver.tunnel.dial import Server, open_session

Run = Callable[[Coroutine[Any, Any, None]], None]

PROXY = "http://proxy.test:3128"
OK = b"HTTP/1.1 200 Connection established\r\n\r\n"


@pytest.fixture(autouse=True)
def _no_proxy_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP", "HTTPS", "ALL", "NO", "KOHAKURIVER"):
        monkeypatch.delenv(f"{name}_PROXY", raising=False)
        monkeypatch.delenv(f"{name.lower()}_proxy", raising=False)


@pytest.mark.parametrize(
    ("url", "environment", "found"),
    [
        ("https://h.test", {}, None),
        ("https://h.test", {"HTTPS_PROXY": PROXY}, PROXY),
        ("wss://h.test/x", {"HTTPS_PROXY": PROXY}, PROXY),
        ("http://h.test:8000", {"HTTPS_PROXY": PROXY}, None),
        ("http://h.test:8000", {"HTTP_PROXY": PROXY}, PROXY),
        ("ws://h.test:8000", {"http_proxy": "proxy.test:3128"}, PROXY),
        ("ws://h.test:8000", {"http_proxy": PROXY, "HTTP_PROXY": "http://other"}, PROXY),
        ("ws://h.test:8000", {"HTTP_PROXY": PROXY, "REQUEST_METHOD": "GET"}, None),
        ("https://h.test", {"ALL_PROXY": PROXY}, PROXY),
        ("https://h.test", {"ALL_PROXY": "socks5://s", "HTTPS_PROXY": PROXY}, PROXY),
        ("https://h.test", {"HTTPS_PROXY": "https://proxy.test"}, "https://proxy.test:443"),
        ("https://h.test", {"HTTPS_PROXY": "proxy.test"}, "http://proxy.test:80"),
        ("https://h.test", {"HTTPS_PROXY": "http://[fe80::1]:1"}, "http://[fe80::1]:1"),
        ("https://h.test", {"HTTPS_PROXY": ""}, None),
        ("https://h.test", {"HTTPS_PROXY": PROXY, "NO_PROXY": "other.test, h.test"}, None),
        ("https://a.h.test", {"HTTPS_PROXY": PROXY, "no_proxy": "h.test"}, None),
        ("https://h.test:8443", {"HTTPS_PROXY": PROXY, "NO_PROXY": "h.test:8443"}, None),
        ("https://h.test", {"HTTPS_PROXY": PROXY, "NO_PROXY": "h.test:8443"}, PROXY),
        ("https://h.test", {"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, None),
        ("http://127.0.0.1:8000", {"HTTP_PROXY": PROXY, "ALL_PROXY": PROXY}, None),
        ("http://[::1]:8000", {"HTTP_PROXY": PROXY}, None),
        ("http://localhost:8000", {"HTTP_PROXY": PROXY}, None),
        ("http://127.0.0.1:8000", {"KOHAKURIVER_PROXY": PROXY}, PROXY),
        ("https://h.test", {"KOHAKURIVER_PROXY": PROXY, "HTTPS_PROXY": "http://other", "NO_PROXY": "*"}, PROXY),
        ("https://h.test", {"KOHAKURIVER_PROXY": "none", "HTTPS_PROXY": PROXY}, None),
    ],
)
def test_the_proxy_is_the_one_that_the_environment_names_for_the_server(
    url: str, environment: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    proxy = http_proxy(url)
    assert (proxy and proxy.url) == found


@pytest.mark.parametrize("named", ["socks5h://s:1080", "http://:3128", "http://p:port", "http://[", "ftp://p"])
def test_what_can_not_be_a_proxy_is_a_mistake_in_the_settings(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", named)
    with pytest.raises(UsageError, match=r"(?i)proxy"):
        http_proxy("https://h.test")


def test_credentials_are_shown_to_the_proxy_and_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p%40ss@proxy.test:3128")
    proxy = http_proxy("https://h.test")
    assert proxy is not None
    shown = base64.b64encode(b"me:p@ss")
    assert b"\r\nProxy-Authorization: Basic " + shown + b"\r\n" in Connect(proxy, "h.test", 443).request
    assert "p@ss" not in repr(proxy) + proxy.url + str(proxy.refused(407, "h.test:443"))


@pytest.mark.parametrize(
    ("host", "target"), [("h.test", b"h.test:1"), ("::1", b"[::1]:1"), ("hôte.test", "hôte.test:1".encode("idna"))]
)
def test_a_tunnel_is_asked_for_by_name_and_port(host: str, target: bytes) -> None:
    request = Connect(HttpProxy("p", 1), host, 1).request
    assert request.startswith(b"CONNECT " + target + b" HTTP/1.1\r\nHost: " + target + b"\r\n")
    assert request.endswith(b"\r\n\r\n")


REFUSALS = [
    (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "wants a name and a password"),
    (b"HTTP/1.0 403 Forbidden\r\nContent-Length: 3\r\n\r\nno!", r"does not let connections to .* through"),
    (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "can't reach "),
    (b"HTTP/1.1 302 Found\r\nLocation: http://login.test\r\n\r\n", "does not let connections"),
    (b"HTTP/1.1 abc\r\n\r\n", "does not answer as an HTTP proxy does"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer as an HTTP proxy does"),
    (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, "does not answer as an HTTP proxy does"),
    (b"", "does not answer as an HTTP proxy does"),
]


@settings(deadline=None)  # a head that is too long comes byte by byte as well
@given(st.integers(0, len(REFUSALS)), st.integers(1, 40))
def test_an_answer_means_the_same_however_it_is_split(number: int, size: int) -> None:
    connect = Connect(HttpProxy("p", 1), "h.test", 1)
    said, words = [*REFUSALS, (OK, "")][number]
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    if words:
        with pytest.raises(HostUnreachableError, match=words):
            fed(connect, [*pieces, b""])
    else:
        assert fed(connect, pieces) == [False] * (len(pieces) - 1) + [True]


def fed(connect: Connect, pieces: list[bytes]) -> list[bool]:
    return [connect.feed(piece) for piece in pieces]


@contextlib.contextmanager
def saying(answer: bytes | None) -> Iterator[HttpProxy]:
    """A proxy that answers everything with `answer` and hangs up, or that says nothing (None)."""
    done = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    if answer is None:
                        done.wait()
                    elif answer:
                        connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield HttpProxy("127.0.0.1", listener.getsockname()[1])
        finally:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def asked(way: str, proxy: HttpProxy, run: Run, monkeypatch: pytest.MonkeyPatch, timeout: float) -> KohakuRiverError:
    """The error by one of the three ways to a host."""
    caught: list[KohakuRiverError] = []

    async def ask() -> None:
        if way == "websocket":
            await open_session(Server("wss://h.test/x", proxy=proxy, timeout=timeout))
        elif way == "socket":
            await asyncio.to_thread(connect_through, proxy, "h.test", 443, timeout)
        else:
            monkeypatch.setenv("KOHAKURIVER_PROXY", proxy.url)
            monkeypatch.setattr("kohakuriver.client.host_http.ANSWER_TIMEOUT", timeout)
            async with HostClient(Settings(host=f"{way}://h.test")) as host:
                await host.tasks()

    async def main() -> None:
        with pytest.raises(KohakuRiverError) as raised:
            await ask()
        caught.append(raised.value)

    run(main())
    return caught[0]


WAYS = pytest.mark.parametrize("way", ["websocket", "socket", "https", "http"])


@WAYS
@pytest.mark.parametrize(("answer", "words"), [REFUSALS[i] for i in (0, 1, 2, 5, 7)])
def test_a_proxy_that_leads_nowhere_is_one_sentence_and_exit_code_7(
    run: Run, monkeypatch: pytest.MonkeyPatch, way: str, answer: bytes, words: str
) -> None:
    with saying(answer) as proxy:
        error = asked(way, proxy, run, monkeypatch, 10)
    assert isinstance(error, HostUnreachableError)
    assert f"The proxy at {proxy.url} " in str(error)
    assert error.exit_code == 7
    assert re.search(words, str(error)), str(error)


@WAYS
def test_a_silent_proxy_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    with saying(None) as proxy:
        error = asked(way, proxy, run, monkeypatch, 0.1)
    assert (type(error), "did not answer within 0.1 s" in str(error)) == (HostUnreachableError, True)


@WAYS
def test_a_proxy_that_is_not_there_is_told_apart_from_a_host_that_is_not(
    run: Run, monkeypatch: pytest.MonkeyPatch, way: str, unused_port: int
) -> None:
    proxy = HttpProxy("127.0.0.1", unused_port)
    error = asked(way, proxy, run, monkeypatch, 10)
    assert str(error).startswith(f"The proxy at {proxy.url} can't be reached: Connection refused")


def test_a_socket_for_ssh_can_not_lead_through_tls() -> None:
    with pytest.raises(UsageError, match="speaks TLS"):
        connect_through(HttpProxy("p.test", 443, secure=True), "h.test", 8002, 1)
