"""`kohakuriver demo`: a cluster, a task, a forward and a checked transfer, all on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json as json_module
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.cli import output
from kohakuriver.cli.options import JsonOption
from kohakuriver.cli.signals import caught
from kohakuriver.errors import KohakuRiverError

if TYPE_CHECKING:
    from kohakuriver.client.api import Forward
    from kohakuriver.client.forward import Event
    from kohakuriver.client.host import HostClient
    from kohakuriver.config import Settings

__all__ = ["register"]

SERVICE = "kohakuriver.cli.demo_service"
TASK_NAME = "demo"
TASK_TIMEOUT = 60.0
SERVICE_TIMEOUT = 30.0
SERVICE_POLL = 0.05
MIB = 1 << 20


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: kohakuriver demo --once")(demo)


def demo(
    once: Annotated[bool, typer.Option("--once", help="End after the check instead of staying until Ctrl-C.")] = False,
    size: Annotated[int, typer.Option("--size", metavar="MIB", min=1, max=2048, help="How much to transfer.")] = 256,
    json: JsonOption = False,
) -> int:
    """Show it all at work: a cluster, a task with a web page, a forward to it, a checked transfer.

    Everything is on loopback and in a temporary directory, and gone afterwards.
    """
    from kohakuriver.runtime import run

    return run(_until_stopped(once=once, size=size * MIB, json=json))


async def _until_stopped(*, once: bool, size: int, json: bool) -> int:
    stopped = asyncio.Event()
    with caught(lambda _number: stopped.set()):
        with tempfile.TemporaryDirectory(prefix="kohakuriver-demo-") as directory:
            # A cluster of its own: one that `up` runs for this user stays what the other commands find.
            os.environ["KOHAKURIVER_CONFIG_DIR"] = directory
            return await _run_until(stopped, _Demo(Path(directory), once=once, size=size, json=json))


async def _run_until(stopped: asyncio.Event, demo: _Demo) -> int:
    running, stopping = asyncio.ensure_future(demo.run()), asyncio.ensure_future(stopped.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not running.done():
        running.cancel()  # once: a second one would cut short how the cluster ends
        await asyncio.wait({running})
    if not running.cancelled():
        running.result()
    return 0


class _Demo:
    def __init__(self, directory: Path, *, once: bool, size: int, json: bool) -> None:
        self._directory = directory
        self._once = once
        self._size = size
        self._json = json

    async def run(self) -> None:
        """All steps, in order; each is undone at the end. Raises KohakuRiverError when one fails."""
        async with self._cluster() as settings, self._task(settings) as port:
            async with self._forward(settings, port) as forward:
                await self._check(forward)
                self._say(f"Open {forward.url('http')}/ in a browser.", "open", url=forward.url("http") + "/")
                if not self._once:
                    await self._say_more(settings)
                    await forward.wait()

    @contextlib.asynccontextmanager
    async def _cluster(self) -> AsyncIterator[Settings]:
        from kohakuriver.cli.local_cluster import LocalCluster
        from kohakuriver.config import write_cluster

        cluster = LocalCluster(self._directory / "state")
        await cluster.start()
        try:
            write_cluster(cluster.cluster)
            host_url = cluster.cluster.host_url
            self._say(f"Host {host_url} and runner {cluster.runner_url} are up.", "ready", host_url=host_url)
            yield cluster.settings
        finally:
            await cluster.stop()

    @contextlib.asynccontextmanager
    async def _task(self, settings: Settings) -> AsyncIterator[int]:
        """A task that serves the page; its port."""
        from kohakuriver.client.host import HostClient, NewTask

        port = _free_port()
        command = [sys.executable, "-m", SERVICE, "--port", str(port), "--task", TASK_NAME]
        async with HostClient(settings) as host:
            await host.create(NewTask(name=TASK_NAME, backend="process", command=command))
            try:
                task = await host.wait(TASK_NAME, timeout=TASK_TIMEOUT)
                self._say(f"Task {task.task_id} ({task.name}) runs; its tunnel is connected.", "task", **task.to_json())
                yield port
            finally:
                await _remove(host)

    @contextlib.asynccontextmanager
    async def _forward(self, settings: Settings, port: int) -> AsyncIterator[Forward]:
        from kohakuriver.client.api import forward

        opened = forward(TASK_NAME, port, host=settings.named, token=settings.token, on_event=self._on_event)
        async with opened as fwd:
            await asyncio.wait_for(_until_served(fwd), SERVICE_TIMEOUT)
            yield fwd

    def _on_event(self, event: Event) -> None:
        from kohakuriver.cli.forward_view import listening_line
        from kohakuriver.client.forward import Listening

        if isinstance(event, Listening):
            self._say(listening_line(TASK_NAME, event), **event.to_json())

    async def _check(self, forward: Forward) -> None:
        """Bytes down and up, counted, timed and compared, by a program of its own beside the forward."""
        if not self._json:
            output.line(f"Transferring {self._size // MIB} MiB each way ...")
        address = f"{forward.local_host}:{forward.local_port}"
        arguments = ["-m", SERVICE, "--check", address, "--size", str(self._size)]
        checking = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
        try:
            assert checking.stdout is not None
            async for line in checking.stdout:
                self._say_transfer(json_module.loads(line))
            if await checking.wait() != 0:
                raise KohakuRiverError("The transfer failed, or bytes arrived damaged.")
        finally:
            with contextlib.suppress(ProcessLookupError):
                checking.kill()
            await checking.wait()

    def _say_transfer(self, result: dict[str, Any]) -> None:
        speed = result["bytes"] / max(result["seconds"], 1e-9)
        verdict = "sha256 equal" if result["intact"] else "DAMAGED"
        where = "from the task" if result["direction"] == "down" else "to the task"
        text = f"{output.size(result['bytes'])} {where} in {result['seconds']:.2f} s: {output.size(speed)}/s, {verdict}"
        self._say(text, "transfer", **result)

    async def _say_more(self, settings: Settings) -> None:
        from kohakuriver.client.host import HostClient

        async with HostClient(settings) as host:
            link = (await host.login_link()).url
        self._say(f"The dashboard, in a browser, within a minute, once: {link}", "login", url=link)
        if not self._json:
            # `make demo` installs it where no shell looks for programs.
            program = "kohakuriver" if shutil.which("kohakuriver") else f"{sys.executable} -m kohakuriver"
            output.line(f"From another terminal: KOHAKURIVER_CONFIG_DIR={self._directory} {program} vps list")
            output.line("Ctrl-C ends it all.")

    def _say(self, text: str, event: str, **fields: Any) -> None:
        if self._json:
            output.json_line({"event": event, **fields})
        else:
            output.line(text)


async def _remove(host: HostClient) -> None:
    """Remove the task, also while we are being cancelled; a host that is gone already has no task."""
    with contextlib.suppress(KohakuRiverError):
        await asyncio.shield(host.remove(TASK_NAME))


async def _until_served(forward: Forward) -> None:
    """Wait until the service behind `forward` answers: its process may still be starting."""
    while True:
        reader, writer = await asyncio.open_connection(forward.local_host, forward.local_port)
        try:
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            if await reader.read(1):
                return
        except OSError:
            pass  # reset: nothing listens there yet
        finally:
            writer.close()
        await asyncio.sleep(SERVICE_POLL)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
