"""A browser whose user logs in anew in it: the terminals of its pages are found again, at whichever host they were."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kohakuriver.client.lasting_terminal import LastingTerminal
from kohakuriver.config import Settings
from kohakuriver.errors import NotAllowedError
from kohakuriver.tunnel.terminal import Start
from tests.support.hops import until
from tests.support.postgres import Postgres
from tests.support.processes import PATIENCE, a_cluster, eventually
from tests.support.two_hosts import two_hosts

OUT = "the browser of this session is not logged in any more"
SHELL = Start(command=["sh", "-c", "echo shell $$; cat"], session="web")


class Site:
    """A task that two users share. Browsers log in at `login`, and have their terminals at `terminals`."""

    def __init__(self, admin: httpx.Client, login: str, terminals: str) -> None:
        self._admin = admin
        self.login = login
        self.terminals = terminals
        made = admin.post("/api/tasks", json={"backend": "process", "name": "desk", "command": ["sleep", "1000"]})
        assert made.status_code == 201, made.text
        waited = admin.get(f"/api/tasks/desk/wait?timeout={PATIENCE}")
        assert waited.status_code == 200
        for user in ("ann", "bob"):
            assert admin.post("/api/users", json={"name": user}).status_code == 201
            assert admin.post("/api/tasks/desk/shares", json={"user": user}).status_code == 201

    def token(self, user: str) -> str:
        """A new one: a link by that of the login that there is would leave that as it is."""
        return str(self._admin.post("/api/tokens", json={"user": user}).json()["token"])


@pytest.fixture(params=["one host on SQLite", "two hosts on one PostgreSQL"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    if "SQLite" in request.param:
        with a_cluster(tmp_path) as cluster:
            cluster.start_runner("n1", "--backend=process", "--user-processes")
            yield Site(cluster.http, cluster.url, cluster.url)
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    with two_hosts(tmp_path, postgres.new_database()) as hosts:
        hosts.start_runner("n1", "--backend=process", "--user-processes")
        eventually(lambda: hosts.online("n1", "b"))
        yield Site(hosts.http["a"], hosts.urls["a"], hosts.urls["b"])


class Browser:
    """A browser of a user, which is logged in. `secret` is in its cookie."""

    def __init__(self, site: Site, user: str) -> None:
        self._site = site
        self._user = user
        self.secret = ""
        self.log_in()

    def _ask(self, method: str, path: str, **fields: str) -> httpx.Response:
        port = self._site.login.rpartition(":")[2]
        cookie = {"Cookie": f"kohakuriver-host-{port}={self.secret}"} if self.secret else {}
        with httpx.Client(base_url=self._site.login, trust_env=False, timeout=PATIENCE) as client:
            answer = client.request(method, path, headers={**cookie, **fields})
        assert answer.is_success or answer.status_code == 303, answer.text
        return answer

    def log_in(self) -> None:
        """By a link that its user opens, as `kohakuriver open` does."""
        link = self._ask("POST", "/api/auth/link", Authorization=f"Bearer {self._site.token(self._user)}").json()
        self._host = f"{link['name']}:{self._site.login.rpartition(':')[2]}"
        typed = {"Host": self._host, "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}
        set_cookie = self._ask("GET", link["path"], **typed).headers["set-cookie"]
        self.secret = set_cookie.partition("=")[2].partition(";")[0]

    def log_out(self) -> None:
        self._ask("POST", "/logout", Host=self._host, Origin=f"http://{self._host}")

    @contextlib.asynccontextmanager
    async def terminal(self) -> AsyncIterator[tuple[LastingTerminal, int]]:
        """The page's terminal, and the number of the process in it."""
        async with _with_cookie(self._site.terminals, self.secret) as url:
            terminal = LastingTerminal("desk", Settings(url, "its page shows none", path="host"), SHELL)
            await terminal.open()
            try:
                said = b""
                while (told := re.search(rb"shell (\d+)", said)) is None:
                    message = await terminal.receive()
                    said += message if isinstance(message, bytes) else b""
                yield terminal, int(told[1])
            finally:
                terminal.begin_close()
                await terminal.wait_closed()


@contextlib.asynccontextmanager
async def _with_cookie(host: str, secret: str) -> AsyncIterator[str]:
    """The URL of a relay to a host, through which what shows a token shows a browser's cookie, from the host's page."""
    passing: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("sockname")[1]
        page = f"Cookie: kohakuriver-host-{port}={secret}\r\nOrigin: http://127.0.0.1:{port}\r\n"
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:  # whoever came thought better of it
            writer.close()
            return
        back, far = await asyncio.open_connection("127.0.0.1", int(host.rpartition(":")[2]))
        far.write(re.sub(rb"(?i)authorization: [^\r]*\r\n", page.encode(), head))
        passing.update(asyncio.ensure_future(_pass(*ways)) for ways in ((reader, far), (back, writer)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for each in passing:
            each.cancel()
        await asyncio.gather(*passing, return_exceptions=True)


async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(1 << 16):
            sink.write(data)
    finally:
        sink.close()


async def ended(terminal: LastingTerminal) -> str:
    """Why it was ended."""
    try:
        while await terminal.receive() is not None:
            pass
    except NotAllowedError as error:
        return error.message
    return ""


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_terminal_is_found_again_after_the_next_login_and_ends_with_the_log_out(
    site: Site, run: Callable[..., None]
) -> None:
    async def scene() -> None:
        anns, bobs = await asyncio.gather(*(asyncio.to_thread(Browser, site, user) for user in ("ann", "bob")))
        async with anns.terminal() as (terminal, shell), bobs.terminal() as (other, others_shell):
            await asyncio.to_thread(anns.log_in)
            assert OUT in await ended(terminal)
            await asyncio.to_thread(bobs.log_out)
            assert OUT in await ended(other)
        await until(lambda: not runs(others_shell))  # so what had no right was looked for
        assert runs(shell)
        async with anns.terminal() as (terminal, found):
            assert found == shell
            await asyncio.to_thread(anns.log_in)
            await asyncio.to_thread(anns.log_in)  # and once more, before anybody is back in it
            assert OUT in await ended(terminal)
        async with anns.terminal() as (terminal, found):
            assert found == shell
            await asyncio.to_thread(anns.log_out)
            assert OUT in await ended(terminal)
        await until(lambda: not runs(shell))

    run(scene())
