"""Programs that people run, while the host and then the runner are killed and started again under them.

What they talk to is in a container that sees this machine's files. A hop is killed only while its program is seen to be
under way, so that nothing passes here that was over before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from tests.support.docker_images import busybox_image, require_engine
from tests.support.processes import eventually
from tests.support.ssh import make_key, ours
from tests.support.up import TIMEOUT, Apart, Program

pytestmark = [pytest.mark.docker, pytest.mark.timeout(240)]

HOPS = ("host", "runner")
# What leads from the container's image to this machine's programs.
OUTSIDE = ["/bin/busybox", "chroot", "/host"]
# Ports inside a container are nobody else's.
GIT, POSTGRES, IPERF3 = 9418, 5432, 5201
MIB = 1 << 20

# $1 is a directory for what they serve and say, $2 one with PostgreSQL's programs. PostgreSQL won't be root, and others
# can't enter pytest's directories: /mnt is $1 inside the container.
SERVICES = f"""
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
git daemon --listen=127.0.0.1 --port={GIT} --base-path="$1" --export-all --enable=receive-pack &
iperf3 -s -B 127.0.0.1 -p {IPERF3} --forceflush >/mnt/iperf3 2>&1 &
mkdir /mnt/data && chown 65534:65534 /mnt/data && cd / || exit 1
as_nobody() {{ setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }}
as_nobody "$2/initdb" -D /mnt/data -U me -A trust -N --locale=C -E UTF8 || exit 1
set -- "$2/postgres" -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off
as_nobody "$@" -D /mnt/data -p {POSTGRES}
"""


class Lab(Apart):
    """A host, a runner, and a container `lab`, whose services have what they serve in `there`."""

    def __init__(self, directory: Path) -> None:
        places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda place: int(place.parent.name))
        assert places, "PostgreSQL is not installed: run scripts/system-packages test"
        super().__init__(directory, runner_options=("--backend=docker",))
        self.there = directory / "there"
        self.there.mkdir()
        self._ssh(directory / "home" / ".ssh")
        eventually(lambda: "online" in self.succeed("node", "list"))
        self.succeed(
            *("vps", "create", "--name=lab", "--ssh", f"--image={busybox_image()}"),
            *("--mount=/:/host", f"--mount={self.there}:/host/mnt", "--"),
            *(*OUTSIDE, "/bin/sh", "-c", SERVICES, "services", str(self.there), str(places[-1])),
        )
        self.succeed("ssh-config", "--install")

    def _ssh(self, home: Path) -> None:
        """A user with a key, who knows the task by its name."""
        home.mkdir(parents=True, mode=0o700)
        make_key(home / "id_ed25519")
        self.environment |= {"HOME": str(home.parent)}
        self.environment.pop("SSH_AUTH_SOCK", None)
        config = self.directory / "ssh_config"
        config.write_text(
            f"Match all\n    IdentityFile {home / 'id_ed25519'}\n    IdentitiesOnly yes\n    BatchMode yes\n"
            f"Host lab\n    User root\nInclude {self.directory / 'ssh' / 'config'}\n"
        )
        self.ssh = ["ssh", "-F", str(config)]

    def forward(self, port: int, *options: str) -> tuple[int, Program]:
        """The local port of a new forward to a service, and the forward."""
        program = self.start("forward", "lab", f"0:{port}", "--json", *options)
        return program.listening(), program

    def restart(self, hop: str, under_way: Callable[[], bool]) -> None:
        """Kill the host or the runner under a program, and start it again."""
        assert under_way()
        getattr(self, hop).stop(signal.SIGKILL)
        assert under_way(), f"it was over before the {hop} was killed"
        getattr(self, f"start_{hop}")()

    def restart_both(self, program: subprocess.Popen[bytes], moved: Callable[[], int], first: int, then: int) -> None:
        """The host once so many bytes have moved, the runner once so many have."""
        for hop, least in zip(HOPS, (first, then), strict=True):
            eventually(lambda least=least: moved() >= least or program.poll() is not None, within=60)  # type: ignore[misc]
            self.restart(hop, lambda: program.poll() is None)

    def close(self) -> None:
        self.run("vps", "rm", "lab")
        super().close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    require_engine()
    ours()
    with contextlib.closing(Lab(tmp_path_factory.mktemp("lab"))) as lab:
        yield lab


def need(*programs: str) -> None:
    """The test's programs are there: a missing one is a failure, not a test less."""
    for program in programs:
        assert shutil.which(program), f"{program} is not installed: run scripts/system-packages test"


@contextlib.contextmanager
def started(lab: Lab, *command: str | Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program, and its end."""
    with subprocess.Popen(
        command,
        env={**lab.environment, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def output(program: subprocess.Popen[bytes]) -> bytes:
    """What it prints until its end, which must be a good one."""
    said, complaint = program.communicate(timeout=120)
    assert program.returncode == 0, complaint.decode("utf-8", "replace") + said.decode("utf-8", "replace")[-2000:]
    return said


@contextlib.contextmanager
def on_a_terminal(lab: Lab, *command: str) -> Iterator[pexpect.spawn]:
    """A program that a person sits before."""
    child = pexpect.spawn(
        command[0], list(command[1:]), env={**lab.environment, "TERM": "xterm"}, dimensions=(24, 80), timeout=TIMEOUT
    )
    child.delaybeforesend = None
    try:
        yield child
    finally:
        child.close(force=True)


def size(tree: Path) -> int:
    """Bytes of all files below a directory, which somebody writes to."""
    found = 0
    for directory, _, names in os.walk(tree):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += Path(directory, name).lstat().st_size
    return found


def test_rsync_copies_a_tree_over_ssh(lab: Lab, tmp_path: Path) -> None:
    need("rsync", "ssh")
    tree = {f"large{number}": os.urandom(16 * MIB) for number in range(4)}
    tree |= {f"sub/{number}": os.urandom(number * 100) for number in range(300)}
    here, there = tmp_path / "here", lab.there / "rsync"
    (here / "sub").mkdir(parents=True)
    for name, content in tree.items():
        (here / name).write_bytes(content)
    through = [f"--rsh={shlex.join(lab.ssh)}", f"--rsync-path={shlex.join([*OUTSIDE, 'rsync'])}"]
    with started(lab, "rsync", "-a", "--bwlimit=16m", *through, f"{here}/", f"lab:{there}/") as rsync:
        lab.restart_both(rsync, lambda: size(there), 8 * MIB, 32 * MIB)
        output(rsync)
    assert {name: (there / name).read_bytes() for name in tree} == tree
    assert size(there) == sum(map(len, tree.values()))


def test_git_pushes_a_repository(lab: Lab, tmp_path: Path) -> None:
    need("git")
    here, there = tmp_path / "work", lab.there / "repository.git"
    env = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    env |= {f"GIT_{who}_{what}": "me@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*command: str | Path) -> bytes:
        with started(lab, "git", *command, **env) as program:
            return output(program)

    git("init", "-q", "-b", "main", here)
    git("init", "-q", "--bare", "-b", "main", there)
    for number in range(64):
        (here / str(number)).write_bytes(os.urandom(MIB))
    git("-C", here, "add", ".")
    git("-C", here, "commit", "-q", "-m", "all")
    port, _ = lab.forward(GIT, "--wait")
    url = f"git://127.0.0.1:{port}/repository.git"
    # It compresses while it sends, one thread alone: that takes longer than what is on the way at a time.
    slowly = ["-c", "pack.threads=1", "-c", "pack.window=0"]
    with started(lab, "git", "-C", here, *slowly, "push", "-q", url, "main", **env) as push:
        lab.restart_both(push, lambda: size(there), 4 * MIB, 24 * MIB)
        output(push)
    git("-C", there, "fsck", "--full", "--strict")
    assert git("-C", there, "rev-parse", "main^{tree}") == git("-C", here, "rev-parse", "main^{tree}")


def test_psql_commits_the_transaction_that_it_was_in(lab: Lab) -> None:
    need("psql")
    port, forward = lab.forward(POSTGRES, "--wait")
    url = f"postgresql://me@127.0.0.1:{port}/postgres?sslmode=disable"
    with on_a_terminal(lab, "psql", "-X", "-P", "pager=off", url) as psql:

        def say(statement: str, answer: str) -> str:
            psql.sendline(statement)
            psql.expect(f"{answer}\\s.*postgres=")
            return str(psql.after.decode())

        say("CREATE TABLE kept (row text);", "CREATE TABLE")
        say("BEGIN;", "BEGIN")
        say("INSERT INTO kept VALUES ('before');", "INSERT 0 1")
        number = say("SELECT 'n' || txid_current();", r"n\d+").split()[0]
        for hop in HOPS:
            psql.expect_exact("*# ")  # the prompt inside a transaction
            lab.restart(hop, lambda: psql.isalive())
            say(f"INSERT INTO kept VALUES ('after the {hop}');", "INSERT 0 1")
            forward.event("resumed")
        assert say("SELECT 'n' || txid_current();", r"n\d+").split()[0] == number
        say("COMMIT;", "COMMIT")
    with started(lab, "psql", "-X", "-At", url, "-c", "SELECT * FROM kept") as another:
        assert output(another).decode().splitlines() == ["before", "after the host", "after the runner"]


def test_vim_over_ssh_saves_what_was_typed_before_and_after(lab: Lab) -> None:
    need("vim", "ssh")
    saved = lab.there / "saved"
    vim = [*OUTSIDE, "/usr/bin/vim", "-u", "NONE", "-i", "NONE", "-n", "/mnt/saved"]
    with on_a_terminal(lab, *lab.ssh, "-t", "lab", shlex.join(vim)) as ssh:
        ssh.expect_exact("~ ")
        ssh.send("ibefore\r")
        ssh.expect_exact("before")
        for hop in HOPS:
            lab.restart(hop, lambda: ssh.isalive() and not saved.exists())
            ssh.send(f"after the {hop}\r")
            ssh.expect_exact(f"after the {hop}")
        ssh.send("\x1b:wq\r")
        ssh.expect(pexpect.EOF)
        ssh.wait()
        assert ssh.exitstatus == 0
    assert saved.read_text() == "before\nafter the host\nafter the runner\n\n"


@pytest.mark.alone
def test_iperf3_measures_both_ways(lab: Lab) -> None:
    need("iperf3")
    told = lab.there / "iperf3"
    # A connection that only looks whether it listens would have the next one find it busy.
    eventually(lambda: b"Server listening" in told.read_bytes())
    port, _ = lab.forward(IPERF3)
    before = told.stat().st_size

    def seconds() -> int:
        """How many lines of the server's tell what came or went in a second, where something did."""
        return len(re.findall(rb" sec +(?!0\.00 Bytes)", told.read_bytes()[before:]))

    command = ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-t", "10", "--bidir", "-J"]
    with started(lab, *command) as iperf3:
        lab.restart_both(iperf3, seconds, 2, 8)
        result = json.loads(output(iperf3))
    assert "error" not in result
    for way in ("sum_received", "sum_received_bidir_reverse"):
        assert result["end"][way]["bytes"] > MIB
