"""Tasks for OpenSSH's own programs: ssh, scp, sftp, and what runs over them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ssh import USER, Users, make_key, ours, stand_in
from tests.support.up import broken


@pytest.fixture(scope="module", params=["ours", "openssh"])
def users(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    directory = tmp_path_factory.mktemp("ssh")
    users = Users(directory, ours() if request.param == "ours" else stand_in(directory))
    try:
        users.task = users.vps("web")  # type: ignore[attr-defined]
        yield users
    finally:
        users.close()


# What does not depend on the server is tested with one.
only_ours = pytest.mark.parametrize("users", ["ours"], indirect=True)


def lines(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    """What it said on stderr."""
    return done.stderr.decode().splitlines()


def test_a_command_runs_with_its_outputs_apart_and_its_own_exit_code(users: Users) -> None:
    done = users.ssh("web", "cat; echo error >&2; exit 7", input=bytes(range(256)))
    assert (done.returncode, done.stdout, done.stderr) == (7, bytes(range(256)), b"error\n")


def test_vps_connect_is_ssh_with_everything_behind_the_task(users: Users) -> None:
    done = users.connect("web", "-o", "SendEnv=NOTHING", "echo hello; exit 3")
    assert (done.returncode, done.stdout) == (3, b"hello\n"), done.stderr


@only_ours
def test_a_task_is_reached_by_its_id_and_by_its_name_in_our_domain(users: Users) -> None:
    for name in ("web.kohakuriver", f"{users.task['task_id']}.kohakuriver"):  # type: ignore[attr-defined]
        assert users.ssh(name, "echo hello").stdout == b"hello\n"


@only_ours
def test_ssh_works_through_plain_pipes_too(users: Users) -> None:
    data = os.urandom(3_000_000)
    done = users.ssh("-o", "ProxyUseFdpass=no", "-o", f"ProxyCommand={sys.executable} -m kohakuriver ssh-proxy %n",
                     "web", "cat", input=data)  # fmt: skip
    assert done.stdout == data, done.stderr


@pytest.mark.parametrize("protocol", ["-O", "-s"])
def test_scp_brings_64_mb_there_and_back_unchanged(users: Users, tmp_path: Path, protocol: str) -> None:
    here, there, back = (tmp_path / name for name in ("here", "there", "back"))
    here.write_bytes(os.urandom(1 << 20) * 64)
    for source, target in ((str(here), f"web:{there}"), (f"web:{there}", str(back))):
        done = users.call("scp", "-q", protocol, "-F", str(users.config), source, target)
        assert done.returncode == 0, done.stderr
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in (here, there, back)}
    assert len(digests) == 1


def test_sftp_puts_lists_renames_and_gets(users: Users, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"content")
    script = f"mkdir {tmp_path}/d\nput {tmp_path}/here {tmp_path}/d/a\nrename {tmp_path}/d/a {tmp_path}/d/b\n"
    script += f"ls {tmp_path}/d\nget {tmp_path}/d/b {tmp_path}/back\nrm {tmp_path}/d/b\nrmdir {tmp_path}/d\n"
    done = users.call("sftp", "-q", "-F", str(users.config), "-b", "-", "web", input=script.encode())
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/d/b" in done.stdout.decode()
    assert (tmp_path / "back").read_bytes() == b"content"
    assert not (tmp_path / "d").exists()


def test_rsync_makes_the_same_tree(users: Users, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(50):
        (source / f"f{number}").write_bytes(os.urandom(5000))
    done = users.call("rsync", "-a", "-e", f"ssh -F {users.config}", f"{source}/", f"web:{tmp_path}/target/")
    assert done.returncode == 0, done.stderr
    assert users.call("diff", "-r", str(source), f"{tmp_path}/target").returncode == 0


@only_ours
def test_git_clones_and_pushes(users: Users, tmp_path: Path) -> None:
    users.environment["GIT_SSH_COMMAND"] = f"ssh -F {users.config}"
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (
        ["git", "init", "-q", "--bare", f"{tmp_path}/there"],
        ["git", "clone", "-q", f"web:{tmp_path}/there", f"{tmp_path}/here"],
        [*git, "-C", f"{tmp_path}/here", "commit", "-q", "--allow-empty", "-m", "first"],
        ["git", "-C", f"{tmp_path}/here", "push", "-q", "origin", "HEAD:refs/heads/main"],
    ):
        done = users.call(*command)
        assert done.returncode == 0, done.stderr
    log = users.call("git", "-C", f"{tmp_path}/there", "log", "--format=%s", "main")
    assert log.stdout == b"first\n"


@only_ours
def test_ansible_pings_a_task_and_writes_a_file_there(users: Users, tmp_path: Path) -> None:
    made = tmp_path / "made"
    users.environment["ANSIBLE_HOME"] = str(tmp_path / "ansible")
    common = [
        *(sys.executable, "-m", "ansible", "adhoc", "all", "-i", "web,", f"--ssh-common-args=-F {users.config}"),
        *("-e", f"ansible_python_interpreter={sys.executable}"),
    ]
    done = users.call(*common, "-m", "ping")
    assert (done.returncode, b'"pong"' in done.stdout) == (0, True), done.stdout
    done = users.call(*common, "-m", "copy", "-a", f"content=hello dest={made}")
    assert (done.returncode, made.read_text()) == (0, "hello"), done.stdout


@contextlib.contextmanager
def echoing() -> Iterator[int]:
    """A service on a free port that sends back what it gets."""

    def serve(peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            while data := peer.recv(65536):
                peer.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def a_session(users: Users, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """An ssh that stays until its stdin ends; what it was asked to forward is there."""
    command = ["ssh", "-F", str(users.config), "-o", "ExitOnForwardFailure=yes", *options, "web", "echo ready; cat"]
    process = subprocess.Popen(
        command, env=users.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.stdin.close()
        assert process.wait(30) == 0


def exchange(sock: socket.socket) -> bool:
    data = os.urandom(500_000)
    got = bytearray()
    sending = threading.Thread(target=sock.sendall, args=(data,))
    sending.start()
    while len(got) < len(data) and (more := sock.recv(65536)):
        got += more
    sending.join()
    return bytes(got) == data


def test_local_forwarding_reaches_services_of_the_task(users: Users) -> None:
    local = free_port()
    with echoing() as port, a_session(users, "-L", f"{local}:127.0.0.1:{port}"):
        with socket.create_connection(("127.0.0.1", local), 30) as sock:
            assert exchange(sock)


def test_remote_forwarding_reaches_services_of_the_user(users: Users) -> None:
    with echoing() as port, a_session(users, "-R", f"0:127.0.0.1:{port}") as session:
        assert session.stderr is not None
        allocated = next(line for line in session.stderr if line.startswith(b"Allocated port "))
        remote = int(allocated.split()[2])
        with socket.create_connection(("127.0.0.1", remote), 30) as sock:
            assert exchange(sock)


def test_dynamic_forwarding_is_a_socks_proxy_in_the_task(users: Users) -> None:
    local = free_port()
    with echoing() as port, a_session(users, "-D", f"127.0.0.1:{local}"):
        with socket.create_connection(("127.0.0.1", local), 30) as sock:
            sock.sendall(b"\5\1\0")
            assert sock.recv(2) == b"\5\0"
            sock.sendall(b"\5\1\0\1\x7f\0\0\1" + port.to_bytes(2, "big"))
            assert sock.recv(10)[:2] == b"\5\0"
            assert exchange(sock)


def test_an_agent_of_the_user_answers_in_the_task(users: Users) -> None:
    done = users.call("ssh-agent", "sh", "-c", f"ssh-add -q {users.key}; ssh -A -F {users.config} web ssh-add -l")
    assert done.returncode == 0, done.stderr
    fingerprint = users.call("ssh-keygen", "-l", "-f", str(users.key)).stdout.split()[1]
    assert fingerprint in done.stdout


def test_fifty_sessions_at_once_get_their_own_answers(users: Users) -> None:
    command = ["ssh", "-F", str(users.config), "web"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(subprocess.Popen([*command, f"echo {n}; cat"], env=users.environment, **pipes))
            for n in range(50)
        ]
        # Each has said its number, and none has ended yet: all are there at once.
        assert [int(each.stdout.readline() or -1) for each in sessions if each.stdout] == list(range(50))
        for each in sessions:
            assert each.communicate(b"bye", timeout=60)[0] == b"bye"
            assert each.returncode == 0


def refusal(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one sentence of a command that failed."""
    assert len(lines(done)) == 1, done.stderr
    assert lines(done)[0].startswith("Error: ")
    return lines(done)[0]


@only_ours
def test_an_unknown_task_is_one_sentence_and_exit_code_3(users: Users) -> None:
    done = users.connect("nowhere")
    assert (done.returncode, "no task 'nowhere'" in refusal(done)) == (3, True)
    for option in ([], ["--pass-socket"]):
        done = users.call(sys.executable, "-m", "kohakuriver", "ssh-proxy", *option, "nowhere")
        assert (done.returncode, "no task 'nowhere'" in refusal(done)) == (3, True)


@only_ours
def test_a_stopped_task_is_one_sentence_and_exit_code_4(users: Users) -> None:
    users.vps("stopped")
    users.succeed("vps", "stop", "stopped")
    for done in (
        users.connect("stopped"),
        users.call(sys.executable, "-m", "kohakuriver", "ssh-proxy", "stopped"),
    ):
        assert (done.returncode, "stopped" in refusal(done)) == (4, True)


@only_ours
def test_a_task_without_an_ssh_server_is_one_sentence_and_exit_code_4(users: Users) -> None:
    # An address of the loopback on which nothing listens, whatever runs on this machine.
    users.succeed("vps", "adopt", "--address=127.9.9.9", f"--node={node(users)}", "--name=bare")
    done = users.connect("bare")
    assert (done.returncode, "nothing listens on its port 22" in refusal(done)) == (4, True)


def node(users: Users) -> str:
    return str(json.loads(users.succeed("node", "list", "--json"))["nodes"][0]["name"])


@only_ours
def test_an_ssh_server_that_has_died_is_one_sentence_and_exit_code_4(users: Users) -> None:
    task = users.vps("dying")
    done = users.connect("dying", "echo $PPID")
    port = json.loads(users.succeed("vps", "status", "--json", "dying"))["ssh_port"]
    assert done.returncode == 0, done.stderr
    os.kill(listener_on(port), signal.SIGKILL)
    done = users.connect(str(task["task_id"]))
    assert (done.returncode, "does not run" in refusal(done)) == (4, True)
    users.succeed("vps", "restart", "dying")
    assert users.connect("dying", "true").returncode == 0


def listener_on(port: int) -> int:
    """The process that listens on a port of this machine."""
    import psutil

    return next(
        found.pid
        for found in psutil.net_connections("tcp4")
        if found.status == psutil.CONN_LISTEN and found.laddr[1:] == (port,) and found.pid
    )


@only_ours
def test_without_a_valid_token_it_is_one_sentence_and_exit_code_5(users: Users) -> None:
    users.environment["KOHAKURIVER_TOKEN"] = "wrong"
    try:
        done = users.connect("web")
    finally:
        del users.environment["KOHAKURIVER_TOKEN"]
    assert (done.returncode, "token" in refusal(done)) == (5, True)


@only_ours
def test_a_proxy_that_is_not_there_is_one_sentence_and_exit_code_7(users: Users) -> None:
    users.environment["KOHAKURIVER_SSH_PROXY"] = f"127.0.0.1:{free_port()}"
    try:
        done = users.call(sys.executable, "-m", "kohakuriver", "vps", "connect", "--fdpass", "web")
        assert users.connect("web", "echo without it").stdout == b"without it\n"
    finally:
        del users.environment["KOHAKURIVER_SSH_PROXY"]
    assert (done.returncode, "can't be reached" in refusal(done)) == (7, True)


@only_ours
def test_a_wrong_key_is_told_by_ssh_in_one_line(users: Users, tmp_path: Path) -> None:
    make_key(tmp_path / "wrong")
    done = users.connect("web", "-o", "IdentityFile=none", "-o", f"IdentityFile={tmp_path / 'wrong'}", "true")
    assert done.returncode == 0  # --key comes first
    users.key, right = tmp_path / "wrong", users.key
    try:
        done = users.connect("web", "true")
    finally:
        users.key = right
    assert done.returncode == 255
    assert lines(done) == [f"{USER}@web: Permission denied (publickey)."]


@only_ours
def test_a_tasks_host_key_outlives_restarts_and_a_changed_one_is_refused(users: Users) -> None:
    first = users.vps("keyed")["ssh_host_key"]
    users.succeed("vps", "restart", "keyed")
    assert json.loads(users.succeed("vps", "status", "--json", "keyed"))["ssh_host_key"] == first
    assert users.ssh("keyed.kohakuriver", "true").returncode == 0
    known = users.directory / "ssh" / "known_hosts"
    text = known.read_text()
    assert first in text
    # Somebody in between shows another key than the one that the host knows of.
    other = users.task["ssh_host_key"]  # type: ignore[attr-defined]
    known.write_text(text.replace(first, other))
    try:
        done = users.ssh("-o", f"ProxyCommand={sys.executable} -m kohakuriver.cli.ssh_dial --known %n",
                         "-o", "ProxyUseFdpass=no", "keyed.kohakuriver", "true")  # fmt: skip
        assert done.returncode == 255
        assert b"HOST IDENTIFICATION HAS CHANGED" in done.stderr
    finally:
        known.write_text(text)


@only_ours
def test_a_task_that_is_removed_is_no_longer_in_the_installed_configuration(users: Users) -> None:
    config = users.directory / "ssh" / "config"
    users.vps("short-lived")
    assert "short-lived" in config.read_text()
    users.succeed("vps", "rm", "short-lived")
    assert "short-lived" not in config.read_text()


@only_ours
def test_a_plain_jump_through_the_proxy_works_with_a_token_as_password(users: Users) -> None:
    command = users.jump(f"{USER}@web", "cat", token=users.token)
    data = os.urandom(3_000_000)
    done = subprocess.run(
        command, env=users.password(users.token), input=data, capture_output=True, timeout=60, check=False
    )
    assert done.stdout == data, done.stderr


@only_ours
def test_a_plain_jump_through_the_proxy_works_with_the_key_of_the_task(users: Users) -> None:
    done = users.call(*users.jump(f"{USER}@web", "echo hello; exit 4"))
    assert (done.returncode, done.stdout) == (4, b"hello\n"), done.stderr


@only_ours
def test_a_jump_to_an_unknown_task_or_with_a_wrong_credential_says_why(users: Users, tmp_path: Path) -> None:
    done = users.call(*users.jump(f"{USER}@nowhere", "true"))
    assert (done.returncode, b"no task 'nowhere'" in done.stderr) == (255, True), done.stderr
    make_key(tmp_path / "stranger")
    done = users.call(*users.jump(f"{USER}@web", "true", identity=tmp_path / "stranger"))
    assert (done.returncode, b"Permission denied" in done.stderr) == (255, True)
    wrong = users.jump(f"{USER}@web", "true", token="wrong")
    done = subprocess.run(wrong, env=users.password("wrong"), input=b"", capture_output=True, timeout=60, check=False)
    assert (done.returncode, b"Permission denied" in done.stderr) == (255, True)


@only_ours
def test_a_session_breaks_when_its_task_is_removed(users: Users) -> None:
    users.vps("removed")
    with socket.create_connection(("127.0.0.1", users.port), 30) as sock, sock.makefile("rb") as answers:
        sock.sendall(f"REQUEST_TUNNEL removed {users.token}\n".encode())
        assert answers.readline() == b"SUCCESS\n"
        users.succeed("vps", "rm", "removed")
        broken(sock)
