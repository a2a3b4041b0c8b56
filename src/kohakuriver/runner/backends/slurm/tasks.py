"""The slurm backend: sbatch(1), squeue(1), scancel(1) and srun(1), and a tunnel client in each job that dials here.

Its tasks outlive the runner. Who may do what in Slurm is Slurm's business: everything is done as the cluster's user
whom the administrator has named for the task's owner, and nobody is the runner's own user unless that is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog

from kohakuriver.errors import KohakuRiverError, UnavailableError, UsageError
from kohakuriver.quotas import time_in_words
from kohakuriver.runner.backends.base import Backend, ExecRequest, ExecSession, Surroundings
from kohakuriver.runner.backends.printed import LogRequest, Printed
from kohakuriver.runner.backends.process.logs import tail
from kohakuriver.runner.backends.process.tasks import last_words
from kohakuriver.runner.backends.slurm.commands import Slurm
from kohakuriver.runner.backends.slurm.jobs import Job
from kohakuriver.runner.backends.slurm.logs import JobOutput, last_lines
from kohakuriver.runner.backends.slurm.script import LAID, new_token_script, script
from kohakuriver.runner.backends.slurm.users import ClusterUser, ClusterUsers
from kohakuriver.runner.backends.slurm.watch import QueueWatch
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.tunnel_helper import name_token, new_token
from kohakuriver.runtime import cancel_all
from kohakuriver.web.background import in_background

__all__ = ["SlurmBackend"]

log = structlog.get_logger("kohakuriver.runner")

T = TypeVar("T")

ARRIVAL_SECONDS = 20.0
"""How long a tunnel client may take that is started beside a job."""

LOOK_SECONDS = 0.1
"""How often it is looked meanwhile whether the program that starts it has ended."""

WARNING_SECONDS = 300.0
"""How long before its time limit those who are connected to a job are told, or a tenth of it."""

_JOB_ID = re.compile(r"[0-9]{1,10}(_[0-9]{1,10})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")
MOST_OF_AUTHORITIES = 100 << 10
"""Bytes of PEM that jobs are given; the kernel takes 128 KiB in one variable (execve(2))."""
_MIB = 1 << 20


class SlurmBackend(Backend):
    """A task is a job, of ours or one that was adopted.

    Large because a `Backend` is: most methods are one thing that can be asked of it.
    """

    name = "slurm"

    def __init__(self, around: Surroundings, users: ClusterUsers | None) -> None:
        self._around = around
        self._users = users
        self._slurm = Slurm()
        self._tasks: dict[str, TaskRecord] = {}
        self._seen: dict[str, Job] = {}
        self._arrived: dict[str, asyncio.Event] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._warnings: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        self._watch = QueueWatch(self._look, lambda: any(task.active for task in self._tasks.values()))
        self._watching: asyncio.Task[None] | None = None
        self._doing: set[asyncio.Task[None]] = set()
        self._trouble: str | None = None

    @classmethod
    def made(cls, around: Surroundings) -> SlurmBackend:
        users = None if around.slurm_users is None else ClusterUsers(around.slurm_users)
        return cls(around, users)

    @property
    def trouble(self) -> str | None:
        if self._users is None:
            return "no users of the cluster are named to its runner (--slurm-users)"
        missing = self._slurm.missing
        return f"{missing} is not on its runner's PATH" if missing else self._trouble

    async def open(self, tasks: list[TaskRecord], found: Callable[[TaskRecord], None]) -> None:
        for task in tasks:
            self._tasks[task.container] = task
            self._ended[task.container] = asyncio.Event()
            if task.active and task.engine_name is None:
                self._around.report(task.container, "failed", "its runner ended before its job was submitted")
            if not task.active:
                self._ended[task.container].set()
        self._watching = in_background(self._watch.run(), "asking Slurm how its jobs are")
        self._watch.soon()

    # What the host asks for

    async def start(self, task: TaskRecord) -> None:
        who = await self._who(task)
        new_token(task)
        name_token(task)
        task.stopped = False
        task.tunnel_url = self._around.url_for_jobs
        text = await self._script(task, task.command)
        workdir = task.workdir or who.home
        job = await self._slurm.submit(who, _options(task, workdir), text)
        task.engine_name, task.printed_at = job, f"{workdir.rstrip('/')}/slurm-{job}.out"
        self._begin(task, who)
        self._around.report(task.container, "starting", f"PENDING, Slurm job {job}")
        self._watch.soon()

    async def adopt(self, task: TaskRecord) -> TaskRecord:
        if task.engine_name is None or not _JOB_ID.fullmatch(task.engine_name):
            raise UsageError(f"{task.engine_name!r} is no number of a job; `squeue --me` shows yours.")
        who = await self._who(task)
        job = await self._slurm.job(task.engine_name)
        if job.uid != who.uid:
            raise UnavailableError(f"Job {job.id} is not one of {who.name}, who you are in Slurm.", code="not_your_job")
        known = self._known(job, task.run_for)
        if known is not None and (known.tunnel or not known.adopted):
            return known
        if not job.runs:
            _, message, _ = job.told()
            raise UnavailableError(f"Only a job that runs can be reached, and this one does not: {message}.")
        joined = known or task
        joined.engine_name, joined.printed_at = job.id, await self._slurm.prints_into(job.id)
        try:
            await self._join(joined, who, job)
        except BaseException:
            if joined is task:
                self._forget(task)
                shutil.rmtree(self._around.state.task_path(task.container), ignore_errors=True)
            raise
        return joined

    def _known(self, job: Job, user: str) -> TaskRecord | None:
        """The task of that user that the job is already."""
        mine = (each for each in self._tasks.values() if (each.engine_name, each.run_for) == (job.id, user))
        return next((each for each in mine if each.active), None)

    async def _join(self, task: TaskRecord, who: ClusterUser, job: Job) -> None:
        """Start a tunnel client beside what runs in a job, and wait until it is here. Raises KohakuRiverError."""
        new_token(task)
        name_token(task)
        task.tunnel_url = self._around.url_for_jobs
        self._begin(task, who)
        text = await self._script(task, None)
        said = self._around.state.task_dir(task.container) / "srun"
        arrived = self._arrived[task.container] = asyncio.Event()
        try:
            step = self._beside(who, job, task.container, text, said)
        except BaseException:
            self._arrived.pop(task.container, None)
            raise
        try:
            await self._until_here(step, arrived, said)
        except BaseException:
            self._arrived.pop(task.container, None)
            self._aside(self._give_up(step, job.id, task.container, who), "ending a tunnel client that did not come")
            raise
        self._around.report(task.container, *job.told())
        self._told_of(task, job)

    async def _give_up(self, step: subprocess.Popen[bytes], job_id: str, name: str, who: ClusterUser) -> None:
        """End a step that nobody waits for any more: whoever gives up, it would go on for as long as the job does."""
        if step.poll() is not None:
            return
        _terminate(step)
        await self._end_step(job_id, name, who)

    async def _end_step(self, job_id: str, name: str, who: ClusterUser) -> None:
        if (step := await self._slurm.step(job_id, name)) is not None:
            await self._slurm.cancel(who, step)

    def _aside(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Do something that nobody waits for, as long as the runner is there."""
        doing = in_background(work, what)
        self._doing.add(doing)
        doing.add_done_callback(self._doing.discard)

    def _beside(self, who: ClusterUser, job: Job, name: str, text: str, said: Path) -> subprocess.Popen[bytes]:
        output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            return self._slurm.beside(who, job, name, text, output)
        except OSError as error:
            raise UnavailableError(f"The node can't run srun: {error.strerror}.", code="no_slurm") from None
        finally:
            os.close(output)

    @staticmethod
    async def _until_here(step: subprocess.Popen[bytes], arrived: asyncio.Event, said: Path) -> None:
        await _until_over(step, arrived)
        if arrived.is_set():
            return
        words = [line for line in tail(said) if line.strip()]  # its user can write there as much as they like
        why = f": {words[-1]}" if words else ""
        if step.poll() is None:
            why = f" within {ARRIVAL_SECONDS:g} s; see that jobs reach the runner, by its --slurm-url{why}"
        raise UnavailableError(f"The tunnel client beside the job did not come{why.rstrip('.')}.", code="no_slurm_step")

    async def stop(self, task: TaskRecord) -> None:
        if task.active and task.engine_name is not None:
            task.stopped = True
            await self._slurm.cancel(await self._whose(task), task.engine_name)
            self._over(task)

    async def start_again(self, task: TaskRecord) -> None:
        await self.start(task)

    async def remove(self, task: TaskRecord) -> None:
        if not task.adopted:
            await self.stop(task)
        elif task.active and task.engine_name is not None:
            await self._end_step(task.engine_name, task.container, await self._whose(task))
        self._over(task)
        self._forget(task)
        directory = self._around.state.task_path(task.container)
        await _blocking(shutil.rmtree, directory, True)

    async def exec(self, task: TaskRecord, request: ExecRequest) -> ExecSession:
        raise UnavailableError(
            f"In task {task.name} commands are run by its tunnel client, and that is not connected as it should be; "
            f"`kohakuriver vps status {task.name}` says more.",
            code="not_supported",
        )

    async def logs(self, task: TaskRecord, request: LogRequest) -> Printed:
        if not task.printed_at.startswith("/") or task.printed_at == "/dev/null":
            raise UnavailableError(f"Slurm does not say where the job of task {task.name} prints.", code="no_logs")
        ended = self._ended.get(task.container) or _set_event()
        return JobOutput(await self._who(task), task.printed_at, request, ended)

    async def give_token(self, task: TaskRecord) -> None:
        job = await self._slurm.job(task.engine_name or "")
        said = self._around.state.task_dir(task.container) / "srun-token"
        text = new_token_script(self._folder(task), task.tunnel_token)
        who, name = await self._whose(task), f"{task.container}-token"
        step = self._beside(who, job, name, text, said)
        if not await _laid(step, said):
            self._aside(self._give_up(step, job.id, name, who), "ending what should have laid a token down")
            lost = "its tunnel client could not be given its new token, and is lost when its connection is; restart it"
            self._around.report(task.container, task.status, lost)
            raise UnavailableError(f"Of task {task.name}: {lost}.", code="no_slurm")

    def tunnel_changed(self, task: TaskRecord, connected: bool) -> None:
        if connected:
            if arrived := self._arrived.pop(task.container, None):
                arrived.set()
            elif task.status == "starting":
                self._runs(task, f"Slurm job {task.engine_name}")
        if task.active:
            self._watch.soon()

    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        await cancel_all([*([self._watching] if self._watching is not None else []), *self._doing])
        for _, timer in self._warnings.values():
            timer.cancel()
        if stop_tasks:
            for task in tasks:
                if task.active and not task.adopted:
                    with contextlib.suppress(KohakuRiverError):
                        await self.stop(task)
                        self._around.report(task.container, "stopped", "it was cancelled, as its runner ended")
        await self._slurm.close()

    # What a job is made of

    async def _who(self, task: TaskRecord) -> ClusterUser:
        if self._users is None:
            raise UnavailableError(f"The node offers no Slurm: {self.trouble}.", code="backend_not_offered")
        return await _blocking(self._users.of, task.run_for)  # a directory of users may be far away

    @staticmethod
    async def _whose(task: TaskRecord) -> ClusterUser:
        """Whose its job is, whoever is who by now."""
        return await _blocking(ClusterUsers.named, task.run_for, task.cluster_user)

    def _folder(self, task: TaskRecord) -> str:
        return f"{task.container}-{task.token_name}"

    async def _script(self, task: TaskRecord, command: list[str] | None) -> str:
        client = self._around.slurm_client or self._around.helper.program()
        about = (self._folder(task), task.tunnel_token, self._environment(task), command, client)
        return await _blocking(script, *about)  # to pack the client takes a moment

    def _environment(self, task: TaskRecord) -> dict[str, str]:
        odd = next((name for name in task.env if not _VARIABLE.fullmatch(name)), None)
        if odd is not None:
            raise UsageError(f"{odd!r} can't be the name of a variable in a job; use letters, digits and _.")
        return {
            **self._around.helper.settings,
            "KOHAKURIVER_TUNNEL_URL": task.tunnel_url or "",
            **self._trusted(),
            "KOHAKURIVER_CONTAINER_ID": task.container,
            "KOHAKURIVER_OFFER": "own",
            **task.env,
        }

    def _trusted(self) -> dict[str, str]:
        """By whom jobs know this runner, where it serves TLS. Raises UnavailableError."""
        ca = self._around.ca_for_jobs
        if ca is None or not self._around.url_for_jobs.startswith("https:"):
            return {}
        try:
            text = "\n".join(_CERTIFICATE.findall(ca.read_text("latin-1")))
        except OSError as error:
            raise UnavailableError(f"The runner's --ca-file {ca} can't be read for its jobs: {error}.") from error
        if len(text) > MOST_OF_AUTHORITIES:
            raise UnavailableError(
                f"The runner's --ca-file {ca} has more certificates than a job's environment takes; give the runner "
                "one with the authority of this cluster alone."
            )
        return {"KOHAKURIVER_TUNNEL_CA": text}

    # What Slurm says

    def _begin(self, task: TaskRecord, who: ClusterUser) -> None:
        task.cluster_user = who.name
        self._tasks[task.container] = task
        self._seen.pop(task.container, None)
        self._ended[task.container] = asyncio.Event()

    def _forget(self, task: TaskRecord) -> None:
        for known in (self._tasks, self._seen, self._arrived, self._ended):
            known.pop(task.container, None)

    def _over(self, task: TaskRecord) -> None:
        """The task has ended, or is about to be ended."""
        if ended := self._ended.get(task.container):
            ended.set()
        if warning := self._warnings.pop(task.container, None):
            warning[1].cancel()

    async def _look(self) -> None:
        asked = [(task.engine_name, task) for task in self._tasks.values() if task.active and task.engine_name]
        if not asked:
            return
        trouble = None
        try:
            found = await self._slurm.jobs(sorted({job_id for job_id, _ in asked}))
        except KohakuRiverError as error:
            trouble = error.message.rstrip(".")
        else:
            for job_id, task in asked:  # one job may be the task of several users, who are one on the cluster
                if task.active and task.engine_name == job_id:
                    self._take_over(task, found.get(job_id))
        if trouble != self._trouble:
            self._trouble = trouble
            self._around.on_change()

    def _take_over(self, task: TaskRecord, job: Job | None) -> None:
        if job is None:
            self._over(task)
            text = f"Slurm has forgotten its job {task.engine_name}, and how that ended"
            self._around.report(task.container, "failed", text)
        elif job != self._seen.get(task.container):
            self._told(task, job)

    def _told(self, task: TaskRecord, job: Job) -> None:
        """A job is another than it was when Slurm was asked last."""
        self._told_of(task, job)
        status, message, code = job.told()
        if status == "running":
            self._runs(task, message)
            return
        if not (job.waits or job.runs):
            self._over(task)
            if status == "failed" and code and not task.adopted:
                self._aside(self._failed(task, job), "reading the last words of a job")
                return
        self._around.report(task.container, status, message, code)

    async def _failed(self, task: TaskRecord, job: Job) -> None:
        """Report a job that failed with its last words, for which no other job waits: they may be slow to come."""
        status, message, code = job.told()
        with contextlib.suppress(KohakuRiverError):  # its user may be gone
            message += last_words(code or 0, await last_lines(await self._whose(task), task.printed_at))
        if self._seen.get(task.container) is job and task.active:
            self._around.report(task.container, status, message, code)

    def _runs(self, task: TaskRecord, message: str) -> None:
        if task.status == "starting" and task.ttl is not None:
            self._around.begin(task)  # its time to live is that of what runs, and not of what waits
        self._around.report(task.container, "running", message)

    def _told_of(self, task: TaskRecord, job: Job) -> None:
        self._seen[task.container] = job
        if not job.runs or job.end is None:
            return
        if task.deadline is None and task.ends_at != job.end:
            task.ends_at = job.end
            self._around.touch(task)
        known = self._warnings.get(task.container)
        if known is None or known[0] != job.end:
            if known is not None:
                known[1].cancel()
            early = min(WARNING_SECONDS, (job.limit or math.inf) / 10)
            wait = max(job.end - early - time.time(), 0)
            timer = asyncio.get_running_loop().call_later(wait, self._warn, task, job.end)
            self._warnings[task.container] = (job.end, timer)

    def _warn(self, task: TaskRecord, end: float) -> None:
        left = time_in_words(max(end - time.time(), 1))
        self._around.tell(
            task.container,
            f"Slurm ends the job of task {task.name} in {left}, at its time limit; what runs there ends with it.",
        )


async def _blocking(work: Callable[..., T], *about: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, work, *about)


def _terminate(step: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(PermissionError):  # one that sudo(8) has started
        step.terminate()


async def _laid(step: subprocess.Popen[bytes], said: Path) -> bool:
    """Whether a step has laid a newer token down: it says so, and ends when the tunnel client has taken that."""
    until = time.monotonic() + ARRIVAL_SECONDS
    while step.poll() is None and time.monotonic() < until:
        if LAID in tail(said):
            return True
        await asyncio.sleep(LOOK_SECONDS)
    return step.poll() == 0


async def _until_over(step: subprocess.Popen[bytes], arrived: asyncio.Event) -> None:
    """Until a step has ended, or what it is for has come, for as long as that may take."""
    until = time.monotonic() + ARRIVAL_SECONDS
    while step.poll() is None and not arrived.is_set() and time.monotonic() < until:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(arrived.wait(), LOOK_SECONDS)


def _options(task: TaskRecord, workdir: str) -> Sequence[str]:
    """What sbatch(1) is asked for."""
    wanted = {
        "chdir": workdir,
        "output": "slurm-%j.out",
        "job-name": task.name or task.container,
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": None if task.cpus is None else str(math.ceil(task.cpus)),
        "mem": None if task.memory is None else f"{math.ceil(task.memory / _MIB)}M",
        "gpus": task.gpus,
        "time": None if task.time_limit is None else _minutes(task.time_limit),
        "partition": task.partition,
        "account": task.account,
        "qos": task.qos,
    }
    # What fails is run again only where the task's own restart policy says so, with a token of its own.
    return ["--no-requeue", *(f"--{name}={value}" for name, value in wanted.items() if value is not None)]


def _minutes(seconds: int) -> str:
    """A time as Slurm takes it: minutes:seconds."""
    return f"{seconds // 60}:{seconds % 60:02}"


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
