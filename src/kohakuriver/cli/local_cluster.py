"""A host and a runner on this machine, as child processes of the command that started them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from kohakuriver import http_proxy
from kohakuriver.backends import kind_of, names
from kohakuriver.client.host import HostClient, Node
from kohakuriver.config import Cluster, Settings, load_settings
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, LocalAddressError
from kohakuriver.limits import from_environment

__all__ = ["LocalCluster"]

START_TIMEOUT = 30.0
# Together shorter than what service managers give a program before they kill it.
RUNNER_STOP_TIMEOUT = 6.0
HOST_STOP_TIMEOUT = 3.0
ONLINE_POLL = 0.05
LOCK = "up.lock"
LOCK_TRIES = 5


class _Child:
    """One of our two programs. It ends when we do: its stdin is a pipe that only we hold."""

    def __init__(self, role: str, arguments: Sequence[str], directory: Path) -> None:
        self.role = role
        self._arguments = arguments
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> dict[str, Any]:
        """Start it and wait for its `ready` event. Raises KohakuRiverError when it ends before that."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "kohakuriver", self.role, "--json", "--exit-with-stdin", *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=self._directory,
            # Ctrl-C on our terminal is ours to pass on: the runner must go before the host does.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        try:
            ready = await asyncio.wait_for(self._ready(self._process.stdout), START_TIMEOUT)
        except asyncio.TimeoutError:
            raise KohakuRiverError(f"The {self.role} was not ready after {START_TIMEOUT:g} s.") from None
        if ready is None:
            code = await self._process.wait()
            cls = LocalAddressError if code == LocalAddressError.exit_code else KohakuRiverError
            raise cls(f"The {self.role} did not start: it ended with {code}.")
        self._reader = asyncio.ensure_future(_drain(self._process.stdout))
        return ready

    @staticmethod
    async def _ready(stdout: asyncio.StreamReader) -> dict[str, Any] | None:
        while line := await stdout.readline():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == "ready":
                    return event
        return None

    async def ended(self) -> str:
        """Wait for its end; how that went, as a sentence."""
        assert self._process is not None
        return f"The {self.role} has ended by itself ({await self._process.wait()})."

    async def stop(self, timeout: float) -> None:
        """End it: SIGTERM, and SIGKILL after `timeout` seconds."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), timeout)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reader is not None:
            await self._reader
        assert process.stdin is not None
        process.stdin.close()


async def _drain(stdout: asyncio.StreamReader) -> None:
    while await stdout.read(65536):
        pass


class LocalCluster:
    """What `kohakuriver up` runs. `state_dir` keeps everything that outlives it; ports may be 0 for any free one."""

    def __init__(
        self,
        state_dir: Path,
        *,
        host_port: int = 0,
        runner_port: int = 0,
        ssh_port: int = 0,
        allow_anonymous: bool = False,
        user_processes: bool = False,
        mount_roots: Sequence[str] = (),
        log_level: str = "warning",
    ) -> None:
        self.state_dir = state_dir.absolute()
        self.runner_url = ""
        self.cluster = Cluster("", "")
        self.node: Node | None = None
        self._host_port = host_port
        self._runner_port = runner_port
        self._ssh_port = ssh_port
        self._common = ["--log-level", log_level, *(["--allow-anonymous"] if allow_anonymous else [])]
        self._for_runner = [f"--mount-root={root}" for root in mount_roots]
        self._for_runner += ["--user-processes"] if user_processes else []
        self._children: list[_Child] = []
        self._lock: IO[str] | None = None

    @property
    def settings(self) -> Settings:
        """How to reach this cluster."""
        return load_settings(host=self.cluster.host_url, token=self.cluster.token)

    async def start(self) -> None:
        """Start both and wait until a task can be made. Raises KohakuRiverError; what had started is stopped."""
        from_environment()  # what both would refuse is better said once, before anything runs
        os.environ[http_proxy.VARIABLE] = "none"  # whatever this program and its own speak to is on this machine
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(self.state_dir)
        try:
            await self._start_children()
            await asyncio.wait_for(self._until_online(), START_TIMEOUT)
        except asyncio.TimeoutError:
            await self.stop()
            raise KohakuRiverError(f"The runner was not online after {START_TIMEOUT:g} s.") from None
        except BaseException:
            await self.stop()
            raise

    async def _start_children(self) -> None:
        state = self.state_dir
        host = ["--state-dir", str(state), "--bind", "127.0.0.1", "--port", str(self._host_port)]
        host += ["--ssh-port", str(self._ssh_port)]
        ready = await self._start_child("host", host)
        token = (state / "admin-token").read_text("utf-8").strip()
        self.cluster = Cluster(ready["url"], token, ready["ssh_proxy"], os.getpid(), str(state / LOCK))
        runner = ["--state-dir", str(state / "runner"), "--bind", "127.0.0.1", "--port", str(self._runner_port)]
        runner += ["--host-url", ready["url"], "--node-token-file", str(state / "node-token")]
        offered = [name for name in names() if not kind_of(name).scheduled]  # what nobody has set up is not missed
        runner += [*(f"--backend={name}" for name in offered), "--stop-tasks-on-exit", *self._for_runner]
        self.runner_url = (await self._start_child("runner", runner))["url"]

    async def _start_child(self, role: str, arguments: Sequence[str]) -> dict[str, Any]:
        child = _Child(role, [*arguments, *self._common], self.state_dir)
        self._children.append(child)
        return await child.start()

    async def _until_online(self) -> None:
        """The host answers as soon as it is ready; the runner's registration arrives a moment later."""
        async with HostClient(self.settings) as host:
            while True:
                with contextlib.suppress(HostUnreachableError):
                    online = [node for node in await host.nodes() if node.url == self.runner_url]
                    if online and online[0].status == "online":
                        self.node = online[0]
                        return
                await asyncio.sleep(ONLINE_POLL)

    async def child_ended(self) -> str:
        """Wait until one of the two ends by itself; which one, as a sentence."""
        waiting = [asyncio.ensure_future(child.ended()) for child in self._children]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for task in waiting:
                task.cancel()

    async def stop(self) -> None:
        """Stop the runner, which ends its tasks, then the host."""
        for child in reversed(self._children):
            await child.stop(RUNNER_STOP_TIMEOUT if child.role == "runner" else HOST_STOP_TIMEOUT)
        self._children = []
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(state_dir: Path) -> IO[str]:
    """An open file that marks `state_dir` as in use, until it is closed or this process is gone."""
    if sys.platform == "win32":
        raise KohakuRiverError("A cluster can't run on Windows; use one elsewhere with KOHAKURIVER_HOST.")
    import fcntl

    file = (state_dir / LOCK).open("w", encoding="utf-8")
    for _ in range(LOCK_TRIES):  # another command may be looking whether it is locked
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(ONLINE_POLL)
    else:
        file.close()
        raise KohakuRiverError(f"A cluster runs in {state_dir} already; give this one another --state-dir.") from None
    return file
