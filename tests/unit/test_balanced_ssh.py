"""The SSH proxy behind a balancer: who connects is whom the PROXY header names, and nobody else can say that."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from proxyprotocol.result import ProxyResultIPv4, ProxyResultIPv6, ProxyResultLocal
from proxyprotocol.v2 import ProxyProtocolV2

from kohakuriver.limits import Limits
from kohakuriver.ssh_proxy.balanced import MAX_HEADER
from tests.unit.test_ssh_proxy import TOKEN, Proxy, a_proxy, request

Run = Callable[[Coroutine[Any, Any, None]], None]
HERE = "127.0.0.1"
IP4 = ProxyResultIPv4((IPv4Address("198.51.100.7"), 4711), (IPv4Address("203.0.113.1"), 22))
IP6 = ProxyResultIPv6((IPv6Address("2001:db8::7"), 4711), (IPv6Address("2001:db8::1"), 22))


@pytest.mark.parametrize(
    ("header", "who"),
    [
        (b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 22\r\n", "198.51.100.7:4711"),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 22\r\n", "2001:db8::7:4711"),
        (ProxyProtocolV2().pack(IP4), "198.51.100.7:4711"),
        (ProxyProtocolV2().pack(IP6), "2001:db8::7:4711"),
        (b"PROXY UNKNOWN\r\n", HERE),
        (ProxyProtocolV2().pack(ProxyResultLocal()), HERE),
    ],
    ids=["1, IPv4", "1, IPv6", "2, IPv4", "2, IPv6", "1, unknown", "2, the balancer's own"],
)
def test_who_connects_is_whom_the_balancer_names(run: Run, tmp_path: Path, header: bytes, who: str) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, "rust", balancers=(HERE,)) as proxy:
            reader, writer = await proxy.request(header + request() + b"SSH-2.0-early\r\n")
            writer.write_eof()
            assert await reader.read() == b"SUCCESS\nSSH-2.0-early\r\n"
            writer.close()
            (asked_by,) = proxy.asked_by
            assert asked_by.startswith(who)

    run(check())


def test_a_header_from_elsewhere_than_a_balancer_counts_for_nothing(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, balancers=("198.51.100.0/24",)) as proxy:
            answer = await proxy.answer(b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 22\r\n" + request())
            assert answer.startswith(b"ERROR The request must be")
            assert proxy.asked_by == []

    run(check())


@pytest.mark.parametrize(
    "said",
    [
        request(),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"PROXY TCP4 no.address 203.0.113.1 4711 22\r\n",
        b"PROXY TCP4 " + b"1" * MAX_HEADER,
        ProxyProtocolV2().pack(IP4)[:14] + b"\xff\xff",
        b"\0" * 100,
    ],
    ids=["a request", "SSH", "no address", "a long line", "a long header", "zeros"],
)
def test_a_balancer_that_does_not_say_who_connects_is_refused_and_that_is_logged(
    run: Run, tmp_path: Path, said: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, balancers=(HERE,)) as proxy:
            with contextlib.suppress(ConnectionError):  # what it did not read resets the connection
                assert await proxy.answer(said) == b""
            assert proxy.asked_by == []

    run(check())
    logged = "".join(capsys.readouterr())
    assert "a balancer was refused at the SSH port" in logged
    assert "PROXY header" in logged


def test_a_balancer_that_says_nothing_is_let_go(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, limits=Limits(handshake_timeout=0.2), balancers=(HERE,)) as proxy:
            assert await proxy.answer(b"PROXY TCP4") == b""

    run(check())


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
def test_haproxy_says_who_connects_to_the_relay_and_to_the_jump_host(run: Run, tmp_path: Path, version: str) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, balancers=(HERE,)) as proxy:
            with haproxy(proxy.port, version, tmp_path) as port:
                reader, writer = await asyncio.open_connection(HERE, port, local_addr=("127.0.0.2", 0))
                source = "{}:{}".format(*writer.get_extra_info("sockname"))
                writer.write(request())
                assert await reader.readline() == b"SUCCESS\n"
                writer.close()
                assert proxy.asked_by == [source]
                async with through(proxy, port) as connection:
                    await connection.open_connection("task", 22)
                assert proxy.asked_by[1].startswith("127.0.0.3:")

    run(check())


def through(proxy: Proxy, port: int) -> contextlib.AbstractAsyncContextManager[Any]:
    """A log-in at the jump host behind a balancer."""
    return proxy.jump(password=TOKEN, port=port, local_addr=("127.0.0.3", 0))


@contextlib.contextmanager
def haproxy(ssh_port: int, version: str, directory: Path) -> Iterator[int]:
    """The port of a balancer before one SSH proxy."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin")
    assert program, "HAProxy is not installed: run scripts/system-packages test"
    with socket.create_server((HERE, 0)) as listener:
        listener.set_inheritable(True)
        config = directory / "haproxy.cfg"
        config.write_text(
            "defaults\n    mode tcp\n    timeout connect 5s\n    timeout client 1h\n    timeout server 1h\n"
            f"listen ssh\n    bind fd@{listener.fileno()}\n    server a {HERE}:{ssh_port} {version}\n"
        )
        with subprocess.Popen([program, "-db", "-f", str(config)], pass_fds=[listener.fileno()]) as process:
            try:
                yield int(listener.getsockname()[1])
            finally:
                process.terminate()
