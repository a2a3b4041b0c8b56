"""`kohakuriver connect` as people and scripts use it: a real terminal, real pipes, real tasks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import docker_images, forked
from tests.support.forked import PROGRAM
from tests.support.processes import eventually
from tests.support.terminals import Terminal, a_terminal
from tests.support.up import TIMEOUT, Apart, Cluster, Commands

BUSYBOX = "/bin/busybox"
STAY = ("/bin/busybox", "sleep", "100000")
ANY_BYTES = random.Random(5).randbytes(3_000_000)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("connect")
    cluster = Cluster(directory)
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def process_task(cluster: Cluster) -> str:
    cluster.succeed("vps", "create", "--backend", "process", "--name", "proc", "-e", "SHELL=/bin/bash")
    return "proc"


@pytest.fixture(scope="module")
def docker_task(cluster: Cluster) -> Iterator[str]:
    docker_images.require_engine()
    cluster.succeed("vps", "create", "--image", docker_images.busybox_image(), "--name", "cont", "--", *STAY)
    yield "cont"
    cluster.succeed("vps", "rm", "cont")


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def task(request: pytest.FixtureRequest) -> str:
    """A running task, of each backend that can run something inside one."""
    name: str = request.getfixturevalue(f"{request.param}_task")
    return name


def applet(task: str, *command: str) -> list[str]:
    """A command of busybox: the test image has no names for them but `sh`."""
    return [*([BUSYBOX] if task == "cont" else []), *command]


def connect(
    commands: Commands, *arguments: str, stdin: bytes = b"", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """`kohakuriver connect` between pipes."""
    variables = {**commands.environment, **(environment or {})}
    return forked.run(["connect", *arguments], env=variables, stdin=stdin, timeout=TIMEOUT)


# -- between pipes -------------------------------------------------------------------------------------------------


def test_a_command_has_its_outputs_apart_and_its_exit_code_is_ours(cluster: Cluster, task: str) -> None:
    done = connect(cluster, task, "--", "sh", "-c", "echo out; echo err >&2; echo more; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\nmore\n", b"err\n", 7)


def test_a_command_that_a_signal_ended_gives_128_and_its_number(cluster: Cluster, task: str) -> None:
    assert connect(cluster, task, "--", "sh", "-c", "kill -USR1 $$").returncode == 128 + signal.SIGUSR1


def test_any_bytes_pass_unchanged_both_ways_and_the_end_of_stdin_too(cluster: Cluster, task: str) -> None:
    done = connect(cluster, task, "--", *applet(task, "cat"), stdin=ANY_BYTES)
    assert (done.stdout == ANY_BYTES, done.returncode) == (True, 0)


def test_a_command_may_end_without_having_read_its_stdin(cluster: Cluster, task: str) -> None:
    done = connect(cluster, task, "--", *applet(task, "head", "-c", "3"), stdin=ANY_BYTES)
    assert (done.stdout, done.returncode) == (ANY_BYTES[:3], 0)


def test_a_command_may_close_its_stdin_and_still_speak(cluster: Cluster, task: str) -> None:
    done = connect(cluster, task, "--", "sh", "-c", "exec <&-; echo spoken", stdin=ANY_BYTES)
    assert (done.stdout, done.returncode) == (b"spoken\n", 0)


def test_a_command_needs_no_dashes_and_gets_variables(cluster: Cluster, task: str) -> None:
    done = connect(cluster, "-e", "GREETING=a b", task, "--env=OTHER=c", "sh", "-c", 'echo "$GREETING $OTHER"; exit 4')
    assert (done.stdout, done.returncode) == (b"a b c\n", 4)


@pytest.mark.docker
def test_a_command_in_a_container_runs_as_whom_and_where_it_is_told(cluster: Cluster, docker_task: str) -> None:
    who_and_where = "/bin/busybox id -u; /bin/busybox id -g; pwd"
    done = connect(cluster, "--user", "12345:54321", docker_task, "--workdir=/proc", "sh", "-c", who_and_where)
    assert (done.stdout, done.returncode) == (b"12345\n54321\n/proc\n", 0)
    done = connect(cluster, "-w", "/nowhere", docker_task, "sh", "-c", "pwd")
    assert done.returncode in (126, 127)
    assert b"/nowhere" in done.stderr
    done = connect(cluster, "-u", "nobody-known", docker_task, "sh", "-c", "pwd")
    assert done.returncode not in (0, 1)
    assert b"nobody-known" in done.stderr


def test_a_command_of_a_process_task_runs_where_it_is_told_and_as_nobody_else(
    cluster: Cluster, process_task: str, tmp_path: Path
) -> None:
    assert connect(cluster, "-w", str(tmp_path), process_task, "pwd").stdout == f"{tmp_path}\n".encode()
    for wrong in (["-w", str(tmp_path / "missing")], ["-u", "root"], ["-w", "relative"]):
        done = connect(cluster, *wrong, process_task, "pwd")
        assert (done.stdout, done.returncode) == (b"", 2)
        assert done.stderr.count(b"\n") == 1


def test_a_command_that_is_not_there_is_said_so_and_gives_127(cluster: Cluster, task: str) -> None:
    done = connect(cluster, task, "--", "no-such-program", "-x")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"no-such-program: command not found\n", 127)


ENGINE = "OCI runtime exec failed: exec failed: executable file not found in $PATH"
ENDS_LIKE_THE_ENGINE = f"echo '{ENGINE}' >&2; exit 126"


@pytest.mark.docker
@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["/nowhere/program"], 127, "/nowhere/program: command not found\n"),
        (["../bin/nothing"], 127, "../bin/nothing: command not found\n"),
        (["/etc/hosts"], 126, "ermission denied"),
        (["sh", "-c", "nothing"], 127, "sh: nothing: not found\n"),
        (["sh", "-c", ENDS_LIKE_THE_ENGINE], 126, f"{ENGINE}\n"),
    ],
)
def test_why_a_program_of_a_container_was_not_run_is_found_out_whatever_words_the_engine_has_for_it(
    cluster: Cluster, docker_task: str, command: list[str], code: int, said: str
) -> None:
    done = connect(cluster, docker_task, "--", *command)
    assert (done.stdout, done.returncode) == (b"", code)
    assert said in done.stderr.decode()


def test_arguments_are_the_bytes_that_they_were_here(cluster: Cluster, task: str) -> None:
    odd = b"lat\xe9n \n'$x\n"
    done = subprocess.run(
        [*map(os.fsencode, PROGRAM), b"connect", task.encode(), b"--", b"sh", b"-c", b'printf %s "$1"', b"sh", odd],
        env=cluster.environment, capture_output=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == (odd, b"", 0)


@pytest.mark.parametrize("command", [[b"forward", b"\xff", b"1"], [b"vps", b"status", b"a\xff"], [b"connect", b"\xff"]])
def test_a_name_that_is_no_text_is_refused(cluster: Cluster, command: list[bytes]) -> None:
    done = subprocess.run(
        [*map(os.fsencode, PROGRAM), *command], env=cluster.environment, capture_output=True, timeout=TIMEOUT
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_without_a_command_the_shell_runs_what_is_piped_in(cluster: Cluster, task: str) -> None:
    done = connect(cluster, task, stdin=b"echo one\nexit 5\n")
    assert (done.stdout, done.returncode) == (b"one\n", 5)


def test_whoever_stops_reading_ends_the_command(cluster: Cluster, task: str) -> None:
    line = f"{' '.join([*PROGRAM, 'connect', task, '--', 'sh', '-c'])} 'while :; do echo y; done' | head -n 1"
    done = subprocess.run(["bash", "-c", line], env=cluster.environment, capture_output=True, timeout=TIMEOUT)
    assert (done.stdout, done.returncode) == (b"y\n", 0)


# -- on a terminal -------------------------------------------------------------------------------------------------


def test_the_shell_has_our_terminals_size_also_after_it_changed(cluster: Cluster, task: str) -> None:
    with a_terminal(cluster, task, rows=30, cols=100) as terminal:
        terminal.ready()
        terminal.line("stty size")
        terminal.expect("30 100\r\n")
        terminal.child.setwinsize(41, 77)

        def resized() -> bool:
            terminal.line("echo size:$(stty size):")
            return terminal.expect(r"size:(\d+ \d+):")[1] == b"41 77"

        eventually(resized)
        terminal.line("exit")
        assert terminal.ended() == 0


def test_a_resize_while_the_connection_is_made_is_not_lost(cluster: Cluster, process_task: str) -> None:
    host = cluster.ready["host_url"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        slow = f"http://127.0.0.1:{listener.getsockname()[1]}"
        token = json.loads((cluster.directory / "cluster.json").read_text())["token"]
        options = ["--host", slow, "--token", token]
        with a_terminal(cluster, process_task, *options, "--", "sh", "-c", "read x; stty size", cols=80) as terminal:
            theirs, _ = listener.accept()  # it has read the size, and waits for the host
            terminal.child.setwinsize(33, 133)
            ours = socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2])))
            with theirs, ours:
                for source, target in ((theirs, ours), (ours, theirs)):
                    threading.Thread(target=_copy, args=(source, target), daemon=True).start()
                terminal.line("")
                terminal.expect("33 133")
                assert terminal.ended() == 0


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_a_command_on_a_terminal_knows_the_size_from_its_start(cluster: Cluster, task: str) -> None:
    with a_terminal(cluster, task, "--", *applet(task, "stty", "size"), rows=31, cols=99) as terminal:
        assert terminal.ended() == 0
        assert "31 99" in terminal.said()


def test_a_command_on_a_terminal_gets_pipes_where_that_is_wished(cluster: Cluster, task: str) -> None:
    with a_terminal(cluster, "-T", task, "sh", "-c", "test -t 1; echo code $?") as terminal:
        terminal.expect("code 1")
        assert terminal.ended() == 0


def test_ctrl_c_and_ctrl_z_go_to_the_remote_shell(cluster: Cluster, task: str) -> None:
    with a_terminal(cluster, task) as terminal:
        terminal.ready()
        terminal.line("sh -c 'echo be$((1))gin; exec sleep 1000'")
        terminal.expect("be1gin")
        terminal.child.send(b"\x03")
        terminal.ready()
        terminal.line("sh -c 'echo be$((2))gin; exec sleep 1000'")
        terminal.expect("be2gin")
        terminal.child.send(b"\x1a")
        terminal.expect("Stopped")
        terminal.line("kill -9 %1; exit 9")
        terminal.line("exit 9")  # shells refuse once while they have stopped jobs
        assert terminal.ended() == 9


def test_the_end_of_the_shell_is_ours_with_its_exit_code(cluster: Cluster, task: str) -> None:
    with a_terminal(cluster, task) as terminal:
        terminal.ready()
        terminal.line("exit 3")
        assert terminal.ended() == 3
        assert terminal.modes() == terminal.before


def test_text_in_any_language_and_bytes_that_are_no_text_pass_unchanged(cluster: Cluster, task: str) -> None:
    with a_terminal(cluster, task) as terminal:
        terminal.ready()
        terminal.line(r"printf '<%s|\377\200\303>' grüße-€-日本 | cat")
        terminal.child.expect_exact("<grüße-€-日本|".encode() + b"\xff\x80\xc3>")


def test_a_paste_of_a_megabyte_arrives_whole(cluster: Cluster, task: str) -> None:
    paste = bytes(random.Random(1).choices(b"abcdefghijklmnopqrstuvwxyz ~.\r\n", k=1_000_000))
    script = f"stty raw -echo; echo rea$((1))dy; head -c {len(paste)} | sha256sum"
    with a_terminal(cluster, task, "--", "sh", "-c", script) as terminal:
        terminal.expect("rea1dy")
        terminal.child.send(re.sub(rb"(^|[\r\n])~", rb"\1~~", paste))
        assert terminal.expect("([0-9a-f]{64})")[1].decode() == hashlib.sha256(paste).hexdigest()
        assert terminal.ended() == 0


def test_tilde_dot_at_the_start_of_a_line_ends_it_and_elsewhere_not(cluster: Cluster, task: str) -> None:
    with a_terminal(cluster, task) as terminal:
        terminal.ready()
        terminal.line("echo a~.b")
        terminal.expect("a~.b\r\n")
        terminal.line("~~ 2>/dev/null; echo sti$((1))ll")
        terminal.expect("sti1ll")
        terminal.child.send(b"~.")
        assert terminal.ended() == 129
        assert terminal.modes() == terminal.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV])
def test_the_terminal_is_as_before_whatever_ended_us(
    cluster: Cluster, process_task: str, number: signal.Signals
) -> None:
    with a_terminal(cluster, process_task) as terminal:
        terminal.ready()
        assert terminal.modes() != terminal.before
        terminal.child.kill(number)
        eventually(lambda: terminal.modes() == terminal.before)
        terminal.child.wait()
        died = terminal.child.signalstatus or terminal.child.exitstatus
        assert died in (number, 128 + number)


def test_tilde_dot_ends_a_link_that_hangs(cluster: Cluster, process_task: str) -> None:
    host = next(p for p in psutil.Process(cluster.up.process.pid).children() if "host" in p.cmdline())
    with a_terminal(cluster, process_task) as terminal:
        terminal.ready()
        host.suspend()
        try:
            terminal.child.send(b"into the void\r~.")
            assert terminal.ended() == 129
            assert terminal.modes() == terminal.before
        finally:
            host.resume()


def test_a_lost_host_is_said_so_and_gives_7(tmp_path: Path) -> None:
    apart = Apart(tmp_path)
    try:
        eventually(lambda: "online" in apart.succeed("node", "list"))
        apart.succeed("vps", "create", "--backend", "process", "--name", "lonely")
        with a_terminal(apart, "--no-resume", "lonely") as terminal:
            terminal.ready()
            apart.host.stop(signal.SIGKILL)
            assert terminal.ended() == 7
            assert "The connection to task lonely was lost" in terminal.said()
            assert terminal.modes() == terminal.before
    finally:
        apart.close()


def test_a_terminal_and_a_command_go_on_when_the_host_was_killed_and_came_back(tmp_path: Path) -> None:
    apart = Apart(tmp_path)
    try:
        eventually(lambda: "online" in apart.succeed("node", "list"))
        apart.succeed("vps", "create", "--backend", "process", "--name", "lasting", "-e", "HOME=/")
        job = apart.start("connect", "lasting", "--", "sh", "-c", "echo here; seq 1 200000")
        job.line("here")
        with a_terminal(apart, "lasting") as terminal:
            terminal.ready()
            for _ in range(2):
                apart.host.stop(signal.SIGKILL)
                terminal.line("echo typed$((1))meanwhile")
                apart.start_host()
                terminal.expect("typed1meanwhile")
            terminal.line("exit 5")
            assert terminal.ended() == 5
            assert terminal.modes() == terminal.before
        job.line("200000")
    finally:
        apart.close()


def test_a_full_screen_editor_and_a_live_display_work_in_tmux(
    cluster: Cluster, process_task: str, tmp_path: Path
) -> None:
    socket, written = str(tmp_path / "tmux"), tmp_path / "written"

    def tmux(*arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", socket, *arguments], env=cluster.environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    def screen(text: str) -> bool:
        return text in tmux("capture-pane", "-p", "-t", "s")

    line = " ".join([*PROGRAM, "connect", process_task])
    tmux("-f", "/dev/null", "new-session", "-d", "-s", "s", "-x", "90", "-y", "30", line)
    try:
        tmux("send-keys", "-t", "s", "vim -u NONE -i NONE; top", "Enter")
        eventually(lambda: screen("VIM - Vi IMproved"))
        tmux("send-keys", "-t", "s", "i", "first line", "Enter", "grüße", "Escape")
        eventually(lambda: screen("grüße"))
        tmux("resize-window", "-t", "s", "-x", "100", "-y", "40")
        tmux("send-keys", "-t", "s", f":w {written}", "Enter")
        eventually(written.exists)
        tmux("send-keys", "-t", "s", ":echo 'lines=' . &lines . ' columns=' . &columns", "Enter")
        eventually(lambda: screen("lines=40 columns=100"))
        tmux("send-keys", "-t", "s", ":q", "Enter")
        assert written.read_text() == "first line\ngrüße\n"
        eventually(lambda: screen("load average"))
        tmux("send-keys", "-t", "s", "q")
        tmux("send-keys", "-t", "s", "exit", "Enter")
        eventually(lambda: subprocess.run(["tmux", "-S", socket, "has-session"], capture_output=True).returncode)
    finally:
        subprocess.run(["tmux", "-S", socket, "kill-server"], capture_output=True, check=False)


# -- beside others, and the end of things --------------------------------------------------------------------------


def test_a_flood_that_nobody_reads_slows_no_other_terminal(cluster: Cluster, task: str) -> None:
    with a_terminal(cluster, task, "--", *applet(task, "yes")) as stalled, a_terminal(cluster, task) as other:
        stalled.expect("y\r\ny\r\n")
        other.ready()
        for number in range(20):
            other.line(f"echo answer-$(({number}+1))-")
            other.expect(f"answer-{number + 1}-")


def processes_with(mark: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


@pytest.mark.parametrize("on", ["terminal", "pipes"])
def test_a_command_whose_user_is_gone_is_hung_up(cluster: Cluster, task: str, on: str) -> None:
    mark = f"1000{random.randrange(10**6)}"  # how long it sleeps, and what tells it from all others
    # A connection without a good-bye is held for a while, where it may.
    resume = [] if on == "terminal" else ["--no-resume"]
    command = ["connect", *resume, task, "--", "sh", "-c", f"echo here; exec {' '.join(applet(task, 'sleep', mark))}"]
    if on == "terminal":
        terminal = Terminal(cluster, *command[1:])
        terminal.expect("here")
        kill: Callable[[], object] = lambda: terminal.child.close(force=True)  # noqa: E731
    else:
        program = cluster.start(*command)
        program.line("here")
        kill = lambda: program.stop(signal.SIGKILL)  # noqa: E731
    eventually(lambda: processes_with(mark))
    kill()
    eventually(lambda: not processes_with(mark))


def test_a_task_that_is_stopped_ends_its_terminals_with_a_sentence_and_4(cluster: Cluster) -> None:
    cluster.succeed("vps", "create", "--backend", "process", "--name", "shortlived")
    with a_terminal(cluster, "shortlived") as terminal:
        terminal.ready()
        cluster.succeed("vps", "stop", "shortlived")
        assert terminal.ended() == 4
        assert re.search("Task shortlived (was|is) stopped", terminal.said())
        assert terminal.modes() == terminal.before
    refused = connect(cluster, "shortlived")
    assert refused.returncode == 4
    assert b"shortlived" in refused.stderr


@pytest.mark.docker
def test_an_image_without_a_shell_is_said_so_and_its_programs_can_be_run(cluster: Cluster) -> None:
    docker_images.require_engine()
    cluster.succeed("vps", "create", "--image", docker_images.single_binary_image(), "--name", "bare")
    try:
        refused = connect(cluster, "bare")
        assert (refused.returncode, refused.stdout) == (4, b"")
        assert b"There is no shell in the task's image" in refused.stderr
        done = connect(cluster, "bare", "--", "/only", "--version")
        assert (done.returncode, done.stdout[:13]) == (0, b"tunnel-client")
    finally:
        cluster.succeed("vps", "rm", "bare")


@pytest.mark.docker
def test_the_shell_that_the_image_names_is_the_one(cluster: Cluster) -> None:
    docker_images.require_engine()
    busybox = Path(shutil.which("busybox") or BUSYBOX).read_bytes()
    files = {"bin/busybox": busybox, "bin/sh": busybox, "opt/ash": busybox}
    image = docker_images.make_image("named-shell", files, "ENV SHELL=/opt/ash")
    cluster.succeed("vps", "create", "--image", image, "--name", "named", "--", *STAY)
    try:
        done = connect(cluster, "named", stdin=b"/bin/busybox tr '\\0' ' ' </proc/$$/cmdline\n")
        assert done.stdout.split()[0] == b"/opt/ash"
    finally:
        cluster.succeed("vps", "rm", "named")


def test_what_has_no_terminal_is_one_clear_sentence_and_its_exit_code(cluster: Cluster, process_task: str) -> None:
    node = json.loads(cluster.succeed("node", "list", "--json"))["nodes"][0]["name"]
    cluster.succeed("vps", "adopt", "--address", "127.0.0.1", "--node", node, "--name", "machine")
    cases: list[tuple[list[str], dict[str, str], int, bytes]] = [
        (["no-such-task"], {}, 3, b"no task 'no-such-task'"),
        (["machine"], {}, 4, b"vps connect machine"),
        ([process_task], {"KOHAKURIVER_TOKEN": "wrong"}, 5, b"does not know this token"),
        ([process_task, "--"], {}, 2, b"A command must follow '--'."),
        ([process_task], {"KOHAKURIVER_HOST": "http://127.0.0.1:9"}, 7, b"can't be reached"),
    ]
    for arguments, environment, code, sentence in cases:
        done = connect(cluster, *arguments, environment=environment)
        assert (done.returncode, done.stderr.count(b"\n")) == (code, 1), done.stderr
        assert sentence in done.stderr
