"""The process backend: a task is a session of processes on the node, run as the runner's own user or as another.

Its tasks end with the runner: on a drain they are stopped, and when the runner is killed the guard ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from kohakuriver.asking import asker
from kohakuriver.errors import KohakuRiverError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.relay.open_ports import TaskSockets
from kohakuriver.runner.backends.base import (
    Backend,
    ExecRequest,
    ExecSession,
    Reporter,
    Surroundings,
)
from kohakuriver.runner.backends.printed import CLIENT_CHATTER, LogRequest, Printed
from kohakuriver.runner.backends.process import reaper as guard
from kohakuriver.runner.backends.process import terminal_child
from kohakuriver.runner.backends.process.account import Account, account_named
from kohakuriver.runner.backends.process.log_reader import LogReader
from kohakuriver.runner.backends.process.logs import TaskLogs, last_of, tail
from kohakuriver.runner.services.doors import Doors
from kohakuriver.runner.services.fair_queue import FairQueue
from kohakuriver.runner.services.ssh_helper import SshHelper, free_port, until_listening
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.tunnel_helper import TunnelHelper, name_token, new_token
from kohakuriver.task import describe_exit
from kohakuriver.tunnel.accept import Peer
from kohakuriver.tunnel.protocol import PortScope
from kohakuriver.web.background import in_background

__all__ = ["ProcessBackend", "last_words"]

log = structlog.get_logger("kohakuriver.runner")

STOP_SECONDS = 10.0
"""What a task has between TERM and KILL; when the runner itself ends, less."""

DRAIN_STOP_SECONDS = 3.0

STARTS, STARTS_OF_A_USER = 4, 1
"""Commands beside tasks that are being started at a time: each start takes a processor for some 20 ms."""

_LONGEST_LOG_LINE = 300
_SSH_LOG = 1 << 20


@dataclass
class _Running:
    """A task's leader, which is also its session; `run` marks every process of this start.

    `written` is done when all that it printed is in its log. What is started for the task once it is `over` has to be
    ended by who starts it.
    """

    process: asyncio.subprocess.Process
    run: str
    written: asyncio.Future[None]
    watcher: asyncio.Task[None] | None = None
    ssh: asyncio.subprocess.Process | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)


class ProcessBackend(Backend):
    """Starts `tunnel-client run -- CMD` in a session of its own, output to the task's log file.

    Large because a `Backend` is: most methods are one thing that can be asked of it.
    """

    name = "process"

    def __init__(
        self,
        state: State,
        helper: TunnelHelper,
        ssh: SshHelper,
        report: Reporter,
        doors: Doors,
        local_url: Callable[[], str],
        limits: Limits,
        account: Account,
    ) -> None:
        self._account = account
        self._limits = limits
        self._logs: TaskLogs
        self._state = state
        self._helper = helper
        self._ssh = ssh
        self._report = report
        self._doors = doors
        self._local_url = local_url
        self._running: dict[str, _Running] = {}
        self._guard: subprocess.Popen[str] | None = None
        self._starts = FairQueue(STARTS, STARTS_OF_A_USER)

    @classmethod
    def made(cls, around: Surroundings) -> ProcessBackend:
        account = account_named(around.process_user, around.state.directory)
        if around.user_processes:
            whose = account.whose.upper()
            log.warning(f"EVERY USER OF THIS CLUSTER IS {whose} ON THIS MACHINE: process tasks are open to all")
        return cls(
            around.state,
            around.helper,
            around.ssh,
            around.report,
            around.doors,
            around.local_url,
            around.limits,
            account,
        )

    async def open(self, tasks: list[TaskRecord], found: Callable[[TaskRecord], None]) -> None:
        self._logs = TaskLogs(self._limits.max_node_logs)
        for task in tasks:
            self._logs.know(self.log_file(task.container), task.user)
            if task.active:
                self._report(task.container, "stopped", "it ended with the runner, which was started again since")

    def log_file(self, container: str) -> Path:
        """Where a task's stdout and stderr go."""
        return self._state.task_dir(container) / "log"

    def _work_dir(self, container: str) -> Path:
        return self._state.task_dir(container) / "work"

    async def start(self, task: TaskRecord) -> None:
        with self._doors.unless_it_fails(task.container):
            await self._start(task)

    async def _start(self, task: TaskRecord) -> None:
        task.stopped = False
        if task.ssh_keys:
            self._ssh.binary()  # before anything is started: without one it can't be done
            self._ssh.prepare(task)
        new_token(task)
        name_token(task)
        command = self._helper.process_command(task.command, copied=bool(self._account.ids))
        await asyncio.get_running_loop().run_in_executor(None, self._make_room, task)
        task.tunnel_url = self._reach(task)
        tunnel = self._helper.environment(task.container, task.tunnel_url, str(self._lay_token(task)))
        run = secrets.token_hex(8)
        task.user = str(asker().known.get("user", task.user))
        output, written = self._logs.open(
            self.log_file(task.container), task.user, task.log_size or self._limits.task_log
        )
        try:
            environment = {**self._helper.settings, **_environment(self._account, task, run), **tunnel}
            process = await self._spawn(task, command, output, environment)
        except OSError as error:
            raise KohakuRiverError(f"The node can't start {command[0]!r}: {error.strerror}.") from error
        finally:
            os.close(output)
        running = self._running[task.container] = _Running(process, run, written)
        self._tell_guard("+", running)
        self._report(task.container, "running")
        running.watcher = in_background(self._watch(task, running), "watching a process")
        if task.ssh_keys and not await self._start_ssh(task, running) and not running.watcher.done():
            words = last_words(1, tail(self._ssh.log_file(task)))
            self._report(task.container, "running", f"its SSH server did not start{words}")

    async def _start_ssh(self, task: TaskRecord, running: _Running) -> bool:
        """Start the task's SSH server as one more process of the task; whether it listens."""
        task.ssh_port = free_port(task.ssh_port)
        output, _ = self._logs.open(self._ssh.log_file(task), task.user, _SSH_LOG)
        try:
            command = self._ssh.process_command(task, task.ssh_port)
            running.ssh = await self._spawn(task, command, output, _environment(self._account, task, running.run))
        finally:
            os.close(output)
        if running.over.is_set():
            await self._end_rest(running)
            return False
        return await until_listening(running.ssh.pid, task.ssh_port)

    def _make_room(self, task: TaskRecord) -> None:
        """Make the task's directories, with what its user has to reach in them. Blocks."""
        account, state = self._account, self._state
        work = self._work_dir(task.container)
        work.mkdir(exist_ok=True)
        account.gets(work)
        programs = state.directory / "bin"
        programs.mkdir(exist_ok=True)
        account.lets_through(state.directory, programs, work.parent.parent, work.parent)
        if task.ssh_keys:
            keys = self._ssh.files(task)
            account.lets_through(keys[0].parent)
            account.gets(*keys)

    def _reach(self, task: TaskRecord) -> str:
        """How the task's tunnel client reaches the runner: by a door that its user alone can pass."""
        door = self._doors.open(task.container, self._admit)
        return self._local_url() if door is None else f"unix:{door}"

    def _admit(self, folder: Path, path: Path) -> None:
        self._account.lets_through(folder)
        self._account.gets(path)

    def _lay_token(self, task: TaskRecord) -> Path:
        """Lay the task's token down where its tunnel client takes it away."""
        return self._account.gets_to_take(self._helper.token_file(task))

    async def _spawn(
        self, task: TaskRecord, command: list[str], output: int, environment: dict[str, str]
    ) -> asyncio.subprocess.Process:
        """Start a program of the task. Raises OSError."""
        self._account.gets(output)
        ids = self._account.ids
        child = [sys.executable, "-I", "-S", terminal_child.__file__, "-", ids, "-"] if ids else []
        return await asyncio.create_subprocess_exec(
            *child,
            *command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=self._work_dir(task.container),
            env=environment,
            start_new_session=True,
        )

    async def _watch(self, task: TaskRecord, running: _Running) -> None:
        ended = await running.process.wait()
        running.over.set()
        code = 128 - ended if ended < 0 else ended
        try:
            await self._end_rest(running)
        except Exception:  # the task has ended all the same, and is to be shown so
            log.exception("what a task left behind could not be ended", task=task.task_id)
        await last_of([running.written])
        del self._running[task.container]
        if task.stopped:
            self._report(task.container, "stopped", task.stop_reason, code)
            return
        status, message = describe_exit(code)
        self._report(task.container, status, message + last_words(code, tail(self.log_file(task.container))), code)

    async def _end_rest(self, running: _Running) -> None:
        if running.ssh is not None:
            _signal(running.ssh, signal.SIGTERM)
        await self._end_session(running)
        if running.ssh is not None:
            _signal(running.ssh, signal.SIGKILL)
            await running.ssh.wait()

    async def _end_session(self, running: _Running) -> None:
        await asyncio.get_running_loop().run_in_executor(None, guard.end, running.process.pid, running.run)
        self._tell_guard("-", running)

    async def adopt(self, task: TaskRecord) -> TaskRecord:
        raise UnavailableError("Only a container or an address can be adopted.", code="not_supported")

    async def stop(self, task: TaskRecord) -> None:
        await self._stop(task, STOP_SECONDS)

    async def _stop(self, task: TaskRecord, seconds: float) -> None:
        running = self._running.get(task.container)
        if running is None or running.watcher is None:
            return
        task.stopped = True
        _signal(running.process, signal.SIGTERM)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(running.watcher), seconds)
            return
        await self._end_session(running)
        await running.watcher

    async def comes_from(self, task: TaskRecord, peer: Peer) -> bool:
        return peer.on_this_machine

    async def sockets(self, task: TaskRecord) -> TaskSockets:
        """Those of its own processes, as the reaper knows them: all else in this network is the node's, or others'."""
        running = self._running.get(task.container)
        if running is None:
            raise _not_running(task)
        return TaskSockets(PortScope.OWN, f"{guard.MARK}={running.run}".encode())

    async def give_token(self, task: TaskRecord) -> None:
        self._lay_token(task)

    async def start_again(self, task: TaskRecord) -> None:
        await self.start(task)

    async def remove(self, task: TaskRecord) -> None:
        await self.discard(task)

    async def discard(self, task: TaskRecord) -> None:
        await self.stop(task)  # it may have been its SSH server that could not be started
        directory = self._state.task_path(task.container)
        await self._logs.forget(directory)
        self._doors.close(task.container)
        await asyncio.get_running_loop().run_in_executor(None, lambda: shutil.rmtree(directory, ignore_errors=True))

    async def exec(self, task: TaskRecord, request: ExecRequest) -> ExecSession:
        # Its modules are not there on every system.
        from kohakuriver.runner.backends.process import exec as process_exec

        running = self._running.get(task.container)
        if running is None or running.over.is_set():
            raise _not_running(task)
        # With the task's mark in its environment, the command ends when the task is stopped.
        environment = _environment(self._account, task, running.run)
        session = await process_exec.start(
            request, environment, self._work_dir(task.container), self._account, self._starts
        )
        if running.over.is_set():
            await session.close()
            await self._end_session(running)
            raise _not_running(task)
        return session

    async def logs(self, task: TaskRecord, request: LogRequest) -> Printed:
        running = self._running.get(task.container)
        ended = running.watcher if running is not None and request.follow else None
        return LogReader(self._logs, self.log_file(task.container), request, ended)

    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        await asyncio.gather(*(self._stop_at_end(task) for task in tasks if task.active))
        if self._guard is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._guard.communicate)
            self._guard = None
        await asyncio.get_running_loop().run_in_executor(None, self._logs.close)

    async def _stop_at_end(self, task: TaskRecord) -> None:
        await self._stop(task, DRAIN_STOP_SECONDS)
        self._report(task.container, "stopped", "it ended with the runner")

    def _tell_guard(self, sign: str, running: _Running) -> None:
        if self._guard is not None and self._guard.poll() is None and _write(self._guard, sign, running):
            return
        if self._guard is not None:
            log.warning("the guard of process tasks ended, and is started again")
        self._guard = self._start_guard()

    def _start_guard(self) -> subprocess.Popen[str]:
        started = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        for running in self._running.values():
            _write(started, "+", running)
        return started


def _not_running(task: TaskRecord) -> UnavailableError:
    return UnavailableError(f"Task {task.name} is not running; start it again.", code="task_not_running")


def _environment(account: Account, task: TaskRecord, run: str) -> dict[str, str]:
    """What processes of the task see."""
    return {**account.environment(), **task.env, guard.MARK: run}


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _write(to: subprocess.Popen[str], sign: str, running: _Running) -> bool:
    """Tell the guard about a task; whether it could be told."""
    assert to.stdin is not None
    try:
        to.stdin.write(f"{sign}{running.process.pid} {running.run}\n")
        to.stdin.flush()
    except OSError:
        return False
    return True


def last_words(code: int, output: list[str]) -> str:
    """Why a task with this exit code and these last lines of output failed, as far as it said so itself.

    A task that was ended by a signal said nothing about it, and what the tunnel client tells is not the task's.
    """
    if not 0 < code <= 128:
        return ""
    spoken = [line.strip() for line in output if line.strip() and not line.startswith(CLIENT_CHATTER)]
    return f": {spoken[-1][:_LONGEST_LOG_LINE]}" if spoken else ""
