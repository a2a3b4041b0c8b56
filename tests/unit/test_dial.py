"""The side that dials: what an answer, or the lack of one, means to the user."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from kohakuriver._frame import FrameWalker
from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    NotAllowedError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
    UsageError,
)
from kohakuriver.tunnel import dial
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest
from kohakuriver.tunnel.container_endpoint import ContainerEndpoint
from kohakuriver.tunnel.dial import Server, greeting_error, open_link, open_session
from kohakuriver.tunnel.protocol import TUNNEL_V2
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.hops import asked, chain, echo, served, service

Run = Callable[[Coroutine[Any, Any, None]], None]


@contextlib.asynccontextmanager
async def answering(data: bytes | None) -> AsyncIterator[str]:
    """The address of a server that answers every request with ``data``, or never (None)."""
    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        if data is None:
            await done.wait()
        else:
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        done.set()
        server.close()
        await asyncio.sleep(0)


async def error_of(url: str, subprotocols: Sequence[str] = (TUNNEL_V2,), **options: Any) -> KohakuRiverError:
    with pytest.raises(KohakuRiverError) as raised:
        await open_session(Server(url, **options), subprotocols=subprotocols)
    return raised.value


def test_nobody_there_is_told_as_such(run: Run, unused_ports: list[int]) -> None:
    async def main() -> None:
        error = await error_of(f"ws://127.0.0.1:{unused_ports[0]}/x")
        assert isinstance(error, HostUnreachableError)
        assert str(error) == f"The host at http://127.0.0.1:{unused_ports[0]} can't be reached: Connection refused."

    run(main())


def test_a_server_that_says_nothing_is_given_up(run: Run) -> None:
    async def main() -> None:
        async with answering(None) as url:
            error = await error_of(url, timeout=0.05)
            assert isinstance(error, HostUnreachableError)
            assert (error.code, error.status) == ("timed_out", 504)

    run(main())


def test_who_gives_up_while_the_connection_is_made_leaves_nothing_unheard(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dial._Opening.connection_made

    async def check() -> None:
        def give_up(opening: dial._Opening, transport: asyncio.BaseTransport) -> None:
            made(opening, transport)
            asking.cancel()

        monkeypatch.setattr(dial._Opening, "connection_made", give_up)
        async with answering(None) as url:
            asking = asyncio.ensure_future(open_session(Server(url)))
            with pytest.raises(asyncio.CancelledError):
                await asking
            for _ in range(5):
                await asyncio.sleep(0)
            gc.collect()

    run(check())


def test_a_session_without_its_greeting_is_given_up_within_the_same_time(run: Run) -> None:
    async def silent(websocket: ServerConnection) -> None:
        await websocket.wait_closed()

    async def main() -> None:
        async with serve(silent, "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            error = await error_of(f"ws://127.0.0.1:{port}", timeout=0.2)
            assert (error.code, error.status) == ("timed_out", 504)

    run(main())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\xff" * 200_000,
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 404",
    ],
    ids=["nothing", "ssh", "garbage", "101 without a key", "200", "cut"],
)
def test_what_is_no_handshake_is_an_error_with_a_reason(run: Run, data: bytes) -> None:
    async def main() -> None:
        async with answering(data) as url:
            assert str(await error_of(url))

    run(main())


NGINX = b"<html><head><title>%s</title></head></html>"


@pytest.mark.parametrize("status", [200, 301, 302, 400, 403, 404, 409, 426, 502, 504])
def test_what_stands_between_is_never_taken_for_the_host(run: Run, status: int) -> None:
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(NGINX)}\r\nLocation: https://a.test/\r\n\r\n"

    async def main() -> None:
        async with answering(head.encode() + NGINX) as url:
            error = await error_of(url)
            assert (type(error), error.exit_code) == (HostUnreachableError, 7)
            assert url.replace("ws", "http", 1) in str(error)
            assert status not in (301, 302) or "its URL is https://a.test" in str(error)
            assert status not in (200, 404, 426) or "Upgrade and Connection" in str(error)

    run(main())


@pytest.mark.parametrize("name", ["a..b", "a" * 70 + ".test", ".test"])
@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_a_name_that_can_not_be_one_is_a_host_that_can_not_be_reached(run: Run, scheme: str, name: str) -> None:
    async def main() -> None:
        error = await error_of(f"{scheme}://{name}:1/x")
        assert (type(error), error.exit_code) == (HostUnreachableError, 7)
        assert str(error).startswith(f"The host at http{scheme[2:]}://{name}:1 can't be reached: ")

    run(main())


def test_a_server_that_hangs_up_may_be_one_that_serves_tls(run: Run) -> None:
    async def main() -> None:
        async with answering(b"") as url:
            assert "its URL begins with https://" in str(await error_of(url))

    run(main())


def test_a_server_that_resets_the_connection_may_be_one_that_serves_tls(run: Run) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def main() -> None:
        async with await asyncio.start_server(reset, "127.0.0.1", 0) as server:
            error = str(await error_of(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
            assert "its URL begins with https://" in error
            assert "Errno" not in error

    run(main())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UsageError),
        (401, UnauthenticatedError),
        (403, NotAllowedError),
        (404, NotFoundError),
        (409, UnavailableError),
        (502, HostUnreachableError),
        (504, HostUnreachableError),
    ],
)
def test_an_http_status_is_the_error_that_it_stands_for_in_the_words_of_the_host(
    run: Run, status: int, kind: type[KohakuRiverError]
) -> None:
    body = b'{"error": "the_code", "message": "the sentence"}'
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def main() -> None:
        async with answering(head.encode() + body) as url:
            error = await error_of(url)
            assert type(error) is kind
            assert (error.code, str(error), error.status) == ("the_code", "the sentence", status)

    run(main())


@pytest.mark.parametrize("url", ["http://here/", "ws://", "nonsense", "ws://[::1"])
def test_what_is_no_websocket_address_is_a_usage_error(run: Run, url: str) -> None:
    async def main() -> None:
        assert isinstance(await error_of(url), UsageError)

    run(main())


@pytest.mark.parametrize(
    ("how", "kind", "code", "status"),
    [
        ("404 not_found", NotFoundError, "not_found", 404),
        ("409 tunnel_not_connected", UnavailableError, "tunnel_not_connected", 409),
        ("504 timed_out", UnavailableError, "timed_out", 504),
        ("nonsense", KohakuRiverError, "failed", 500),
        (1008, UnavailableError, "unavailable", 409),
        (1011, UnavailableError, "unavailable", 503),
        (1006, UnavailableError, "unavailable", 409),
    ],
)
@pytest.mark.parametrize("text", ["Error: no such task is not allowed, and not connected", ""])
def test_a_v1_refusal_is_what_its_header_or_its_close_code_says_whatever_its_words(
    text: str, how: str | int, kind: type[KohakuRiverError], code: str, status: int
) -> None:
    error = greeting_error(text, how)
    assert (type(error), error.code, error.status) == (kind, code, status)
    assert str(error)


@pytest.mark.parametrize(
    "refusal",
    [
        NotFoundError("There is no task of that name."),
        UnavailableError("It is not connected.", code="tunnel_not_connected"),
        HostUnreachableError("The runner is gone.", code="host_unreachable"),
    ],
)
def test_a_refused_v1_session_is_the_error_that_the_server_raised(run: Run, refusal: KohakuRiverError) -> None:
    async def refuse(request: UpgradeRequest, *parts: str) -> None:
        raise refusal

    async def main() -> None:
        async with served([TunnelRoute("/{any}", refuse)]) as port:
            error = await error_of(f"ws://127.0.0.1:{port}/x", subprotocols=())
            assert (type(error), error.code, str(error)) == (type(refusal), refusal.code, str(refusal))

    run(main())


def test_a_refusal_by_a_program_of_version_1_is_told_by_its_close_code(run: Run) -> None:
    async def handle(socket: ServerConnection) -> None:
        await socket.send("Error: No such task.")
        await socket.close(1011, "No such task.")

    async def main() -> None:
        async with serve(handle, "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            error = await error_of(f"ws://127.0.0.1:{port}/", subprotocols=())
            assert (type(error), error.status, str(error)) == (UnavailableError, 503, "No such task.")

    run(main())


def test_frames_right_behind_the_greeting_are_not_lost(run: Run) -> None:
    async def main() -> None:
        async with chain() as hops:  # a session that is closed right after its greeting: both arrive together
            await hops.tunnel("python")
            user = UserEndpoint(on_detach=hops.detached.put_nowait)
            await hops.attach(user)
            for session in list(hops.proxy.sessions):
                session.user.link.close(4444, "right away")
            assert await hops.detached.get() == "right away"

    run(main())


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that lives as long as the tests, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_a_link_over_tls_carries_much_both_ways(run: Run, certificate: tuple[Path, Path]) -> None:
    """A TLS terminator in front of the host: the user's link runs over a transport without a socket of its own."""

    async def main() -> None:
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.load_cert_chain(*certificate)
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        async with chain() as hops, service(echo) as port:

            async def terminate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                onward, back = await asyncio.open_connection("127.0.0.1", hops.host_port)
                await asyncio.wait([asyncio.ensure_future(pump(a, b)) for a, b in ((reader, back), (onward, writer))])
                for end in (writer, back):
                    end.transport.abort()

            async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(OSError, RuntimeError):
                    while data := await reader.read(1 << 16):
                        writer.write(data)
                        await writer.drain()
                writer.close()

            await hops.tunnel("python")
            server = await asyncio.start_server(terminate, "127.0.0.1", 0, ssl=serving)
            url = f"wss://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws/forward/1/1"
            with pytest.raises(HostUnreachableError, match="certificate"):
                await open_session(Server(url))
            user = UserEndpoint()
            user.attach(await open_session(Server(url, ssl=trusting)))
            local = (await user.listen_tcp("127.0.0.1", 0, port)).port
            data = bytes(range(256)) * 40_000
            for answer in await asyncio.gather(*(asked(local, data[i:]) for i in range(3))):
                assert answer == data[-len(answer) :]
                assert len(answer) >= len(data) - 2
            await user.close()
            server.close()
            await asyncio.sleep(0)

    run(main())


def test_a_dial_that_is_cancelled_leaves_nothing_open(run: Run) -> None:
    async def main() -> None:
        async with answering(None) as url:
            opening = asyncio.ensure_future(open_link(Server(url), FrameWalker(masked=False), ContainerEndpoint()))
            await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening

    run(main())


def test_a_greeting_behind_thousands_of_pings_and_in_thousands_of_fragments_is_read(run: Run) -> None:
    async def flood(websocket: ServerConnection) -> None:
        empty = b"\x00\x00" * 5000
        websocket.transport.write(b"\x89\x00" * 5000 + b"\x01\x04CONN" + empty + b"\x80\x05ECTED")
        await websocket.wait_closed()

    async def main() -> None:
        async with serve(flood, "127.0.0.1", 0, ping_interval=None) as server:
            link = await open_session(Server(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/"))
            link.abort()

    run(main())
