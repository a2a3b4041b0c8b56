"""The demo's task: its page, and a check that can fail."""

from __future__ import annotations

import hashlib
import http.client
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from kohakuriver.cli import demo_service


@pytest.fixture
def handler() -> type[demo_service.Handler]:
    class Handler(demo_service.Handler):
        task = "<demo>"
        block = bytes(range(256)) * (demo_service.BLOCK // 256)

    return Handler


@pytest.fixture
def address(handler: type[demo_service.Handler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def get(address: str, path: str) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers["X-Sha256"]


def test_the_page_says_whose_it_is_and_escapes_it(address: str) -> None:
    status, body, _ = get(address, "/")
    assert status == 200
    assert b"&lt;demo&gt;" in body
    assert address.encode() in body


@pytest.mark.parametrize("size", [0, 1, demo_service.BLOCK, demo_service.BLOCK + 7])
def test_bytes_come_in_the_size_asked_for_with_their_digest(address: str, size: int) -> None:
    status, body, digest = get(address, f"/bytes?size={size}")
    assert (status, len(body)) == (200, size)
    assert hashlib.sha256(body).hexdigest() == digest


@pytest.mark.parametrize("path", ["/bytes?size=-1", "/bytes?size=x", f"/bytes?size={1 << 40}"])
def test_an_impossible_size_is_refused(address: str, path: str) -> None:
    assert get(address, path)[0] == 400


def test_an_intact_transfer_passes_the_check(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_service.check(address, 10_000_000)
    down, up = map(json.loads, capsys.readouterr().out.splitlines())
    assert (down["direction"], down["bytes"], down["intact"]) == ("down", 10_000_000, True)
    assert (up["direction"], up["bytes"], up["intact"]) == ("up", 10_000_000, True)


def test_one_changed_byte_fails_the_check(
    address: str, handler: type[demo_service.Handler], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaging(read_into: object, size: int) -> tuple[bytearray, float]:
        data, seconds = receive(read_into, size)  # type: ignore[arg-type]
        data[size // 2] ^= 1
        return data, seconds

    receive = demo_service.receive
    monkeypatch.setattr(demo_service, "receive", damaging)
    assert not demo_service.check(address, 100_000)


def test_a_transfer_that_is_cut_short_is_an_error() -> None:
    pieces = iter([3, 2, 0])
    with pytest.raises(ConnectionError, match="5 of 10"):
        demo_service.receive(lambda view: next(pieces), 10)
