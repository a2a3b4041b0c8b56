"""The SSH proxy on its own port: request lines, the relay, the jump host, and what strangers can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh.kex import get_kex_algs

from kohakuriver import host_keys
from kohakuriver.asking import asker
from kohakuriver.errors import NotFoundError, UnauthenticatedError, UsageError
from kohakuriver.host.services.credentials import Caller
from kohakuriver.limits import LEAST_RATE, Limits
from kohakuriver.proxies import Proxies
from kohakuriver.session.carried import Route
from kohakuriver.ssh_proxy import jump, server
from kohakuriver.ssh_proxy.algorithms import check
from kohakuriver.ssh_proxy.jump import Reach
from kohakuriver.ssh_proxy.jump_process import MAX_TRIES
from kohakuriver.ssh_proxy.server import SshProxy
from kohakuriver.ssh_proxy.session import PacedConnection, TaskConnection
from kohakuriver.ssh_proxy.turnstile import Turnstile
from kohakuriver.store import Task
from kohakuriver.tunnel.windows import SendWindow
from tests.support.hops import CLIENTS, CONTAINER, Chain, chain, echo, service, until
from tests.support.ssh import ours

Run = Callable[[Coroutine[Any, Any, None]], None]
TOKEN = "the-token"


class Proxy:
    """An SSH proxy before the runner of a chain. Its tasks: `task` on a service's port, `closed` where none listens."""

    def __init__(
        self, hops: Chain, directory: Path, limits: Limits | None = None, balancers: Sequence[str] = ()
    ) -> None:
        self.hops = hops
        self.asked_by: list[str] = []
        self.port_of = {"task": 0, "closed": 0}
        self.holders: dict[str, set[str]] = {}
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.proxy = SshProxy(
            self.listening,
            authorize=self._authorize,
            keyholders=self._keyholder,
            check_user=self._check_user,
            host_keys=directory,
            limits=limits,
            balancers=Proxies(balancers),
        )
        self.proxy.start()

    async def _check_user(self, token: str) -> str:
        if token != TOKEN:
            raise UnauthenticatedError("The host does not know this token.")
        return "me"

    async def _authorize(self, token: str | None, task: str, port: int | None) -> Route:
        self.asked_by.append(asker().source)
        await self._check_user(token or "")
        return self._target(task, port)

    def _target(self, task: str, port: int | None) -> Route:
        if task not in self.port_of:
            raise NotFoundError(f"There is no task {task!r}.")
        url = self.hops.runner_url.replace("http", "ws")
        grant = self.hops.grants.open(Caller("me", "user"), Task(task_id=1, node="node", container=CONTAINER))
        return Route(url, CONTAINER, f"ticket {CONTAINER} me", grant, task=task, port=port or self.port_of[task])

    async def _keyholder(self, key: str) -> Reach | None:
        tasks = self.holders.get(key)
        if tasks is None:
            return None

        async def reach(task: str, port: int | None) -> Route:
            if task not in tasks:
                raise NotFoundError(f"There is no task {task!r} for you.")
            return self._target(task, port)

        return reach

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def request(self, line: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.connect()
        writer.write(line)
        return reader, writer

    async def answer(self, line: bytes) -> bytes:
        """All that comes back for what is sent."""
        reader, writer = await self.request(line)
        try:
            return await reader.read()
        finally:
            writer.close()

    def jump(self, **options: Any) -> contextlib.AbstractAsyncContextManager[asyncssh.SSHClientConnection]:
        given = {
            "port": self.port,
            "username": "me",
            "known_hosts": None,
            "client_keys": None,
            "config": None,
            "agent_path": None,
        }
        return asyncssh.connect("127.0.0.1", **{**given, **options})


@contextlib.asynccontextmanager
async def a_proxy(
    directory: Path,
    client: str = "rust",
    handler: Any = echo,
    limits: Limits | None = None,
    balancers: Sequence[str] = (),
) -> AsyncIterator[Proxy]:
    async with chain() as hops, service(handler) as port:
        await hops.tunnel(client)
        proxy = Proxy(hops, directory, limits, balancers)
        proxy.port_of["task"] = port
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            proxy.port_of["closed"] = unused.getsockname()[1]
            try:
                yield proxy
            finally:
                await proxy.proxy.close()


def request(task: str = "task", token: str | None = TOKEN) -> bytes:
    return f"REQUEST_TUNNEL {task}{f' {token}' if token else ''}\n".encode()


def name_lists(kexinit: bytes) -> list[list[str]]:
    """The ten name-lists of a KEXINIT message (RFC 4253 §7.1)."""
    lists, at = [], 1 + 16
    for _ in range(10):
        length = int.from_bytes(kexinit[at : at + 4], "big")
        lists.append(kexinit[at + 4 : at + 4 + length].decode().split(","))
        at += 4 + length
    return lists


async def offered(port: int) -> list[list[str]]:
    """What an SSH server offers to everybody, read from its first packet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"SSH-2.0-test\r\n")
        assert (await reader.readline()).startswith(b"SSH-2.0-")
        packet = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
        return name_lists(packet[1 : -packet[0]])
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def a_task_server(directory: Path) -> AsyncIterator[int]:
    """The SSH server that is put into tasks, and its port."""
    (directory / "keys").touch()
    host_keys.ecdsa(directory / "task_ecdsa_key")
    files = [*("--host-key", str(directory / "task_key")), *("--host-key", str(directory / "task_ecdsa_key"))]
    files += ["--authorized-keys", str(directory / "keys")]
    process = await asyncio.create_subprocess_exec(
        ours(), "--listen", "127.0.0.1:0", *files, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        yield int(ready["address"].rpartition(":")[2])
    finally:
        process.kill()
        await process.wait()


def test_the_jump_host_offers_the_algorithms_of_a_tasks_ssh_server_and_no_others(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy, a_task_server(tmp_path) as port:
            exchanges, *rest = await offered(proxy.port)
            task_exchanges, *task = await offered(port)
            known = {name.decode() for name in get_kex_algs()} | {"kex-strict-s-v00@openssh.com"}
            # That it tells which signatures it takes is the one thing that it says beside.
            assert [name for name in exchanges if name != "ext-info-s"] == [
                name for name in task_exchanges if name in known
            ]
            assert rest == task

    run(check())


@pytest.mark.parametrize("client", CLIENTS)
def test_a_request_becomes_a_relay_to_the_tasks_ssh_server(run: Run, tmp_path: Path, client: str) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, client) as proxy:
            reader, writer = await proxy.request(request())
            assert await reader.readline() == b"SUCCESS\n"
            data = bytes(range(256)) * 40_000
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data
            writer.close()

    run(check())


def test_bytes_right_behind_the_request_line_belong_to_ssh(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            reader, writer = await proxy.request(request() + b"SSH-2.0-early\r\n")
            writer.write_eof()
            assert await reader.read() == b"SUCCESS\nSSH-2.0-early\r\n"
            writer.close()

    run(check())


def test_what_a_server_says_first_comes_after_the_success_line(run: Run, tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-server\r\n")
        writer.close()

    async def check() -> None:
        async with a_proxy(tmp_path, handler=greet) as proxy:
            for _ in range(20):
                assert await proxy.answer(request()) == b"SUCCESS\nSSH-2.0-server\r\n"

    run(check())


def test_a_half_closed_connection_still_gets_its_answer(run: Run, tmp_path: Path) -> None:
    async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"got %d" % len(await reader.read()))
        writer.close()

    async def check() -> None:
        async with a_proxy(tmp_path, handler=answer_at_the_end) as proxy:
            reader, writer = await proxy.request(request() + b"x" * 1000)
            writer.write_eof()
            assert await reader.read() == b"SUCCESS\ngot 1000"
            writer.close()

    run(check())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (request("nowhere"), b"no task 'nowhere'"),
        (request("closed"), b"othing listens"),
        (request(token=None), b"token"),
        (request(token="wrong"), b"token"),
        (b"REQUEST_TUNNEL\n", b"must be"),
        (b"REQUEST_TUNNEL a b c\n", b"must be"),
        (b"GET / HTTP/1.1\r\n\r\n", b"must be"),
        (b"\n", b"must be"),
        (b"REQUEST_TUNNEL \xff\xfe token\n", b"UTF-8"),
        (b"REQUEST_TUNNEL " + b"a" * 10_000 + b"\n", b"4096"),
    ],
)
def test_a_request_that_can_not_be_is_refused_in_one_line(run: Run, tmp_path: Path, line: bytes, words: bytes) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            answer = await proxy.answer(line)
            assert answer.startswith(b"ERROR ")
            assert answer.count(b"\n") == 1
            assert answer.endswith(b"\n")
            assert words in answer

    run(check())


@pytest.mark.parametrize("first", [b"R", b"S", b"SSH-", b"\0"])
def test_a_flood_without_a_newline_is_cut_off_after_a_few_kilobytes(run: Run, tmp_path: Path, first: bytes) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            sent, loop = 0, asyncio.get_running_loop()
            with socket.create_connection(("127.0.0.1", proxy.port)) as sock:
                sock.setblocking(False)
                await loop.sock_sendall(sock, first)
                with contextlib.suppress(ConnectionError):
                    while sent < 1 << 30:
                        await loop.sock_sendall(sock, b"x" * (1 << 16))
                        sent += 1 << 16
            assert sent < 1 << 28
            assert await proxy.answer(request("nowhere")) != b""

    run(check())


def test_the_time_for_a_request_is_the_handshakes_and_is_named_when_it_is_over(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, limits=Limits(handshake_timeout=0.3)) as proxy:
            assert await proxy.answer(b"REQUEST_TUNNEL ta") == b"ERROR No request came within 0.3 s.\n"

    run(check())


@pytest.mark.parametrize("first", [b"", b"R", b"S"])
def test_who_does_not_say_in_time_what_it_wants_is_let_go(run: Run, tmp_path: Path, first: bytes) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, limits=Limits(handshake_timeout=0.2)) as proxy:
            reader, writer = await proxy.request(first)

            async def drip() -> None:
                with contextlib.suppress(ConnectionError):
                    while not writer.is_closing():
                        writer.write(b"x" if first else b"")
                        await asyncio.sleep(0.01)

            dripping = asyncio.ensure_future(drip())
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)
            dripping.cancel()
            writer.close()

    run(check())


def test_of_those_who_wait_only_so_many_are_kept(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, limits=Limits(max_waiting=10)) as proxy:
            strangers = [await proxy.connect() for _ in range(15)]
            for reader, _ in strangers[:5]:
                assert await reader.read() == b""  # the oldest went
            assert proxy.proxy.waiting == 10
            reader, writer = await proxy.request(request())
            assert await reader.readline() == b"SUCCESS\n"
            for _, stranger in [*strangers, (reader, writer)]:
                stranger.close()

    run(check())


def test_who_was_refused_and_lingers_is_one_of_those_who_wait(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FAREWELL_SECONDS", 60)

    async def check() -> None:
        async with a_proxy(tmp_path, limits=Limits(max_waiting=10)) as proxy:
            strangers = [await proxy.request(request(token="wrong")) for _ in range(15)]
            for reader, _ in strangers[5:]:
                assert (await reader.readline()).startswith(b"ERROR ")
            await until(lambda: proxy.proxy.waiting == 10)
            for _, stranger in strangers:
                stranger.close()

    run(check())


def test_a_relay_ends_when_the_tasks_tunnel_goes(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            reader, writer = await proxy.request(request())
            assert await reader.readline() == b"SUCCESS\n"
            proxy.hops.server.hub.drop(CONTAINER, "the task was stopped")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()

    run(check())


def test_closing_the_proxy_ends_its_relays(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            reader, writer = await proxy.request(request())
            assert await reader.readline() == b"SUCCESS\n"
            await proxy.proxy.close()
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()

    run(check())


def test_the_jump_host_opens_connections_for_a_token_as_password(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy, proxy.jump(password=TOKEN) as connection:
            reader, writer = await connection.open_connection("task", 22)
            data = bytes(range(256)) * 20_000
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data
            with pytest.raises(asyncssh.ChannelOpenError, match="no task 'nowhere'"):
                await connection.open_connection("nowhere", 22)

    run(check())


def test_a_stalled_channel_of_a_jump_host_stalls_no_other(run: Run, tmp_path: Path) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() == b"echo\n":
            await echo(reader, writer)
            return
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()

    async def check() -> None:
        async with a_proxy(tmp_path, handler=flood) as proxy, proxy.jump(password=TOKEN) as connection:
            _, flooded = await connection.open_connection("task", 22)
            flooded.write(b"flood\n")
            reader, writer = await connection.open_connection("task", 22)
            writer.write(b"echo\n" + b"y" * 1_000_000)
            writer.write_eof()
            assert await reader.read() == b"y" * 1_000_000

    run(check())


def test_a_jump_hosts_user_who_goes_while_a_channel_is_opened_leaves_no_session(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on, opened = asyncio.Event(), asyncio.Event(), asyncio.Event()
    really_open = TaskConnection.open

    async def open_later(connection: TaskConnection) -> None:
        asked.set()
        await go_on.wait()
        await really_open(connection)
        opened.set()

    monkeypatch.setattr(TaskConnection, "open", open_later)

    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            async with proxy.jump(password=TOKEN) as connection:
                opening = asyncio.ensure_future(connection.open_connection("task", 22))
                await asked.wait()
                connection.abort()
                with pytest.raises(asyncssh.ChannelOpenError):
                    await opening
            await until(lambda: not proxy.proxy._jump_host.visits)
            go_on.set()
            await opened.wait()
            await until(lambda: not proxy.hops.server.hub.sessions)
            await proxy.hops.at_rest()

    run(check())


def test_the_jump_host_lets_a_key_into_the_tasks_that_have_it(run: Run, tmp_path: Path) -> None:
    mine, other = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    public = " ".join(mine.export_public_key().decode().split()[:2])

    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            proxy.holders[public] = {"task"}
            async with proxy.jump(client_keys=[mine]) as connection:
                reader, writer = await connection.open_connection("task", 22)
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                with pytest.raises(asyncssh.ChannelOpenError, match="no task 'closed'"):
                    await connection.open_connection("closed", 22)
            with pytest.raises(asyncssh.PermissionDenied):
                async with proxy.jump(client_keys=[other]):
                    pass

    run(check())


def test_the_jump_host_refuses_a_wrong_token(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            with pytest.raises(asyncssh.PermissionDenied):
                async with proxy.jump(password="wrong"):
                    pass

    run(check())


def test_the_jump_host_lets_nobody_try_key_after_key(run: Run, tmp_path: Path) -> None:
    tried: list[str] = []

    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:

            async def no_holder(key: str) -> None:
                tried.append(key)

            proxy.proxy._jump_host.keyholders = no_holder
            key = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
            with pytest.raises(asyncssh.DisconnectError, match="too many tries"):
                async with proxy.jump(client_keys=[key] * 100):
                    pass
            assert len(tried) == MAX_TRIES

    run(check())


def test_keys_that_are_tried_have_a_rate(run: Run, tmp_path: Path) -> None:
    tried: list[str] = []

    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:

            async def no_holder(key: str) -> None:
                tried.append(key)

            proxy.proxy._jump_host.keyholders = no_holder
            proxy.proxy._jump_host._tries = Turnstile(0.001, 0)
            key = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
            with pytest.raises(asyncssh.PermissionDenied):
                async with proxy.jump(client_keys=[key] * 5):
                    pass
            assert len(tried) == 1

    run(check())


def test_who_is_unknown_has_the_host_look_up_no_more_than_who_is_known(run: Run, tmp_path: Path) -> None:
    mine, other = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    public = " ".join(mine.export_public_key().decode().split()[:2])
    looked_up: list[str] = []

    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            proxy.holders[public] = {"task"}
            keyholder = proxy.proxy._jump_host.keyholders

            async def look_up(key: str) -> Reach | None:
                looked_up.append(key)
                return await keyholder(key)

            proxy.proxy._jump_host.keyholders = look_up
            async with proxy.jump(client_keys=[mine]):
                known = len(looked_up)
            for name in ("me", "nobody"):
                with pytest.raises(asyncssh.PermissionDenied):
                    async with proxy.jump(client_keys=[other], username=name):
                        pass
            assert 0 < len(looked_up) - known <= 2 * known

    run(check())


def test_while_the_jump_hosts_process_stands_still_a_relay_goes_on(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy, connected(proxy, "request") as (reader, writer):
            async with proxy.jump(password=TOKEN):
                process = proxy.proxy._jump_host._process._process
                assert process is not None
                os.kill(process.pid, signal.SIGSTOP)
                try:
                    strangers = [await proxy.request(b"SSH-2.0-stranger\r\n") for _ in range(20)]
                    data = bytes(1_000_000)
                    writer.write(data)
                    assert await reader.readexactly(len(data)) == data
                    for _, stranger in strangers:
                        stranger.close()
                finally:
                    os.kill(process.pid, signal.SIGCONT)

    run(check())


def test_the_jump_hosts_process_is_told_none_of_the_hosts_settings(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKURIVER_TOKEN", "a secret")

    async def check() -> None:
        async with a_proxy(tmp_path) as proxy, proxy.jump(password=TOKEN):
            process = proxy.proxy._jump_host._process._process
            assert process is not None
            assert b"a secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()

    run(check())


def test_a_jump_hosts_process_that_was_killed_takes_its_connections_along_and_is_started_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jump, "RESTART_SECONDS", 0)

    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            async with proxy.jump(password=TOKEN) as connection:
                reader, _ = await connection.open_connection("task", 22)
                process = proxy.proxy._jump_host._process._process
                assert process is not None
                process.kill()
                with contextlib.suppress(asyncssh.ConnectionLost):
                    assert await reader.read() == b""
            await proxy.hops.at_rest()
            async with connected(proxy, "jump") as (reader, writer):
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"

    run(check())


def test_handshakes_of_one_address_have_a_rate_and_request_lines_do_not_wait_for_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path, limits=Limits(max_handshakes=0.1, handshake_timeout=5)) as proxy:
            first, _ = strangers = await proxy.request(b"SSH-2.0-stranger\r\n")
            assert (await first.readline()).startswith(b"SSH-2.0-")
            refused, more = await proxy.request(b"SSH-2.0-stranger\r\n")
            assert await refused.read() == b"Too many connections came at once; try again in a few seconds.\r\n"
            async with connected(proxy, "request") as (reader, writer):
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
            for writer in (strangers[1], more):
                writer.close()

    run(check())


def test_of_those_who_are_at_their_login_one_address_evicts_only_its_own(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jump, "MOST_STRANGERS_OF_SOURCE", 3)

    async def stranger(proxy: Proxy, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, local_addr=(address, 0))
        writer.write(b"SSH-2.0-stranger\r\n")
        assert (await reader.readline()).startswith(b"SSH-2.0-")
        return reader, writer

    async def check() -> None:
        async with a_proxy(tmp_path) as proxy:
            quiet = await stranger(proxy, "127.0.0.2")
            loud = [await stranger(proxy, "127.0.0.1") for _ in range(6)]
            for reader, _ in loud[:3]:
                with contextlib.suppress(ConnectionError):
                    await reader.read()  # to its end
            assert len(proxy.proxy._jump_host._strangers) == 4
            quiet[1].write(b"\0" * 16)
            assert not quiet[0].at_eof()
            for _, writer in [quiet, *loud]:
                writer.close()

    run(check())


def test_the_jump_host_has_no_shell_and_forwards_nothing_else(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy, proxy.jump(password=TOKEN) as connection:
            attempts: list[Awaitable[Any]] = [
                connection.run("true"),
                connection.forward_remote_port("", 0, "127.0.0.1", 1),
                connection.open_unix_connection("/tmp/socket"),
                connection.forward_remote_path("/tmp/socket", "/tmp/other"),
            ]
            for attempt in attempts:
                with pytest.raises((asyncssh.ChannelOpenError, asyncssh.ChannelListenError)):
                    await attempt

    run(check())


def test_the_jump_hosts_own_keys_stay_the_same(run: Run, tmp_path: Path) -> None:
    async def key(kind: str) -> bytes:
        async with a_proxy(tmp_path) as proxy, proxy.jump(password=TOKEN, server_host_key_algs=[kind]) as connection:
            found = connection.get_server_host_key()
            assert found is not None
            return found.export_public_key()

    async def check() -> None:
        for kind in ("ssh-ed25519", "ecdsa-sha2-nistp256"):
            assert await key(kind) == await key(kind)

    run(check())
    made = sorted(tmp_path.glob("ssh_host_*"))
    assert [path.name for path in made] == ["ssh_host_ecdsa_key", "ssh_host_ed25519_key"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)


@contextlib.asynccontextmanager
async def connected(proxy: Proxy, way: str) -> AsyncIterator[tuple[Any, Any]]:
    """Reader and writer of a connection to the task."""
    if way == "jump":
        async with proxy.jump(password=TOKEN) as connection:
            yield await connection.open_connection("task", 22)
    else:
        reader, writer = await proxy.request(request())
        assert await reader.readline() == b"SUCCESS\n"
        yield reader, writer
        writer.close()


ways = pytest.mark.parametrize("way", ["request", "jump"])


@ways
@pytest.mark.parametrize("client", CLIENTS)
def test_a_connection_with_a_rate_moves_everything_unchanged_and_not_faster(
    run: Run, tmp_path: Path, way: str, client: str
) -> None:
    data = bytes(range(256)) * (2 * LEAST_RATE // 256)
    took: dict[str, float] = {}

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take everything, then send as much: each direction is measured by itself."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await reader.readexactly(len(data)) == data
        took["to the container"] = loop.time() - began
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def check() -> None:
        limits = Limits(max_rate=LEAST_RATE)
        async with a_proxy(tmp_path, client, swallow, limits) as proxy, connected(proxy, way) as (reader, writer):
            loop = asyncio.get_running_loop()
            writer.write(data)
            began = loop.time()
            assert await reader.readexactly(1) == data[:1]
            assert await reader.readexactly(len(data) - 1) == data[1:]
            took["both"] = loop.time() - began

    run(check())
    # Not a matter of how fast this machine is: less time would be more bytes than the rate lets through.
    assert took["to the container"] >= len(data) / LEAST_RATE - 1
    assert took["both"] >= 2 * len(data) / LEAST_RATE - 2


@ways
def test_without_a_rate_nothing_of_it_is_in_a_connections_way(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    made: list[TaskConnection] = []
    opened = TaskConnection.open

    async def open_and_note(connection: TaskConnection) -> None:
        made.append(connection)
        await opened(connection)

    monkeypatch.setattr(TaskConnection, "open", open_and_note)

    async def check() -> None:
        for limits in (Limits(), Limits(max_rate=LEAST_RATE)):
            async with a_proxy(tmp_path, limits=limits) as proxy, connected(proxy, way):
                pass

    run(check())
    free, limited = made
    assert (type(free), type(free.stream.core.sending)) == (TaskConnection, SendWindow)
    assert type(limited) is PacedConnection


@ways
def test_a_connection_in_which_nothing_passes_is_ended_and_a_busy_one_is_not(
    run: Run, tmp_path: Path, way: str
) -> None:
    async def check() -> None:
        limits = Limits(idle_timeout=0.4)
        async with (
            a_proxy(tmp_path, limits=limits) as proxy,
            connected(proxy, way) as (reader, writer),
            connected(proxy, way) as (idle, _),
        ):
            lines = proxy.hops.audit.written
            assert [(await lines.get())["event"] for _ in range(2)] == ["session_opened"] * 2
            ended = asyncio.ensure_future(lines.get())
            while not ended.done():
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
                await asyncio.sleep(0.01)  # a busy loop would keep the looks from being taken
            closed = ended.result()
            assert (closed["event"], closed["ended_by"], closed["code"]) == ("session_closed", "host", 4001)
            assert closed["reason"] == "nothing passed for 0.4 s, which is as long as this host waits"
            with contextlib.suppress(ConnectionError):
                assert await idle.read() == b""

    run(check())


@ways
def test_when_the_proxy_is_closed_the_audit_log_has_the_end_of_every_connection(
    run: Run, tmp_path: Path, way: str
) -> None:
    async def check() -> None:
        async with a_proxy(tmp_path) as proxy, connected(proxy, way) as (reader, writer):
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            lines = proxy.hops.audit.written
            assert (await lines.get())["event"] == "session_opened"
            await proxy.proxy.close()
            closed = lines.get_nowait()  # the program ends right after it
            assert (closed["event"], closed["ended_by"], closed["code"]) == ("session_closed", "host", 1001)
            assert (closed["bytes_to_container"], closed["bytes_to_user"]) == (5, 5)

    run(check())


def test_what_a_slow_user_has_not_taken_yet_when_the_task_has_ended_is_counted_too(run: Run, tmp_path: Path) -> None:
    size = 250_000  # within a stream's first window, and more than the small socket takes

    async def all_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.write(bytes(size))
        writer.close()

    async def check() -> None:
        async with a_proxy(tmp_path, "python", all_at_once) as proxy:
            proxy.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what it accepts inherits that
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, ("127.0.0.1", proxy.port))
                await loop.sock_sendall(sock, request())
                sock.shutdown(socket.SHUT_WR)
                lines = proxy.hops.audit.written
                assert (await lines.get())["event"] == "session_opened"
                closed = await lines.get()
                got = b""
                while more := await loop.sock_recv(sock, 1 << 20):
                    got += more
            assert got == b"SUCCESS\n" + bytes(size)
            assert (closed["bytes_to_user"], closed["ended_by"]) == (size, "user")

    run(check())


def test_where_the_libraries_have_no_exchange_of_the_newest_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncssh.kex.get_kex_algs", lambda: [b"curve25519-sha256"])
    with pytest.raises(UsageError, match="needs ML-KEM"):
        check("newest")
    assert check("all").known == ["curve25519-sha256"]
