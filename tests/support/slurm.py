"""A real Slurm of one node, with users of the system for it: its own ports, key, sockets and files."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import eventually

GPUS, CPUS, MEMORY = 2, 8, 64_000
"""What the node says that it has; the memory in MiB. Nothing holds jobs to that."""

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "setpriv", "useradd")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONF = """\
ClusterName=river
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/state/controller.pid
SlurmdPidFile={directory}/state/daemon.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
GresTypes=gpu
ReturnToService=2
KillWait=1
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} CoresPerSocket={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=8:00:00 DefaultTime=1:00:00 State=UP
"""


class SlurmUser:
    """A user of the system who is there for as long as the Slurm is."""

    def __init__(self, directory: Path) -> None:
        self.name = f"kr-{secrets.token_hex(4)}"
        self.home = directory / f"home-{self.name}"
        subprocess.run(
            ["useradd", "--system", "--no-create-home", "--home-dir", str(self.home), "--shell", "/bin/sh", self.name],
            check=True,
            capture_output=True,
            env={"PATH": _PATH},
        )
        known = pwd.getpwnam(self.name)
        self.uid, self.gid = known.pw_uid, known.pw_gid
        self.home.mkdir(mode=0o700)
        os.chown(self.home, self.uid, self.gid)

    def remove(self) -> None:
        subprocess.run(["userdel", self.name], check=True, capture_output=True, env={"PATH": _PATH})


class Slurm:
    """Controller, daemon and munge of one node, ready for jobs. `environment` leads programs to it."""

    def __init__(self, directory: Path, users: int) -> None:
        self.directory = directory
        self.node = socket.gethostname().partition(".")[0]
        self.environment = {"PATH": _PATH, "SLURM_CONF": str(directory / "slurm.conf")}
        self._running: list[subprocess.Popen[bytes]] = []
        self.users: list[SlurmUser] = []
        try:
            self._configure()
            self.users = [SlurmUser(directory) for _ in range(users)]
            self._start_munge()
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", self.node)
            eventually(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T"))
        except BaseException:
            self.close()
            raise

    def _configure(self) -> None:
        for name in ("munge", "state", "spool", "logs"):
            (self.directory / name).mkdir(mode=0o755)
        with socket.socket() as one, socket.socket() as other:
            for each in (one, other):
                each.bind(("127.0.0.1", 0))
            controller, daemon = one.getsockname()[1], other.getsockname()[1]
        conf = _CONF.format(
            node=self.node,
            directory=self.directory,
            controller=controller,
            daemon=daemon,
            cpus=CPUS,
            memory=MEMORY,
            gpus=GPUS,
        )
        (self.directory / "slurm.conf").write_text(conf)
        (self.directory / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        key = self.directory / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start_munge(self) -> None:
        munge = self.directory / "munge"
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", "--foreground", *(f"--{name}={munge / file}" for name, file in places.items()))
        eventually(lambda: (munge / "socket").exists())

    def _start(self, *words: str) -> None:
        with (self.directory / "logs" / words[0]).open("wb") as log:
            started = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        self._running.append(started)

    def run(self, *words: str, user: SlurmUser | None = None, text: str = "") -> str:
        """What a program of Slurm says, run by root or by a user."""
        environment, as_whom = dict(self.environment), []
        if user is not None:
            environment |= {"HOME": str(user.home), "USER": user.name}
            as_whom = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--init-groups", "--"]
        done = subprocess.run(
            [*as_whom, *words], input=text, env=environment, cwd="/", capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, user: SlurmUser, script: str, *options: str) -> str:
        """A job as users make it without us; its number, once it runs."""
        words = ("sbatch", "--parsable", f"--chdir={user.home}", *options)
        job = self.run(*words, user=user, text=f"#!/bin/sh\n{script}\n")
        eventually(lambda: self.state_of(job) == "RUNNING")
        return job

    def state_of(self, job: str) -> str:
        return self.about(job, "State")

    def about(self, job: str, *fields: str) -> str:
        """Fields of a job as squeue(1) names them, with blanks between."""
        form = ",".join(f"{name}: " for name in fields)
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", f"--Format={form}").strip()

    def steps_of(self, job: str) -> list[str]:
        """The names of what runs in a job beside its script."""
        told = self.run("squeue", "--noheader", "--steps", f"--jobs={job}", "--Format=StepName: ")
        return [name for name in told.split() if name not in ("batch", "extern")]

    def cancel_all(self) -> None:
        """End all jobs."""
        for job in self.run("squeue", "--noheader", "--format=%i").split():  # an array's element as such
            self.run("scancel", "--full", job)
        eventually(lambda: not self.run("squeue", "--noheader", "--format=%A"))

    def close(self) -> None:
        """End all jobs, then Slurm, and remove its users."""
        with contextlib.ExitStack() as ends:
            for user in self.users:
                ends.callback(user.remove)
            for process in self._running:
                ends.callback(_end, process)
            if len(self._running) == 3:
                self.cancel_all()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def require_slurm() -> None:
    """Skip where no Slurm can be started; fail in CI."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    reason = "only root can start a Slurm with users of its own" if os.geteuid() else None
    if missing:
        reason = f"{missing[0]} is not installed: run scripts/system-packages test"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@contextlib.contextmanager
def a_slurm(users: int) -> Iterator[Slurm]:
    """A Slurm in a directory of its own, which its users may enter."""
    require_slurm()
    directory = Path(tempfile.mkdtemp(prefix="kohakuriver-slurm-"))
    directory.chmod(0o711)
    try:
        slurm = Slurm(directory, users)
        try:
            yield slurm
        finally:
            slurm.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
