"""`kohakuriver forward --on-connect CMD`: a command that is run beside a forward, each time that it is connected."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable, Sequence
from typing import IO, Any

from kohakuriver.cli.forward_view import OnConnectFailed
from kohakuriver.client.forward import Connected, Event, Resumed
from kohakuriver.client.ports import SOCKS
from kohakuriver.runtime import cancel_all, lowered_file_limit
from kohakuriver.tunnel.local_listeners import ListeningSocket

__all__ = ["OnConnect", "ports_in_environment"]

END_SECONDS = 2.0
"""How long a command that is told to end may take, before it is killed."""

_LOOK_SECONDS = 0.02


def ports_in_environment(listening: Sequence[ListeningSocket]) -> dict[str, str]:
    """The variables that tell a command the local ports: `KOHAKURIVER_PORT_<remote>`, and one for each protocol.

    Of a Unix socket it is `KOHAKURIVER_SOCKET_<remote>`, its path, and of a SOCKS port `KOHAKURIVER_SOCKS`. Where it
    leads to a Unix socket, <remote> is that one's name, as in `KOHAKURIVER_PORT_DOCKER_SOCK`, and all of its path where
    the name has no letter, or another one has it.
    """
    found = {}
    paths = {local.remote_path for local in listening if local.remote_path is not None}
    names = [_variable(path.rpartition("/")[2]) for path in paths]

    def name_of(path: str) -> str:
        name = _variable(path.rpartition("/")[2])
        return name if name and names.count(name) == 1 else _variable(path)

    for local in sorted(listening, key=lambda each: each.proto, reverse=True):  # TCP's counts
        remote = str(local.remote_port) if local.remote_path is None else name_of(local.remote_path)
        if local.path is not None:
            found[f"KOHAKURIVER_SOCKET_{remote}"] = local.path
            continue
        if local.proto == SOCKS:
            found["KOHAKURIVER_SOCKS"] = str(local.port)
            continue
        found[f"KOHAKURIVER_PORT_{remote}"] = str(local.port)
        found[f"KOHAKURIVER_PORT_{remote}_{local.proto.upper()}"] = str(local.port)
    return found


def _variable(name: str) -> str:
    """A name as it may stand in a variable's."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").upper()


class OnConnect:
    """Runs a shell's command each time a forward is connected; one that still runs is ended before.

    Args:
        command: for the shell.
        task: as it is named, which the command finds in `KOHAKURIVER_TASK`.
        listening: says where the forward listens, once it is connected.
        tell: is told of a command that failed.
        files: how many files the command may open.
        out: where its stdout goes, for `subprocess`; with `silent` both stdout and stderr go nowhere.
    """

    def __init__(
        self,
        command: str,
        task: str,
        listening: Callable[[], Sequence[ListeningSocket]],
        tell: Callable[[Event], None],
        *,
        files: int | None = None,
        out: IO[str] | None = None,
        silent: bool = False,
    ) -> None:
        self._command = command
        self._task = task
        self._listening = listening
        self._tell = tell
        self._files = files
        nowhere = asyncio.subprocess.DEVNULL
        self._out: Any = {"stdout": nowhere, "stderr": nowhere} if silent else {"stdout": out}
        self._connected = asyncio.Event()
        self._child: asyncio.subprocess.Process | None = None
        self._working = asyncio.ensure_future(self._work())

    def happened(self, event: Event) -> None:
        """To be called with what happens to the forward."""
        if isinstance(event, (Connected, Resumed)):
            self._connected.set()

    async def close(self) -> None:
        """Run it no more, and end it where it runs."""
        await cancel_all([self._working])
        await self._end()

    async def _work(self) -> None:
        while True:
            await self._connected.wait()
            self._connected.clear()
            await self._end()
            await self._run()

    async def _run(self) -> None:
        """Start it, and wait for its end or for the next time that the session is connected."""
        environment = {**os.environ, **ports_in_environment(self._listening()), "KOHAKURIVER_TASK": self._task}
        try:
            with lowered_file_limit(self._files):
                self._child = await asyncio.create_subprocess_shell(
                    self._command,
                    env=environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    **self._out,
                    start_new_session=True,  # so that all that it starts can be ended with it
                )
        except OSError as error:
            self._tell(OnConnectFailed(None, f"The command of --on-connect can't be run: {error.strerror}."))
            return
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._child.wait())]
        waits.append(asyncio.ensure_future(self._connected.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all(waits)
        if code := self._child.returncode:
            self._tell(OnConnectFailed(code, f"The command of --on-connect {_how(code)}: {self._command}"))

    async def _end(self) -> None:
        """End the command, and all that it has started; what does not go by itself is killed."""
        child = self._child
        if child is None or child.returncode is not None:
            return
        _signal(child, signal.SIGTERM)
        try:
            until = asyncio.get_running_loop().time() + END_SECONDS
            while _is_left(child) and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            if _is_left(child):
                _signal(child, getattr(signal, "SIGKILL", signal.SIGTERM))
        await child.wait()
        self._child = None


def _signal(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send it to the command and all that it has started, as far as that is still of its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "nt":
            child.send_signal(number)
        else:
            os.killpg(child.pid, number)


def _is_left(child: asyncio.subprocess.Process) -> bool:
    """Whether anything of its process group is."""
    if os.name == "nt":
        return child.returncode is None
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _how(code: int) -> str:
    return f"ended with {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
