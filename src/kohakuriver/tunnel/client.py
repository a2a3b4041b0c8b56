"""``python -m kohakuriver.tunnel.client``: the tunnel client where Python is there anyway.

The same endpoint, flags and environment as the static binary (``kohakuriver-tunnel/``), which is the one to prefer:
it needs nothing in the image, and less processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from kohakuriver._frame import FrameWalker
from kohakuriver.descriptors import prepare
from kohakuriver.errors import KohakuRiverError, NotAllowedError, UsageError
from kohakuriver.runtime import run
from kohakuriver.tunnel.backoff import Reconnect
from kohakuriver.tunnel.container_endpoint import ContainerEndpoint
from kohakuriver.tunnel.dial import Server, open_link
from kohakuriver.tunnel.error_text import WINDOW_PASSED
from kohakuriver.tunnel.keeper import Keeper
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.listeners import listening
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.own_ports import look
from kohakuriver.tunnel.own_token import OwnToken
from kohakuriver.tunnel.protocol import NEW_TOKEN, PORTS, SESSION_ID, CloseCode, ErrorText, PortsQuestion
from kohakuriver.tunnel.settings import EndpointConfig, from_environment

log = logging.getLogger("tunnel-client")

LOOK_FOR_TOKEN = 0.2
"""How soon, in seconds, a token that a runner lays down is seen by a client that has no good one."""


class TunnelClient:
    """Keeps a container's tunnel up.

    Args:
        runner_url: ``http``, ``https``, ``ws`` or ``wss`` address of the runner, or ``unix:`` and a socket's path.
        container_id: this container's id on the tunnel.
        token: its credentials; None for a runner that wants none.
        reconnect_delay: seconds that the pause between attempts grows to.
        max_reconnect: failures in a row to give up after; 0 for never.
        stays: it goes on, after a long pause, where another client has taken over.
    """

    def __init__(
        self,
        runner_url: str,
        container_id: str,
        *,
        token: OwnToken | None = None,
        reconnect_delay: float = 5.0,
        max_reconnect: int = 0,
        stays: bool = False,
        config: EndpointConfig | None = None,
    ) -> None:
        self.socket = _socket_in(runner_url)
        base = "ws://localhost" if self.socket else runner_url.rstrip("/")
        for http, ws in (("http://", "ws://"), ("https://", "wss://")):
            if base.startswith(http):
                base = ws + base.removeprefix(http)
        self.url = f"{base}/ws/tunnel/{quote(container_id, safe='')}"
        self.token = token or OwnToken(None)
        self._reconnect = Reconnect(delay=reconnect_delay, most=max_reconnect, stays=stays)
        self.config = config
        self.link: Link | None = None
        self._keeper = Keeper()

    async def serve(self) -> int:
        """Keep the tunnel up until it is replaced (0) or the attempts are used up (1); then all streams end."""
        try:
            return await self._keep_up()
        finally:
            self._keeper.close(ErrorText("ECONNRESET", "the tunnel client has ended"))

    async def _keep_up(self) -> int:
        while True:
            lived: float | None = None
            code: int | None = None
            try:
                lived, code = await self._once()
            except KohakuRiverError as error:
                log.warning("%s", error)
                code = error.status if isinstance(error, NotAllowedError) else None
            if code == CloseCode.REPLACED:
                log.warning("another tunnel client of this container has taken over")
            verdict = self._reconnect.after(lived, code)
            if verdict.end:
                return self._ended(verdict.end)
            await self._pause(verdict.pause())

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until there is a new token."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not self.token.is_there:  # noqa: ASYNC110 - a file
            await asyncio.sleep(min(left, LOOK_FOR_TOKEN))

    def _ended(self, why: str) -> int:
        if why == "replaced":
            return 0
        log.error("giving up after %d failures in a row", self._reconnect.failures)
        return 1

    async def _once(self) -> tuple[float, int]:
        """One tunnel, from its handshake to its end: how many seconds it was up, and its close code."""
        gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        endpoint = _Tunnel(gone, self.token, self.config, self._keeper)
        server = Server(self.url, self.token.now(), peer="runner", client=self.token.client, socket=self.socket)
        self.link = await open_link(server, FrameWalker(masked=False), endpoint)
        endpoint.attach(self.link)
        began = time.monotonic()
        log.info("tunnel connected, version %d", self.link.version)
        try:
            code = await gone
            return time.monotonic() - began, code
        finally:
            self.link.abort()
            await endpoint.close()


class _Tunnel(ContainerEndpoint):
    def __init__(
        self, gone: asyncio.Future[int], token: OwnToken, config: EndpointConfig | None, keeper: Keeper
    ) -> None:
        super().__init__(config=config, keeper=keeper)
        self._gone = gone
        self._token = token
        self._looking: asyncio.Task[None] | None = None

    def pinged(self, client_id: int, payload: bytes) -> None:
        if client_id == SESSION_ID and payload == NEW_TOKEN:
            self._token.new_one_is_there()

    def asked_for_ports(self, client_id: int, payload: bytes) -> None:
        """One look at a time is enough: the runner asks for everybody. It has a thread, since it takes a while."""
        question = PortsQuestion.parse(payload)
        link = self.link
        busy = self._looking is not None and not self._looking.done()
        if question is None or link is None or link.version < 2 or client_id != SESSION_ID or busy:
            self.totals.unknown_messages += 1
        else:
            self._looking = asyncio.get_running_loop().create_task(self._tell_ports(link, question))

    async def _tell_ports(self, link: Link, question: PortsQuestion) -> None:
        answer = await asyncio.get_running_loop().run_in_executor(None, look, question)
        if self.link is link:
            link.send_message(PORTS, SESSION_ID, answer.pack())

    def keeps(self, code: int) -> bool:
        """Whatever closed the tunnel: it comes back, and the streams are users' (rule 9 of kept streams)."""
        return True

    def addresses(self, port: int, *, udp: bool) -> Iterator[str]:
        """UDP tells of no refusal in time: it goes to where something is bound already, if anything is.

        For TCP the kernel is asked only where loopback refuses: it lists every connection of the container.
        """
        if not udp:
            yield from self.hosts
        bound = listening(Path("/proc/net"), port, udp=udp)
        yield from (bound or self.hosts) if udp else (address for address in bound if address not in self.hosts)

    def window_passed(self, stream: TcpStream) -> None:
        """This link is shared by all users of the container: the runner ends the session of the one that did it."""
        stream.act(stream.core.local_lost(WINDOW_PASSED.pack()))

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        super().link_closed(link, code, reason)
        if not self._gone.done():
            self._gone.set_result(code)


def _socket_in(url: str) -> Path | None:
    """The path in ``unix:PATH``, None for another URL. Raises UsageError."""
    scheme, _, path = url.partition(":")
    if scheme != "unix":
        return None
    if not path.startswith("/") or path.endswith("/"):
        raise UsageError(f"{url}: unix: takes the whole path of a socket, as unix:/run/runner.sock")
    return Path(path)


def _arguments(argv: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    def env(*names: str) -> str | None:
        return next((environ[name] for name in names if environ.get(name)), None)

    parser = argparse.ArgumentParser(prog="tunnel-client", description="Carries this container's ports to its runner.")
    parser.add_argument("--runner-url", default=env("RUNNER_URL", "KOHAKURIVER_TUNNEL_URL"))
    parser.add_argument("--container-id", default=env("CONTAINER_ID", "KOHAKURIVER_CONTAINER_ID"))
    parser.add_argument("--token-file", default=env("KOHAKURIVER_TUNNEL_TOKEN_FILE"))
    parser.add_argument("--take-token", default=env("KOHAKURIVER_TUNNEL_TAKE_TOKEN"))
    parser.add_argument("--reconnect-delay", type=float, default=5.0)
    parser.add_argument("--max-reconnect", type=int, default=0)
    parser.add_argument("--open-stdin", action="store_true")
    parser.add_argument("--log-level", default="info", choices=["error", "warn", "info", "debug"])
    parser.add_argument("mode", nargs="?", choices=["run"])
    options, command = argv, None
    if "run" in argv:
        at = list(argv).index("run")
        options, command = argv[: at + 1], [*argv[at + 1 :]]
        if command[:1] == ["--"]:
            command = command[1:]
    arguments = parser.parse_args(options)
    arguments.command = command
    for name in ("runner_url", "container_id"):
        if not getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')} is needed")
    return arguments


def _own_token(arguments: argparse.Namespace) -> OwnToken:
    """The credentials; a token that is to be taken is, before a command is started that could read it."""
    if arguments.take_token is None:
        return OwnToken(Path(arguments.token_file) if arguments.token_file else None)
    token = OwnToken(Path(arguments.take_token), take=True)
    token.new_one_is_there()
    return token


async def _work(arguments: argparse.Namespace) -> int:
    token = _own_token(arguments)
    client = TunnelClient(
        arguments.runner_url,
        arguments.container_id,
        token=token,
        reconnect_delay=arguments.reconnect_delay,
        max_reconnect=arguments.max_reconnect,
        stays=arguments.command is not None,
        config=from_environment(),
    )
    serving = asyncio.ensure_future(client.serve())
    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiting: list[asyncio.Future[int]] = [stopped]
    if arguments.command:
        waiting.append(asyncio.ensure_future(_command(arguments.command, open_stdin=arguments.open_stdin)))
    else:

        def stop(number: int) -> None:
            if not stopped.done():
                stopped.set_result(0)

        _on_signals(stop)
    if arguments.command is None:
        waiting.append(serving)
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    serving.cancel()
    return next(iter(done)).result()


def _on_signals(act: Callable[[int], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, act, number)


async def _command(command: Sequence[str], *, open_stdin: bool) -> int:
    """Run ``command``, pass signals on, and return its exit code (128 + n where a signal ended it).

    With ``open_stdin`` its input stays open and empty, else it has ours.
    """
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE if open_stdin else None)
    except OSError as exc:
        print(f"tunnel-client: {command[0]} can't be started: {exc.strerror}", file=sys.stderr)
        return 127 if isinstance(exc, FileNotFoundError) else 126

    def forward(number: int) -> None:
        if process.returncode is None:
            process.send_signal(number)

    _on_signals(forward)
    code = await process.wait()
    return code if code >= 0 else 128 - code


def main() -> int:
    """The command line; returns the exit code."""
    prepare()
    arguments = _arguments(sys.argv[1:], os.environ)
    level = {"warn": "warning"}.get(arguments.log_level, arguments.log_level).upper()
    logging.basicConfig(stream=sys.stderr, level=level, format="%(name)s: %(message)s")
    try:
        return run(_work(arguments))
    except UsageError as error:
        print(f"tunnel-client: {error.message}", file=sys.stderr)
        return error.exit_code
    except OSError as exc:
        print(f"tunnel-client: {exc.filename}: {exc.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
