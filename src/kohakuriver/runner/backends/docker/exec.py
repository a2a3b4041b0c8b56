"""A command that runs inside a container: an exec of the engine, its streams, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any

import aiodocker
from aiodocker.exceptions import DockerError

from kohakuriver.errors import UnavailableError, UsageError
from kohakuriver.runner.backends.base import CTRL_D, STDERR, STDOUT, ExecRequest, ExecSession, locale_for
from kohakuriver.runner.backends.docker.engine import (
    ENGINE_SECONDS,
    TROUBLE,
    has,
    limit,
    own_connection,
    transport_of,
)
from kohakuriver.runner.services.fair_queue import FairQueue
from kohakuriver.runtime import cancel_all
from kohakuriver.tunnel.terminal import is_utf8
from kohakuriver.web.background import in_background

__all__ = ["DockerExec", "start"]

MARK = "KOHAKURIVER_EXEC"
"""Every process of an exec has this in its environment: one value for each."""

NOT_FOUND, NOT_EXECUTABLE = 127, 126
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LOOK_AGAIN_SECONDS, _LOOK_SELDOM_SECONDS = 0.02, 1.0
_START_SECONDS = 2.0
_END_SECONDS = 5.0
_BLOCKED_SECONDS = 0.1
_PATIENT_SECONDS = 0.1  # a pause as long as that, and the command was long a program that the runner could signal

# Run by the `sh` that there is, with $1 and $2 the terminal's rows and columns (0: no terminal). An engine gives the
# terminal its size only once the program runs, which may have asked for it by then.
_SIZE = """\
[ "$1" = 0 ] || stty rows "$1" cols "$2" 2>/dev/null
shift 2
"""
_COMMAND = _SIZE + 'exec "$@"'
# Gives way to the best shell there is.
_BEST_SHELL = (
    _SIZE
    + """\
for shell in "$SHELL" bash ash; do
    case $shell in "" | */nologin | */false) continue ;; esac
    path=$(command -v "$shell") && exec "$path"
done
exec "$0"
"""
)
# Run in the container where the runner may not signal its processes itself; exits 0 when it found one.
_HANG_UP = """\
found=1
for d in /proc/[0-9]*; do
    grep -q "$1" "$d/environ" 2>/dev/null && kill -HUP "${d#/proc/}" && found=0
done
exit $found
"""


@dataclass(frozen=True)
class Engine:
    """A client of the engine, and the queue in front of it."""

    docker: aiodocker.Docker
    calls: FairQueue
    starts: FairQueue


class DockerExec(ExecSession):
    """`env` are the variables of the exec's processes, their mark too; the client of `stream` is for that alone."""

    def __init__(
        self, at: Engine, container: str, exec_id: str, stream: Any, request: ExecRequest, env: Mapping[str, str]
    ) -> None:
        self._engine = at
        self._docker = at.docker
        self._container = container
        self._exec: Any = at.docker.containers.exec(exec_id)
        self._stream = stream
        self._request = request
        self._env = env
        self._first = True
        self._ended = False
        self._eof = False
        self._code: int | None = None

    async def read(self) -> tuple[int, bytes] | None:
        if self._ended:
            return None
        with _lost_engine_is_the_end():
            while (message := await self._stream.read_out()) is not None:
                stream, data = (STDERR if message.stream == STDERR else STDOUT), bytes(message.data)
                if not data:
                    continue
                if self._first and await self._never_ran():
                    self._ended = True
                    return (STDOUT if self._request.tty else STDERR), await self._why(data)
                self._first = False
                return stream, data
        self._ended = True
        return None

    async def _never_ran(self) -> bool:
        """Whether what came is the engine's word and not a program's, which may print the same.

        The engine says it last: by then the exec has ended, with a code, and never was a process.
        """
        try:
            show = await self._exec.inspect()
        except TROUBLE:
            return False
        return not show["Running"] and not show.get("Pid") and show["ExitCode"] in (NOT_FOUND, NOT_EXECUTABLE)

    async def _why(self, data: bytes) -> bytes:
        """What the user reads, and with which exit code: 127 where the program is not there, and nothing else is wrong.

        An engine's code is 126 for that, too, and has only words for the difference; so it is asked for the file. Else
        the user reads the engine's own words, whichever they are.
        """
        program = self._request.command[0] if self._request.command else "the shell"
        if await self._is_missing(program):
            self._code = NOT_FOUND
            return f"{program}: command not found".encode("utf-8", "surrogateescape") + (
                b"\r\n" if self._request.tty else b"\n"
            )
        self._code = NOT_EXECUTABLE
        return data

    async def _is_missing(self, program: str) -> bool:
        """Whether there is no such file, nor one in a folder of the PATH; the engine looks into no tmpfs."""
        folders = self._env.get("PATH", _DEFAULT_PATH).split(":")
        if "/" in program:
            folders = [self._request.workdir or "/"]
        with contextlib.suppress(*TROUBLE):
            for folder in folders:
                if folder and await has(self._docker, self._container, str(PurePosixPath(folder, program))):
                    return False
            return True
        return False

    async def write(self, data: bytes) -> None:
        if self._ended or self._eof:
            return
        writing = asyncio.ensure_future(self._stream.write_in(data))
        try:
            while not (await asyncio.wait({writing}, timeout=_BLOCKED_SECONDS))[0]:
                # The engine has said the last word and reads no more: aiohttp would wait for it to do so for ever.
                if (transport := self._transport()) is None or transport.is_closing():
                    self._abort()
        finally:
            await cancel_all([writing])

    def _transport(self) -> asyncio.Transport | None:
        return transport_of(self._stream)

    def _abort(self) -> None:
        if (transport := self._transport()) is not None:
            transport.abort()

    async def write_eof(self) -> None:
        if self._request.tty:
            await self.write(CTRL_D)
            return
        self._eof = True
        transport = self._transport()
        if transport is not None and not transport.is_closing() and transport.can_write_eof():
            transport.write_eof()

    async def resize(self, rows: int, cols: int) -> None:
        if self._request.tty and not self._ended:
            with contextlib.suppress(*TROUBLE):  # it may just have ended
                await self._exec.resize(h=rows, w=cols)

    async def resize_first(self, rows: int, cols: int) -> None:
        """Give a new terminal its size, as soon as its program runs."""
        for _ in range(int(_START_SECONDS / _LOOK_AGAIN_SECONDS) if self._request.tty else 0):
            try:
                await self._exec.resize(h=rows, w=cols)
                return
            except DockerError:
                show = await self._exec.inspect()
                if not show["Running"] and show["ExitCode"] is not None:
                    return
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)

    async def wait(self) -> int:
        if self._code is None:
            show = await self._ended_show()
            code = None if show is None else show["ExitCode"]
            self._code = 128 + signal.SIGKILL if code is None else int(code)
        return self._code

    async def _ended_show(self) -> dict[str, Any] | None:
        """What the engine says once the command has ended; None where it does not know it any more."""
        for _ in range(int(_END_SECONDS / _LOOK_AGAIN_SECONDS)):
            try:
                show: dict[str, Any] = await self._exec.inspect()
            except TROUBLE:  # the container, or the engine, has gone
                return None
            if not show["Running"]:
                return show
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)  # its output ends a moment before it does
        return None

    async def close(self) -> None:
        try:
            await self._stream.close()
        except (AssertionError, OSError):
            pass  # the engine has gone
        await self._stream.docker.close()
        if not self._ended and self._code is None:
            ending = in_background(self.hang_up(), "ending a command that nobody waits for")
            await asyncio.wait({ending}, timeout=_START_SECONDS)  # a runner that ends does not wait for it
        self._ended = True

    async def hang_up(self) -> None:
        """SIGHUP to the command: the engine leaves it running when its streams are closed.

        A busy engine starts what it was told to start seconds later, so it is asked until it has. No place is held
        between two looks.
        """
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + ENGINE_SECONDS, _LOOK_AGAIN_SECONDS
        while loop.time() < until:
            async with self._engine.calls.place():
                if await self._is_hung_up(inside=pause > _PATIENT_SECONDS):
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LOOK_SELDOM_SECONDS)

    async def _is_hung_up(self, inside: bool) -> bool:
        """Signal the command where it runs; False where it does not run yet, or the engine gave no answer.

        `inside`: also by a shell of the container's.
        """
        try:
            show = await self._exec.inspect()
            if not show["Running"]:
                return show["ExitCode"] is not None
            return self._signalled(int(show.get("Pid") or 0)) or (inside and await self._signalled_inside())
        except DockerError as error:
            return error.status in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT)  # its container has gone, or is down
        except TROUBLE:
            return False

    def _signalled(self, pid: int) -> bool:
        """Whether the runner may signal the command, and did. What has not its mark is another's, or no program yet."""
        try:
            if not pid or self._env[MARK].encode() not in Path(f"/proc/{pid}/environ").read_bytes():
                return False
            _signal(pid)
        except OSError:
            return False  # the runner is not root, or sees other processes than the engine does
        return True

    async def _signalled_inside(self) -> bool:
        """The same by a shell in the container, where there is one."""
        container: Any = self._docker.containers.container(self._container)
        asked = await container.exec(["/bin/sh", "-c", _HANG_UP, "sh", self._env[MARK]], stdout=False, stderr=False)
        await asked.start(detach=True, timeout=limit())
        for _ in range(int(_START_SECONDS / _LOOK_AGAIN_SECONDS)):
            show = await asked.inspect()
            if not show["Running"] and show["ExitCode"] is not None:
                return bool(show["ExitCode"] == 0)
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        return False


def _signal(pid: int) -> None:
    """SIGHUP to a command and, where it leads one, its process group."""
    if os.getpgid(pid) == pid:
        os.killpg(pid, signal.SIGHUP)
    else:
        os.kill(pid, signal.SIGHUP)


@contextlib.contextmanager
def _lost_engine_is_the_end() -> Any:
    with contextlib.suppress(*TROUBLE):
        yield


async def start(at: Engine, container: str, request: ExecRequest) -> DockerExec:
    """Start a command in a container that runs. Raises UnavailableError "no_shell", and the engine's own errors."""
    async with at.starts.place():
        return await _started(at, container, request)


async def _started(at: Engine, container: str, request: ExecRequest) -> DockerExec:
    docker = at.docker
    show = await docker.containers.container(container).show()
    image_env = dict(text.partition("=")[::2] for text in show["Config"]["Env"] or ())
    command = await _command_line(docker, container, request, image_env)
    env = {**request.env, **locale_for(request, image_env.keys() | request.env.keys()), MARK: secrets.token_hex(8)}
    in_container: Any = docker.containers.container(container)  # not all annotated
    place = {"user": request.user, "workdir": request.workdir or None}
    created = await in_container.exec(command, stdin=True, tty=request.tty, environment=env, **place)
    own = own_connection(docker)
    stream: Any = own.containers.exec(created.id).start(detach=False)
    session = DockerExec(at, container, created.id, stream, request, {**image_env, **env})
    try:
        await asyncio.wait_for(stream.__aenter__(), ENGINE_SECONDS)
        await session.resize_first(request.rows, request.cols)
    except BaseException as error:
        # Nobody waits for it, and the engine may start it all the same.
        if isinstance(error, asyncio.CancelledError | asyncio.TimeoutError):
            in_background(session.hang_up(), "ending a command that nobody waits for")
        await own.close()
        raise
    return session


async def _command_line(
    docker: aiodocker.Docker, container: str, request: ExecRequest, env: dict[str, str]
) -> list[str]:
    """What the engine is told to run. Raises UnavailableError "no_shell"."""
    as_text = all(is_utf8(part) for part in request.command)
    if not request.tty and request.command and as_text:
        return list(request.command)
    size = [str(request.rows), str(request.cols)] if request.tty else ["0", "0"]
    if await has(docker, container, "/bin/sh"):
        if not as_text:
            return ["/bin/sh", "-c", _spelt_out(request.command), "/bin/sh", *size]
        script = _COMMAND if request.command else _BEST_SHELL
        return ["/bin/sh", "-c", script, "/bin/sh", *size, *request.command]
    if not as_text:
        raise UsageError("Arguments that are not UTF-8 need a /bin/sh in the container, and there is none.")
    return list(request.command) or [await _find_shell(docker, container, env)]


def _spelt_out(command: Sequence[str]) -> str:
    """A script that runs a command whose bytes the engine's JSON can't carry. The dot keeps line ends from `$(…)`."""
    lines = [_SIZE]
    for part in command:
        octal = "".join(f"\\{byte:03o}" for byte in part.encode("utf-8", "surrogateescape"))
        lines.append(f'part=$(printf \'{octal}.\'); set -- "$@" "${{part%.}}"\n')
    return "".join(lines) + 'exec "$@"'


async def _find_shell(docker: aiodocker.Docker, container: str, env: dict[str, str]) -> str:
    """A shell at some unusual place."""
    folders = env.get("PATH", _DEFAULT_PATH).split(":")
    named = [env["SHELL"]] if env.get("SHELL", "").startswith("/") else []
    for path in [*named, *(f"{folder}/{name}" for name in ("bash", "ash", "sh") for folder in folders if folder)]:
        if await has(docker, container, path):
            return path
    raise UnavailableError(
        "There is no shell in the task's image; name a program that it has behind `--`.", code="no_shell"
    )
