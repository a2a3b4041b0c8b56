"""Fuzz target for the SSH proxy's first line (docs/protocol.md §7), over real sockets, with a real host's rights.

`python -m tests.fuzz.ssh_line --seconds 60` mutates the corpus for that long and keeps what fails.

The first byte of an input says into pieces of how many bytes the rest is cut, the second whether the peer ends with
end-of-file (even) or a reset (odd). The invariants: the answer is the one that a plain reading of the specification
gives, in one printable line; bytes behind a line that is granted come back from the task unchanged; and when the peer
has gone, nothing is left of it: no task, no file, no session, no grant. Nothing of that is an error for the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from kohakuriver import runtime as loops
from kohakuriver.session.carried import Route
from kohakuriver.ssh_proxy.server import SshProxy
from tests.fuzz.handshake import naming, pieces, write
from tests.fuzz.mutation import fuzz, mutate
from tests.support.hops import CONTAINER, Chain, chain, echo, service, until
from tests.support.host_only import HostUnderTest, a_host

Check = Callable[[bytes], Coroutine[Any, Any, None]]

MAX_REQUEST = 4096
MAX_BANNER = 64 * 1024
MINE, OTHERS = "mine", "others"
LONG = b"x" * 4000

NO_REQUEST = "The request must be"
TOO_LONG = "The request line has more than 4096 bytes"
NO_TEXT = "The request is not text in UTF-8"
NO_TOKEN = "This needs a token"
WRONG_TOKEN = "The host does not know this token"
WRONG_PASS = "This pass was used or has run out"
OTHER_PASS = "This pass is for another task"
NO_TASK = "There is no task"
NOT_YOURS = "Task others"


class Proxy:
    """An SSH proxy, the host that says who may go where, and an echo service in the one task that `token` reaches."""

    def __init__(self, host: HostUnderTest, hops: Chain, port: int, directory: Path) -> None:
        self.host = host
        self.hops = hops
        self.echo_port = port
        self.token = ""
        self.ids: dict[str, str] = {}
        sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = sock.getsockname()[1]
        self.proxy = SshProxy(
            sock,
            authorize=self._authorize,
            keyholders=host.forwards.keyholder,
            check_user=self._check_user,
            host_keys=directory,
        )

    async def _check_user(self, token: str) -> object:
        return await self.host.forwards._credentials.caller(token)

    async def _authorize(self, token: str | None, task: str, port: int | None) -> Route:
        """As the host says, but at a node that is really there."""
        target = await self.host.forwards.authorize_ssh(token, task, port)
        url = self.hops.runner_url.replace("http", "ws")
        ticket = f"ticket {CONTAINER} me"
        return replace(target, port=self.echo_port, runner_ws_url=url, container=CONTAINER, ticket=ticket)

    async def fill(self, directory: Path) -> None:
        """Two tasks on a node, a user who has one of them."""
        runner = await self.host.runner()
        user, self.token = await self.host.person("ann")
        for name, client in ((MINE, user), (OTHERS, self.host.user)):
            answer = await client.post("/api/tasks", json={"name": name, "backend": "process", "command": ["x"]})
            assert answer.status_code == 201, answer.text
            self.ids[name] = str(answer.json()["task_id"])
        await runner.beat()
        self.proxy.start()

    async def given(self, data: bytes) -> tuple[bytes, set[str]]:
        """The input with what it can't know filled in, and the passes among that."""
        passes: set[str] = set()
        while b"{pass}" in data:
            _, token = await self.host.forwards._credentials.caller(self.token)
            one = await self.host.forwards.ssh_pass(token, int(self.ids[MINE]))
            passes.add(one)
            data = data.replace(b"{pass}", one.encode(), 1)
        known = {b"{token}": self.token.encode(), b"{id}": self.ids[MINE].encode(), b"{long}": LONG}
        for word, value in known.items():
            data = data.replace(word, value, 8)
        return data, passes

    def expected(self, data: bytes, passes: set[str]) -> str | bytes | None:
        """What docs/protocol.md §7 has to say: the beginning of an error, what is echoed, None for no answer."""
        line, newline, behind = data.partition(b"\n")
        if not newline or len(line) >= MAX_REQUEST:
            return TOO_LONG if len(data) >= MAX_REQUEST else None
        words = line.split()
        if len(words) not in (2, 3) or words[0] != b"REQUEST_TUNNEL":
            return NO_REQUEST
        try:
            task, *token = (word.decode() for word in words[1:])
        except UnicodeDecodeError:
            return NO_TEXT
        return self._may(task, token[0] if token else None, passes) or behind

    def _may(self, task: str, token: str | None, passes: set[str]) -> str | None:
        if token is None:
            return NO_TOKEN
        if token.startswith("krp_") and token not in passes:
            return WRONG_PASS
        if token not in {self.token, *passes}:
            return WRONG_TOKEN
        number = task.lstrip("0") if task.isascii() and task.isdigit() and len(task) < 19 else None
        if task == OTHERS or number == self.ids[OTHERS]:
            return NOT_YOURS
        return None if task == MINE or number == self.ids[MINE] else NO_TASK


async def answer(port: int, sent: list[bytes], *, reset: bool) -> bytes:
    """All that comes back to these bytes and end-of-file; nothing for a peer that resets instead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await write(writer, sent)
    received = b""
    if not reset:
        with contextlib.suppress(OSError, RuntimeError):  # the proxy has hung up
            writer.write_eof()
        with contextlib.suppress(ConnectionError):
            while more := await reader.read(1 << 16):
                received += more
    writer.transport.abort()
    return received


def judge(received: bytes, expected: str | bytes | None) -> None:
    if expected is None:
        assert received == b"", received
    elif isinstance(expected, bytes):
        assert received == b"SUCCESS\n" + expected, received
    else:
        assert re.fullmatch(rb"ERROR [^\n]+\n", received), received
        sentence = received.decode().removeprefix("ERROR ").removesuffix("\n")
        assert sentence.startswith(expected), (sentence, expected)
        assert sentence.isprintable(), sentence


@contextlib.asynccontextmanager
async def proxy() -> AsyncIterator[Check]:
    """A proxy, and what checks one input against it."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        async with a_host(directory) as host, chain() as hops, service(echo) as port:
            await hops.tunnel("python")
            under_test = Proxy(host, hops, port, directory)
            await under_test.fill(directory)

            async def check(data: bytes) -> None:
                await check_one(under_test, data)

            try:
                # What the first ones leave in caches and thread pools is no growth.
                for first in (b"\0\0REQUEST_TUNNEL mine {token}\nx", b"\0\0SSH-2.0-x\r\n", b"\0\1x"):
                    await check(first)
                await until(lambda: at_rest(host, hops))
                before = resources()
                yield check
                await until(lambda: at_rest(host, hops) and all(map(_not_above, resources(), before)))
                await check(b"\0\0REQUEST_TUNNEL mine {token}\nstill there")
            finally:
                await under_test.proxy.close()


async def check_one(under_test: Proxy, data: bytes) -> None:
    ending, rest = data[1:2], data[2:]
    given, passes = await under_test.given(rest)
    reset = bool(ending and ending[0] & 1)
    received = await answer(under_test.port, pieces(data[:1] + given), reset=reset)
    if reset:
        return
    if given.startswith(b"S"):  # a jump host's business from here on: it greets, and lets nobody in
        assert not received or received.startswith(b"SSH-2.0-"), received
        assert len(received) < MAX_BANNER
    else:
        judge(received, under_test.expected(given, passes))


def at_rest(host: HostUnderTest, hops: Chain) -> bool:
    """Whether no session is under way."""
    return not len(host.grants) and not hops.server.hub.sessions


def resources() -> tuple[int, int]:
    """Open files and tasks of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


def _not_above(now: int, before: int) -> bool:
    return now <= before


def mutated(inputs: list[bytes], rng: random.Random) -> bytes:
    """One of the inputs, changed anywhere or only behind some point, so that what comes first still means something."""
    data = rng.choice(inputs)
    keep = rng.choice((0, rng.randrange(len(data) + 1)))
    return data[:keep] + mutate(data[keep:], inputs, rng)


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Check]:
    """What checks one input; in the end also that nothing was raised unseen, or logged as an error."""
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
    with capture_logs() as logged:
        async with proxy() as check:
            yield check
        errors = [each for each in logged if each["log_level"] in ("error", "critical")]
        assert not errors, errors
        assert not unseen, unseen


async def check_all(inputs: Iterable[bytes]) -> None:
    """Raise whatever an input of these leads to that it may not."""
    async with watched() as check:
        for data in inputs:
            with naming(data):
                await check(data)


async def main() -> None:
    """Fuzz against one proxy."""
    loop = asyncio.get_running_loop()
    async with watched() as check:

        def check_here(data: bytes) -> None:
            asyncio.run_coroutine_threadsafe(check(data), loop).result()

        await loop.run_in_executor(None, fuzz, check_here, "ssh_line")


if __name__ == "__main__":
    loops.run(main())
