"""The slurm backend without a Slurm: what its programs say, who is who, what a job runs, when it is asked."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from kohakuriver.cli.options import scheduler_time
from kohakuriver.errors import KohakuRiverError, UnavailableError, UsageError
from kohakuriver.limits import Limits
from kohakuriver.runner.backends.base import Surroundings
from kohakuriver.runner.backends.printed import LogRequest
from kohakuriver.runner.backends.slurm import commands, logs, tasks
from kohakuriver.runner.backends.slurm.commands import Slurm
from kohakuriver.runner.backends.slurm.jobs import FIELDS, Job, parsed
from kohakuriver.runner.backends.slurm.logs import JobOutput, last_lines
from kohakuriver.runner.backends.slurm.script import LAID, new_token_script, script
from kohakuriver.runner.backends.slurm.tasks import SlurmBackend, _options
from kohakuriver.runner.backends.slurm.users import ClusterUser, ClusterUsers
from kohakuriver.runner.backends.slurm.watch import QueueWatch
from kohakuriver.runner.services.state import State, TaskRecord
from tests.support.processes import eventually

Run = Callable[[Coroutine[Any, Any, None]], None]
ME = pwd.getpwuid(os.geteuid()).pw_name


# What Slurm says


def line(**about: str) -> str:
    said = {**dict.fromkeys(FIELDS, ""), "JobID": "7", "State": "RUNNING", "UserID": "1001", **about}
    return "|".join(said[name] for name in FIELDS) + "|"


def test_a_line_of_squeue_is_a_job_and_a_reason_may_have_anything_in_it() -> None:
    said = {"EndTime": "1792000000", "TimeLimit": "1-04:00:30", "BatchHost": "gpu07", "NodeList": "gpu[07-08]"}
    job = parsed(line(**said, State="PENDING", Reason="Held | by (an) admin"))
    day = 86_400
    expected = Job("7", "PENDING", 1001, 0, 1792000000.0, day + 4 * 3600 + 30, "gpu07", "gpu[07-08]")
    assert job == replace(expected, reason="Held | by (an) admin", number="7")
    assert parsed("") is None
    assert parsed("slurm_load_jobs error: something") is None


def test_an_element_of_an_array_goes_by_its_index_for_one_has_the_number_of_all() -> None:
    job = parsed(line(JobID="12", ArrayJobID="12", ArrayTaskID="3"))
    assert job is not None
    assert (job.id, job.number, job.element) == ("12_3", "12", True)
    waiting = parsed(line(JobID="12", ArrayJobID="12", ArrayTaskID="4-9%2"))
    assert waiting is not None
    assert (waiting.id, waiting.element) == ("12", False)


@pytest.mark.parametrize(
    ("limit", "seconds"), [("5:00", 300), ("0:30", 30), ("UNLIMITED", None), ("Partition_Limit", None)]
)
def test_a_time_limit_is_read_as_slurm_writes_it(limit: str, seconds: float | None) -> None:
    job = parsed(line(TimeLimit=limit))
    assert job is not None
    assert job.limit == seconds


ABOUT = " (Slurm job 7 on gpu07)"


@pytest.mark.parametrize(
    ("state", "status", "told"),
    [
        ({"State": "PENDING", "Reason": "Resources"}, 0, ("starting", "PENDING (Resources), Slurm job 7", None)),
        ({"State": "PENDING", "Reason": "None"}, 0, ("starting", "PENDING, Slurm job 7", None)),
        ({"State": "CONFIGURING"}, 0, ("starting", "CONFIGURING, Slurm job 7", None)),
        ({"State": "RUNNING", "Reason": "None"}, 0, ("running", "Slurm job 7 on gpu07", None)),
        ({"State": "COMPLETING"}, 0, ("running", "Slurm job 7 on gpu07", None)),
        ({"State": "SUSPENDED"}, 0, ("running", "Slurm job 7 on gpu07, SUSPENDED", None)),
        ({"State": "COMPLETED"}, 0, ("stopped", f"it ended by itself with exit code 0{ABOUT}", 0)),
        ({"State": "FAILED"}, 3 << 8, ("failed", f"it ended with exit code 3{ABOUT}", 3)),
        ({"State": "FAILED"}, 9, ("failed", f"it was ended by SIGKILL (exit code 137){ABOUT}", 137)),
        ({"State": "CANCELLED"}, 15, ("stopped", f"it was cancelled in Slurm{ABOUT}", 143)),
        ({"State": "TIMEOUT"}, 0, ("failed", f"it was ended by Slurm at its time limit{ABOUT}", 0)),
        ({"State": "OUT_OF_MEMORY"}, 125 << 8, ("failed", None, 125)),
        ({"State": "NODE_FAIL"}, 0, ("failed", f"its node failed{ABOUT}", 0)),
        ({"State": "REVOKED"}, 0, ("failed", f"Slurm ended it as REVOKED{ABOUT}", 0)),
    ],
)  # fmt: skip
def test_each_state_of_a_job_is_one_of_a_task(state: dict[str, str], status: int, told: tuple[Any, ...]) -> None:
    job = parsed(line(NodeList="gpu07", exit_code=str(status), **state))
    assert job is not None
    got = job.told()
    assert (got[0], got[2]) == (told[0], told[2])
    assert told[1] is None or got[1] == told[1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("4:00:00", 14_400), ("90", 5400), ("5:30", 330), ("1-12", 129_600), ("1-12:30", 131_400), ("2d", 172_800)],
)
def test_a_time_limit_is_asked_for_as_slurm_writes_it_or_with_a_unit(text: str, seconds: int) -> None:
    assert scheduler_time(text, "--time") == seconds


@pytest.mark.parametrize("text", ["", "0", "0:00", "soon", "1:2:3:4", "-1", "1-", "UNLIMITED"])
def test_a_time_limit_that_makes_no_sense_is_told(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--time takes a time like "):
        scheduler_time(text, "--time")


def test_what_was_asked_for_is_asked_of_slurm() -> None:
    task = a_task(cpus=1.5, memory=(1 << 30) + 1, gpus="2", time_limit=90, partition="gpu", account="lab", qos="high")
    asked = ["cpus-per-task=2", "mem=1025M", "gpus=2", "time=1:30", "partition=gpu", "account=lab", "qos=high"]
    assert _options(task, "/home/ann")[6:] == [f"--{each}" for each in asked]
    first = ["no-requeue", "chdir=/home/ann", "output=slurm-%j.out", "job-name=t1", "nodes=1", "ntasks=1"]
    assert _options(a_task(), "/home/ann") == [f"--{each}" for each in first]


# Who is who

PEOPLE = {"ann": 1001, "river": 1002}


def users_in(directory: Path, text: str) -> ClusterUsers:
    path = directory / "users"
    path.write_text(text)
    path.chmod(0o644)
    return ClusterUsers(path)


def test_a_user_is_whom_the_file_names_and_nobody_is_so_by_default(tmp_path: Path) -> None:
    users = users_in(tmp_path, "# people\nann nobody  # for now\n")
    assert users.of("ann").name == "nobody"
    with pytest.raises(UnavailableError, match="bob has no user of the Slurm cluster; the cluster's administrator"):
        users.of("bob")
    (tmp_path / "users").write_text("bob nobody\n")
    assert users.of("bob").name == "nobody"
    with pytest.raises(UnavailableError, match="ann has no user"):
        users.of("ann")


def test_root_is_nobodys_user_and_under_their_own_names_no_user_of_the_system_is(tmp_path: Path) -> None:
    users = users_in(tmp_path, "ann root\nbob no-such-user\n* *\n")
    with pytest.raises(UnavailableError, match="ann would be the system's own user root"):
        users.of("ann")
    with pytest.raises(UnavailableError, match="bob would be no-such-user in Slurm, whom this node does not know"):
        users.of("bob")
    with pytest.raises(UnavailableError, match="nobody would be the system's own user nobody"):
        users.of("nobody")
    with pytest.raises(UnavailableError, match="daemon would be the system's own user daemon"):
        users.of("daemon")


def test_under_their_own_names_nobody_is_the_runners_own_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: pwd.struct_passwd((name, "x", uid, uid, "", "/", "/bin/sh")) for name, uid in PEOPLE.items()}
    monkeypatch.setattr(pwd, "getpwnam", known.__getitem__)
    monkeypatch.setattr(os, "geteuid", lambda: PEOPLE["river"])
    users = users_in(tmp_path, "* *\n")
    assert users.of("ann").uid == PEOPLE["ann"]
    with pytest.raises(UnavailableError, match="river would be the runner's own user in Slurm"):
        users.of("river")
    users_in(tmp_path, "* *\nriver river\n")
    assert users.of("river").uid == PEOPLE["river"], "a line of its own says so"


@pytest.mark.parametrize("text", ["ann\n", "ann bob carl\n", "* ann\n", "ann *\n"])
def test_a_file_that_makes_no_sense_is_told_with_its_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"^--slurm-users: line 2 of .* is no `USER NAME`, nor `\* \*`\.$"):
        users_in(tmp_path, f"# people\n{text}")


def test_a_file_that_others_may_write_or_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read: No such file"):
        ClusterUsers(tmp_path / "users")
    users = users_in(tmp_path, "ann nobody\n")
    (tmp_path / "users").chmod(0o666)
    with pytest.raises(UnavailableError, match="others may write"):
        users.of("ann")


def test_a_runner_that_is_root_takes_a_users_rights_and_another_one_asks_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    ann = ClusterUser("ann", 1001, 1002, "/home/ann", "/bin/sh")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert ann.command(["id"]) == ["setpriv", "--reuid=1001", "--regid=1002", "--init-groups", "--", "id"]
    monkeypatch.setattr(os, "geteuid", lambda: 999)
    assert ann.command(["id"]) == ["sudo", "-n", "-u", "ann", "--", "id"]
    monkeypatch.setattr(os, "geteuid", lambda: 1001)
    assert ann.command(["id"]) == ["id"]


# What a job runs

CLIENT = """#!/bin/sh
echo "$@"; cat <&3; echo "$WORD"; ls "$TMPDIR"; [ $PPID = "$ABOVE" ] && echo at once; exit 3
"""


def run(text: str, directory: Path, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*shell.split(), "-s"], input=text, env=at(directory), capture_output=True, text=True, check=False
    )


def at(directory: Path) -> dict[str, str]:
    return {"TMPDIR": str(directory), "PATH": os.environ["PATH"], "ABOVE": str(os.getpid())}


@pytest.mark.parametrize(("brought", "shell"), [(False, "sh"), (True, "sh"), (True, "bash"), (True, "busybox sh")])
def test_a_jobs_client_gets_its_token_and_nothing_has_a_name_while_it_runs(
    tmp_path: Path, brought: bool, shell: str
) -> None:
    if shutil.which(shell.split()[0]) is None:
        pytest.skip(f"{shell} is not installed")
    client, place = tmp_path / "tunnel client", tmp_path / "place"
    client.write_text(CLIENT)
    client.chmod(0o755)
    place.mkdir()
    command = ["echo", "it's", "$HOME;", "a  b"]
    text = script("folder", "t0ken", {"WORD": "it's `id`"}, command, client if brought else str(client))
    done = run(text, place, shell)
    said = ["--log-level error --token-fd 3 run -- echo it's $HOME; a  b", "t0ken", "it's `id`", "at once"]
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (said, "", 3)
    assert list(place.iterdir()) == []


def test_a_jobs_script_does_not_use_a_file_that_somebody_else_has_made(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("another's")
    text = script("folder", "t0ken", {}, None, Path("/bin/true"))
    done = run(text, tmp_path)
    assert done.returncode != 0
    assert (tmp_path / "folder").read_text() == "another's"


def test_a_job_that_is_killed_while_its_client_is_unpacked_leaves_nothing(tmp_path: Path) -> None:
    client = tmp_path / "client"
    client.write_bytes(os.urandom(1 << 20))
    place = tmp_path / "place"
    place.mkdir()
    text = script("folder", "t0ken", {}, None, client)
    half = text[: text.index("base64 -d") + (1 << 19)]
    with subprocess.Popen(["sh", "-s"], stdin=subprocess.PIPE, env=at(place), start_new_session=True) as shell:
        assert shell.stdin is not None
        shell.stdin.write(half.encode())
        shell.stdin.flush()
        held = Path(f"/proc/{shell.pid}/fd/9")
        eventually(lambda: held.is_symlink() and "deleted" in str(held.readlink()) and not any(place.iterdir()))
        os.killpg(shell.pid, signal.SIGKILL)
    assert list(place.iterdir()) == []


def test_a_newer_token_is_there_until_it_is_taken_and_then_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()  # the one before is taken just now
    text = new_token_script("folder", "t0ken")
    with subprocess.Popen(
        ["sh", "-s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=at(tmp_path)
    ) as step:
        assert step.stdin is not None
        assert step.stdout is not None
        step.stdin.write(text)
        step.stdin.close()
        (tmp_path / "folder").rmdir()
        assert step.stdout.readline() == f"{LAID}\n"
        laid = tmp_path / "folder/token"
        assert (laid.read_text(), laid.stat().st_mode & 0o777) == ("t0ken\n", 0o600)
        assert laid.parent.stat().st_mode & 0o777 == 0o700
        laid.unlink()
        assert step.wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_a_newer_token_that_nobody_takes_is_removed_again(tmp_path: Path) -> None:
    done = run(new_token_script("folder", "t0ken", patience=2), tmp_path)
    assert (done.returncode, done.stdout) == (1, f"{LAID}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("foreign", ["a link", "a folder"])
def test_a_newer_token_goes_into_no_folder_that_somebody_else_has_made(tmp_path: Path, foreign: str) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if foreign == "a link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir(mode=0o777)
    done = run(new_token_script("folder", "t0ken", tries=2), tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert [each for each in tmp_path.rglob("*") if each.name == "token"] == []
    assert folder.exists()


# How programs are run


@pytest.fixture
def path_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose programs are found before others."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def program(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def me() -> ClusterUser:
    return ClusterUser(ME, os.geteuid(), os.getegid(), "/home/me", "/bin/sh")


def test_no_program_that_a_user_runs_has_a_secret_of_the_runner_in_its_environment(
    run: Run, path_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKURIVER_NODE_TOKEN", "s3cret")
    said = tmp_path / "said"
    program(path_of, "tail", "env")
    for name in ("sbatch", "scancel", "srun"):
        program(path_of, name, f"env >{said}; echo 7")

    async def work() -> None:
        slurm = Slurm()
        environments = ["\n".join(await last_lines(me(), "/out"))]
        output = JobOutput(me(), "/out", LogRequest(), asyncio.Event())
        environments.append("".join(line.text for line in await output.read() or []))
        await output.close()
        assert await slurm.submit(me(), [], "") == "7"
        environments.append(said.read_text())
        await slurm.cancel(me(), "7")
        environments.append(said.read_text())
        slurm.beside(me(), Job("7", "RUNNING"), "name", "", 2).wait(10)
        environments.append(said.read_text())
        for environment in environments:
            assert f"LOGNAME={ME}" in environment
            assert "KOHAKURIVER" not in environment

    run(work())


def test_a_job_has_not_the_runners_umask_and_limits(run: Run, path_of: Path) -> None:
    program(path_of, "sbatch", 'case "$*" in *--propagate=NONE*) umask ;; esac')

    async def work() -> None:
        assert await Slurm().submit(me(), [], "") == "0022"

    before = os.umask(0o077)
    try:
        run(work())
    finally:
        os.umask(before)


@pytest.mark.parametrize("ended_by", ["its user", "time"])
def test_a_job_that_was_submitted_too_late_is_cancelled(
    run: Run, path_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    go, begun = tmp_path / "go", tmp_path / "begun"
    os.mkfifo(go)
    os.mkfifo(begun)
    program(path_of, "sbatch", f"echo >{begun}; read word <{go}; echo 4711")
    program(path_of, "scancel", f'echo "$@" >{tmp_path}/cancelled')
    monkeypatch.setattr(commands, "SECONDS", 0.1 if ended_by == "time" else 30.0)

    async def work() -> None:
        slurm = Slurm()
        submitting = asyncio.ensure_future(slurm.submit(me(), [], ""))
        await asyncio.get_running_loop().run_in_executor(None, begun.read_text)
        if ended_by == "time":
            with pytest.raises(UnavailableError, match=r"does not answer within 0\.1 s"):
                await submitting
        else:
            submitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submitting
        await asyncio.get_running_loop().run_in_executor(None, go.write_text, "word\n")
        await slurm.close()
        assert (tmp_path / "cancelled").read_text() == "4711\n"

    run(work())


SUDO = """#!/bin/sh
shift 4; "$@"
"""
"""Waits for what it has started, as sudo(8) does: that goes on where sudo itself is killed."""


@pytest.fixture
def another(path_of: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterUser:
    """Somebody as whom a runner runs programs that is not root."""
    who = me()
    (path_of / "sudo").write_text(SUDO)
    (path_of / "sudo").chmod(0o755)

    def not_ours(process: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "geteuid", lambda: who.uid + 1)
    monkeypatch.setattr(subprocess.Popen, "kill", not_ours)
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", not_ours)
    return who


def running_with(path: Path) -> list[int]:
    """The processes that have a path on their command line, sudo's aside."""
    processes = (process.info for process in psutil.process_iter(["pid", "name", "cmdline"]))
    return [each["pid"] for each in processes if each["name"] != "sudo" and str(path) in (each["cmdline"] or [])]


@pytest.mark.parametrize("opened", [True, False])
def test_what_follows_a_jobs_output_as_another_user_ends_with_its_reader_also_at_a_pipe_that_nobody_opens(
    run: Run, tmp_path: Path, another: ClusterUser, opened: bool
) -> None:
    path = tmp_path / "out"
    if opened:
        path.write_text("word\n")
    else:
        os.mkfifo(path)

    async def work() -> None:
        output = JobOutput(another, str(path), LogRequest(follow=True), asyncio.Event())
        reading = asyncio.ensure_future(output.read())
        if opened:
            assert [line.text for line in await reading or []] == ["word\n"]
        else:
            await asyncio.sleep(0)
            await asyncio.get_running_loop().run_in_executor(None, eventually, lambda: running_with(path) or None)
            reading.cancel()
        assert output._tail is not None
        process = output._tail._process
        await output.close()
        assert process.poll() is not None
        eventually(lambda: running_with(path) == [])

    run(work())


def test_the_last_words_of_a_job_leave_no_reader_behind_where_its_output_is_a_pipe(
    run: Run, tmp_path: Path, another: ClusterUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "out")
    monkeypatch.setattr(logs, "LAST_SECONDS", 0.3)

    async def work() -> None:
        assert await last_lines(another, str(tmp_path / "out")) == []
        eventually(lambda: running_with(tmp_path / "out") == [])

    run(work())


def test_a_program_of_slurms_that_takes_too_long_is_told_of_and_ended_also_as_another_user(
    run: Run, path_of: Path, tmp_path: Path, another: ClusterUser
) -> None:
    os.mkfifo(tmp_path / "go")
    program(path_of, "scancel", f"cat {tmp_path}/go")

    async def work() -> None:
        with pytest.raises(UnavailableError, match=r"does not answer within 0\.3 s"):
            await Slurm().cancel(another, "7", 0.3)
        eventually(lambda: running_with(tmp_path / "go") == [])

    run(work())


# When Slurm is asked


def test_slurm_is_asked_soon_after_something_happened_and_not_while_there_is_nothing_to_ask(run: Run) -> None:
    async def work() -> None:
        looks: list[float] = []
        looked = asyncio.Event()

        async def look() -> None:
            looks.append(time.monotonic())
            looked.set()
            if len(looks) == 1:
                raise RuntimeError("no answer")

        wanted = False
        watch = QueueWatch(look, lambda: wanted, soon=(0.0, 0.0))
        running = asyncio.ensure_future(watch.run())
        try:
            watch.soon()
            await asyncio.sleep(0)
            wanted = True
            assert looks == []
            for _ in range(2):
                looked.clear()
                watch.soon()
                await asyncio.wait_for(looked.wait(), 10)
            assert looks[1] - looks[0] >= 0.99, "whatever happens it is asked once a second at most"
        finally:
            running.cancel()

    run(work())


# What is told of a job


class Said:
    """A Slurm that says what it is told to, and notes what it is asked."""

    missing = None

    def __init__(self) -> None:
        self.known: dict[str, Job] = {}
        self.asked: list[Any] = []

    async def close(self) -> None:
        pass

    async def jobs(self, ids: Any) -> dict[str, Job]:
        self.asked.append(list(ids))
        return {job_id: job for job_id, job in self.known.items() if job_id in self.asked[-1]}


@pytest.fixture
def around(tmp_path: Path) -> tuple[Surroundings, list[Any]]:
    told: list[Any] = []
    heard = asyncio.Event()

    def tell(*about: Any) -> None:
        told.append(about)
        heard.set()

    made: Any = Surroundings.__new__(Surroundings)
    values = {
        "report": lambda *about: told.append(about),
        "tell": tell,
        "told": heard,
        "touch": lambda task: told.append(("touch", task.ends_at)),
        "begin": lambda task: told.append(("begin", task.container)),
        "on_change": lambda: told.append("changed"),
        "limits": Limits(),
        "slurm_users": None,
    }
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made, told


def a_task(number: int = 1, **more: Any) -> TaskRecord:
    about: Any = {"task_id": number, "container": f"kohakuriver-job-{number}", "backend": "slurm", "name": f"t{number}"}
    return TaskRecord(**about, engine_name=str(number), status="running", **more)


def test_all_jobs_are_asked_for_in_one_question_and_those_that_ended_are_not(run: Run, around: Any) -> None:
    async def work() -> None:
        backend, said = SlurmBackend(around[0], None), Said()
        backend._slurm = said  # type: ignore[assignment]
        tasks = [a_task(1), a_task(2), a_task(3), a_task(4)]
        tasks[3].engine_name = None
        tasks[2].status = "stopped"
        await backend.open(tasks, lambda task: None)
        try:
            await backend._look()
            assert said.asked[-1] == ["1", "2"]
            gone = "Slurm has forgotten its job 1, and how that ended"
            assert (tasks[0].container, "failed", gone) in around[1]
            unsubmitted = "its runner ended before its job was submitted"
            assert (tasks[3].container, "failed", unsubmitted) in around[1]
        finally:
            await backend.close(tasks, stop_tasks=False)

    run(work())


def test_a_job_that_is_the_task_of_two_users_is_asked_for_once_and_ends_for_both(run: Run, around: Any) -> None:
    async def work() -> None:
        backend, said = SlurmBackend(around[0], None), Said()
        backend._slurm = said  # type: ignore[assignment]
        tasks = [a_task(number, adopted=True) for number in (1, 2)]
        for task in tasks:
            task.engine_name = "7"
        said.known["7"] = Job("7", "CANCELLED", nodes="gpu07")
        await backend.open(tasks, lambda task: None)
        try:
            await backend._look()
        finally:
            await backend.close(tasks, stop_tasks=False)
        assert said.asked == [["7"]]
        ended = [about[:2] for about in around[1] if about[0] in [task.container for task in tasks]]
        assert ended == [(task.container, "stopped") for task in tasks]

    run(work())


class Joining(Said):
    """A Slurm with a job that runs, in which what is started beside never comes to the runner."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[subprocess.Popen[bytes]] = []
        self.begun, self.ended = asyncio.Event(), asyncio.Queue[str]()

    async def job(self, job_id: str) -> Job:
        return Job(job_id, "RUNNING", uid=me().uid, number=job_id)

    async def prints_into(self, job_id: str) -> str:
        return ""

    def beside(self, *_: object) -> subprocess.Popen[bytes]:
        self.started.append(subprocess.Popen(["sleep", "1000"]))
        self.begun.set()
        return self.started[-1]

    async def step(self, job_id: str, name: str) -> str:
        return f"{job_id}.{name}"

    async def cancel(self, who: ClusterUser, job_id: str) -> None:
        self.started[-1].kill()
        self.ended.put_nowait(job_id)


@pytest.mark.parametrize("given_up", [False, True])
def test_what_was_started_beside_a_job_and_does_not_come_is_ended_and_leaves_nothing(
    run: Run, around: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    def not_ours(process: subprocess.Popen[bytes]) -> None:
        raise PermissionError

    monkeypatch.setattr(subprocess.Popen, "terminate", not_ours)
    monkeypatch.setattr(tasks, "ARRIVAL_SECONDS", 60.0 if given_up else 0.1)
    helper = SimpleNamespace(settings={}, program=lambda: Path("/bin/true"))
    parts = {"state": State(tmp_path), "url_for_jobs": "http://127.0.0.1:1", "helper": helper, "slurm_client": None}
    for name, value in parts.items():
        object.__setattr__(around[0], name, value)

    async def work() -> None:
        backend, said = SlurmBackend(around[0], None), Joining()
        backend._slurm = said  # type: ignore[assignment]
        monkeypatch.setattr(backend, "_who", lambda task: asyncio.sleep(0, me()))
        task = a_task(adopted=True)
        joining = asyncio.ensure_future(backend.adopt(task))
        if given_up:
            await said.begun.wait()
            joining.cancel()
        with pytest.raises((asyncio.CancelledError, UnavailableError)):
            await joining
        assert await asyncio.wait_for(said.ended.get(), 30) == f"1.{task.container}"
        said.started[0].wait()
        assert not State(tmp_path).task_path(task.container).exists()
        assert (backend._tasks, backend._arrived) == ({}, {})

    run(work())


def test_who_is_connected_to_a_job_is_told_when_its_time_limit_is_near(run: Run, around: Any) -> None:
    async def work() -> None:
        backend, said = SlurmBackend(around[0], None), Said()
        backend._slurm = said  # type: ignore[assignment]
        task = a_task()
        end = time.time() + 299
        said.known["1"] = Job("1", "RUNNING", end=end, limit=4 * 3600, nodes="gpu07")
        await backend.open([task], lambda task: None)
        try:
            await backend._look()
            assert task.ends_at == end
            words = "Slurm ends the job of task t1 in 4 min 59 s, at its time limit; what runs there ends with it."
            await asyncio.wait_for(around[0].told.wait(), 10)
            assert (task.container, words) in around[1]
        finally:
            await backend.close([task], stop_tasks=False)

    run(work())


def test_a_tasks_time_to_live_begins_when_its_job_does_and_not_while_that_waits(run: Run, around: Any) -> None:
    async def work() -> None:
        backend, said = SlurmBackend(around[0], None), Said()
        backend._slurm = said  # type: ignore[assignment]
        task = a_task(ttl=60)
        task.status = "starting"
        said.known["1"] = Job("1", "PENDING", reason="Resources")
        await backend.open([task], lambda task: None)
        try:
            await backend._look()
            begun = ("begin", task.container)
            assert begun not in around[1]
            said.known["1"] = Job("1", "RUNNING", nodes="gpu07")
            await backend._look()
            assert begun in around[1]
        finally:
            await backend.close([task], stop_tasks=False)

    run(work())


def test_a_slurm_that_does_not_answer_takes_no_new_tasks_until_it_does(run: Run, around: Any, tmp_path: Path) -> None:
    async def work() -> None:
        backend, said = SlurmBackend(around[0], users_in(tmp_path, f"ann {ME}\n")), Said()
        backend._slurm = said  # type: ignore[assignment]
        task = a_task()
        await backend.open([task], lambda task: None)
        good, said.known["1"] = said.jobs, Job("1", "RUNNING")

        def trouble() -> str | None:
            return backend.trouble

        async def fail(ids: Any) -> dict[str, Job]:
            raise KohakuRiverError("Slurm's controller does not answer within 30 s.")

        try:
            said.jobs = fail  # type: ignore[method-assign]
            await backend._look()
            assert trouble() == "Slurm's controller does not answer within 30 s"
            said.jobs = good  # type: ignore[method-assign]
            await backend._look()
            assert trouble() is None
            assert around[1].count("changed") == 2
        finally:
            await backend.close([task], stop_tasks=False)

    run(work())


def test_a_job_whose_output_can_not_be_read_keeps_nobody_from_being_told_of_others(
    run: Run, around: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def mine(task: TaskRecord) -> ClusterUser:
        return me()

    monkeypatch.setattr(SlurmBackend, "_whose", staticmethod(mine))
    pipe = tmp_path / "slurm-1.out"
    os.mkfifo(pipe)

    async def work() -> None:
        backend, said = SlurmBackend(around[0], None), Said()
        backend._slurm = said  # type: ignore[assignment]
        tasks = [a_task(1), a_task(2)]
        tasks[0].printed_at = str(pipe)
        said.known = {"1": Job("1", "FAILED", code=3, nodes="a"), "2": Job("2", "COMPLETED", nodes="a")}
        await backend.open(tasks, lambda task: None)
        try:
            monkeypatch.setattr(logs, "LAST_SECONDS", 60.0)
            await asyncio.wait_for(backend._look(), 30)
            ended = (tasks[1].container, "stopped", "it ended by itself with exit code 0 (Slurm job 2 on a)", 0)
            assert ended in around[1]
            await asyncio.get_running_loop().run_in_executor(None, pipe.write_text, "no such model\n")
            await asyncio.wait_for(asyncio.gather(*backend._doing), 30)
            words = "it ended with exit code 3 (Slurm job 1 on a): no such model"
            assert (tasks[0].container, "failed", words, 3) in around[1]
            monkeypatch.setattr(logs, "LAST_SECONDS", 0.01)
            assert await last_lines(me(), str(pipe)) == []
        finally:
            await backend.close(tasks, stop_tasks=False)

    run(work())
