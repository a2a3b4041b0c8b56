"""`kohakuriver forward`, with real programs at both ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pexpect
import psutil
import pytest

from tests.support.forked import PROGRAM
from tests.support.processes import eventually
from tests.support.up import TIMEOUT, Cluster, Service, broken, connect, echoes, refused


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: Cluster) -> Service:
    return cluster.service()


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that nothing listens on, nor can while the test runs."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def test_the_port_works_as_soon_as_the_line_is_printed(cluster: Cluster, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}")
    line = forward.line("Forwarding")
    local, arrow, remote, proto = line.removeprefix("Forwarding ").split(" ")
    assert (arrow, remote, proto) == ("->", f"{service.task}:{service.port}", "(tcp)")
    with connect(int(local.rpartition(":")[2])) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_bytes_arrive_unchanged(cluster: Cluster, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    data = os.urandom(1 << 20)
    with connect(forward.listening()) as connection:
        for _ in range(16):
            assert echoes(connection, data)
    assert forward.stop() == 0


def test_a_stdout_that_nobody_empties_holds_nothing_up(cluster: Cluster, service: Service, dead_port: int) -> None:
    command = [*PROGRAM, "forward", service.task, f"0:{service.port}", f"0:{dead_port}", "--json"]
    with subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, bufsize=0) as forward:
        try:
            assert forward.stdout is not None
            holds = fcntl.fcntl(forward.stdout, fcntl.F_SETPIPE_SZ, 4096)
            ports: list[int] = []
            while len(ports) < 2:
                event = json.loads(forward.stdout.readline())
                if event["event"] == "listening":
                    ports.append(event["local_port"])
            for _ in range(holds // 10):  # each failure is a line: together they are far more than the pipe holds
                assert refused(ports[1])
            with connect(ports[0]) as connection:
                assert echoes(connection)
            forward.terminate()
            assert forward.wait(TIMEOUT) == 0
        finally:
            forward.kill()


def test_several_ports_share_one_forward(cluster: Cluster, service: Service) -> None:
    other = cluster.service()
    forward = cluster.start("forward", service.task, f"0:{service.port}", f"0:{other.port}", "--json")
    listening = [forward.event("listening") for _ in range(2)]
    assert [event["remote_port"] for event in listening] == [service.port, other.port]
    assert len({event["local_port"] for event in listening}) == 2
    for event in listening:
        with connect(event["local_port"]) as connection:
            assert echoes(connection)
    assert forward.stop() == 0


def test_udp_datagrams_come_back_whole(cluster: Cluster, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}/udp", "--json")
    event = forward.event("listening")
    assert event["proto"] == "udp"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(30)
        sock.connect(("127.0.0.1", event["local_port"]))
        for data in (b"one", os.urandom(8000)):
            sock.send(data)
            assert sock.recv(65536) == data
    assert forward.stop() == 0


def test_options_may_stand_before_between_and_after_the_arguments(cluster: Cluster, service: Service) -> None:
    port = str(service.port)
    for arguments in (
        ["--json", "--local-port", "0", service.task, port],
        [service.task, "--local-port=0", port, "--json"],
        [service.task, port, "--json", "--local-host", "127.0.0.1", "--local-port", "0", "--proto", "tcp"],
    ):
        forward = cluster.start("forward", *arguments)
        with connect(forward.listening()) as connection:
            assert echoes(connection)
        assert forward.stop() == 0


def test_the_short_options_of_version_1_mean_what_they_did(cluster: Cluster, service: Service) -> None:
    command = ("forward", service.task, str(service.port), "-l", "0", "-H", "127.0.0.2", "-p", "udp", "--json")
    forward = cluster.start(*command)
    event = forward.event("listening")
    assert (event["local_host"], event["proto"], event["remote_port"]) == ("127.0.0.2", "udp", service.port)
    assert event["local_port"] != service.port
    assert forward.stop() == 0


def test_a_task_may_be_named_by_its_id(cluster: Cluster, service: Service) -> None:
    task_id = json.loads(cluster.succeed("vps", "status", service.task, "--json"))["task_id"]
    forward = cluster.start("forward", str(task_id), f"0:{service.port}", "--json")
    with connect(forward.listening()) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_stopped_is_no_failure_and_ends_open_connections(
    cluster: Cluster, service: Service, number: signal.Signals
) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    with connect(forward.listening()) as connection:
        assert echoes(connection)
        forward.process.send_signal(number)
        broken(connection)
    assert forward.ended() == 0
    closing = [json.loads(line)["event"] for line in forward.rest()]
    assert closing[-2:] == ["stats", "closed"]


def test_a_dead_port_is_reset_at_once_and_one_line_says_why(cluster: Cluster, service: Service, dead_port: int) -> None:
    forward = cluster.start("forward", service.task, f"0:{dead_port}")
    local = int(forward.line("Forwarding").split(" ")[1].rpartition(":")[2])
    for _ in range(3):
        assert refused(local)
    assert "nothing listens" in forward.line(str(dead_port), err=True)
    assert forward.stop() == 0
    assert forward.rest(err=True) == []


def test_a_dead_port_harms_no_other_port(cluster: Cluster, service: Service, dead_port: int) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", f"0:{dead_port}", "--json")
    good, dead = forward.listening(), forward.listening()
    with connect(good) as before:
        assert echoes(before)
        assert refused(dead)
        assert forward.event("stream_error")["remote_port"] == dead_port
        assert echoes(before)
        with connect(good) as after:
            assert echoes(after)
    assert forward.stop() == 0


def test_two_forwards_of_one_task_are_independent(cluster: Cluster, service: Service) -> None:
    first, second = (cluster.start("forward", service.task, f"0:{service.port}", "--json") for _ in range(2))
    with connect(first.listening()) as of_first, connect(second.listening()) as of_second:
        assert echoes(of_first, b"first")
        assert echoes(of_second, b"second")
        assert first.stop() == 0
        broken(of_first)
        assert echoes(of_second, b"still here")
    assert second.stop() == 0


def test_500_simultaneous_connections_all_work(cluster: Cluster, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    port = forward.listening()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.socket()) for _ in range(500)]
        for connection in connections:
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", port))
        for number, connection in enumerate(connections):
            connection.settimeout(30)
            assert echoes(connection, b"%d" % number)
    assert forward.stop() == 0


def test_a_forward_survives_a_restart_of_its_task(cluster: Cluster) -> None:
    service = cluster.service()
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    port = forward.listening()
    with connect(port) as connection:
        assert echoes(connection)
        restart = cluster.start("vps", "restart", service.task)
        broken(connection)
    service.wait_started()
    assert restart.ended() == 0
    with connect(port) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_a_killed_tunnel_client_ends_its_streams_at_once_and_the_same_forward_works_again(cluster: Cluster) -> None:
    service = cluster.service()
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    port = forward.listening()
    with connect(port) as connection:
        assert echoes(connection)
        forward.event("path")  # a stream that is just going over to the node would be told after another try
        os.kill(service.tunnel_client, signal.SIGKILL)
        connection.settimeout(1.0)
        broken(connection)
    restart = cluster.start("vps", "restart", service.task)
    service.wait_started()
    assert restart.ended() == 0
    with connect(port) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_a_forward_ends_with_3_when_its_task_is_gone_for_good(cluster: Cluster) -> None:
    service = cluster.service()
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    forward.listening()
    cluster.succeed("vps", "rm", service.task)
    closed = forward.event("closed")
    assert service.task in closed["reason"]
    assert forward.ended() == 3


def test_no_such_task_is_3(cluster: Cluster) -> None:
    done = cluster.run("forward", "nobody", "0:80")
    assert (done.returncode, done.stdout) == (3, "")
    assert "nobody" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_stopped_task_is_4(cluster: Cluster) -> None:
    service = cluster.service()
    cluster.succeed("vps", "stop", service.task)
    done = cluster.run("forward", service.task, f"0:{service.port}")
    assert (done.returncode, done.stdout) == (4, "")
    assert "stopped" in done.stderr


@pytest.mark.parametrize("command", [["forward", "any", "0:80"], ["vps", "list"]])
def test_a_wrong_token_is_5(cluster: Cluster, command: list[str]) -> None:
    done = cluster.run(*command, KOHAKURIVER_TOKEN="wrong")
    assert (done.returncode, done.stdout) == (5, "")
    assert "token" in done.stderr


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_taken_local_port_is_6_and_names_what_has_it_and_what_to_do(
    cluster: Cluster, service: Service, proto: str
) -> None:
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if proto == "tcp":
            taken.listen()
        port = taken.getsockname()[1]
        done = cluster.run("forward", service.task, f"{port}:{service.port}/{proto}")
        assert (done.returncode, done.stdout) == (6, "")
        name = Path("/proc/self/comm").read_text().strip()
        assert f"127.0.0.1:{port} is already in use by {name} (process {os.getpid()}); " in done.stderr
        assert "--local-port-fallback takes the next free port" in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_next_free_port_is_taken_and_said_where_that_is_wanted(cluster: Cluster, service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = ("forward", service.task, f"{port}:{service.port}", "--local-port-fallback")
        forward = cluster.start(*wanted, "--json")
        listening = forward.event("listening")
        assert listening["instead_of"] == port
        assert port < listening["local_port"] < port + 100
        with connect(listening["local_port"]) as connection:
            assert echoes(connection)
        other = cluster.start(*wanted)
        assert other.line("Forwarding").endswith(f" -> {service.task}:{service.port} (tcp), since {port} can't be had")
        assert forward.stop() == 0
        assert other.stop() == 0


def test_a_port_that_is_free_is_no_other_though_another_would_do(cluster: Cluster, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--local-port-fallback", "--json")
    first = forward.event("listening")
    assert forward.stop() == 0
    port = first["local_port"]
    again = cluster.start("forward", service.task, f"{port}:{service.port}", "--local-port-fallback", "--json")
    assert again.event("listening") == {**first, "local_port": port}
    assert again.stop() == 0


def test_a_command_gets_the_ports_and_ends_the_forward_with_its_code(cluster: Cluster, service: Service) -> None:
    code = (
        "import os, socket, sys\n"
        f"s = socket.create_connection(('127.0.0.1', int(os.environ['KOHAKURIVER_PORT_{service.port}'])))\n"
        "s.sendall(b'through'); print(s.recv(100).decode()); sys.exit(42)"
    )
    done = cluster.run("forward", service.task, f"0:{service.port}", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (42, "through\n")
    assert "Forwarding" in done.stderr


def test_what_a_command_sent_before_it_ended_arrives(cluster: Cluster, service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as beside:
        port = server.getsockname()[1]

        def slowly() -> int:
            peer, _ = server.accept()
            with peer:
                peer.settimeout(60)
                return sum(len(data) for data in iter(partial(peer.recv, 1 << 16), b""))

        arrived = beside.submit(slowly)
        code = (
            "import os, socket\n"
            f"s = socket.create_connection(('127.0.0.1', int(os.environ['KOHAKURIVER_PORT_{port}'])))\n"
            "s.sendall(bytes(40_000_000)); s.close()"
        )
        done = cluster.run("forward", service.task, f"0:{port}", "--", sys.executable, "-c", code)
        assert done.returncode == 0
        assert arrived.result(60) == 40_000_000


def test_a_command_does_not_wait_for_connections_of_others_that_say_nothing(cluster: Cluster, service: Service) -> None:
    code = f"import os, signal; print(os.environ['KOHAKURIVER_PORT_{service.port}'], flush=True); signal.pause()"
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--", sys.executable, "-c", code)
    with connect(int(forward.line(""))) as connection:
        assert echoes(connection)
        assert forward.stop() == 128 + signal.SIGTERM


def test_a_command_can_tell_a_ports_protocols_apart(cluster: Cluster, service: Service) -> None:
    ports = f"0:{service.port}/tcp", f"0:{service.port}/udp"
    names = [f"KOHAKURIVER_PORT_{service.port}{which}" for which in ("", "_TCP", "_UDP")]
    code = f"import os; print(*(os.environ[name] for name in {names}))"
    done = cluster.run("forward", service.task, *ports, "--", sys.executable, "-c", code)
    plain, tcp, udp = done.stdout.split()
    assert plain == tcp
    assert f"127.0.0.1:{tcp} -> {service.task}:{service.port} (tcp)" in done.stderr
    assert f"127.0.0.1:{udp} -> {service.task}:{service.port} (udp)" in done.stderr


def test_a_command_may_have_options_that_look_like_ours(cluster: Cluster, service: Service) -> None:
    code = "import sys; print(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--json", "--", "--help"]
    done = cluster.run("forward", service.task, f"0:{service.port}", "--", *command)
    assert (done.returncode, done.stdout) == (0, "['--json', '--', '--help']\n")


def test_a_command_gets_the_signals(cluster: Cluster, service: Service) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *a: sys.exit(7))\n"
        "print('up', flush=True); signal.pause()"
    )
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--", sys.executable, "-c", code)
    forward.line("up")
    assert forward.stop(signal.SIGTERM) == 7


def test_a_command_that_a_signal_ends_gives_the_code_that_shells_give(cluster: Cluster, service: Service) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    done = cluster.run("forward", service.task, f"0:{service.port}", "--", sys.executable, "-c", code)
    assert done.returncode == 128 + signal.SIGKILL


def test_a_command_that_is_not_there_is_127(cluster: Cluster, service: Service) -> None:
    done = cluster.run("forward", service.task, f"0:{service.port}", "--", "/no/such/program")
    assert done.returncode == 127
    assert "/no/such/program" in done.stderr


def test_a_command_is_not_run_when_the_forward_can_not_be_opened(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("forward", "nobody", "0:80", "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 3
    assert not (tmp_path / "ran").exists()


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, cluster: Cluster, *arguments: str) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            env={**cluster.environment, "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY),
        )
        os.close(slave)
        self._seen = b""

    def until(self, pattern: bytes) -> re.Match[bytes]:
        while not (found := re.search(pattern, self._seen)):
            more = os.read(self._master, 65536)
            assert more
            self._seen += more
        return found

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def ended(self) -> int:
        with contextlib.suppress(OSError):  # EIO: nobody has the other side open any more
            while os.read(self._master, 65536):
                pass
        os.close(self._master)
        return self.process.wait(TIMEOUT)


def test_a_terminal_shows_an_address_to_open_and_a_live_line_below_it(cluster: Cluster, service: Service) -> None:
    terminal = Terminal(cluster, "forward", service.task, f"0:{service.port}")
    line = terminal.until(rb"Forwarding 127\.0\.0\.1:(\d+) -> \S+ \(tcp\)  http://127\.0\.0\.1:(\d+)\r\n")
    assert line[1] == line[2]
    with connect(int(line[1])) as connection:
        assert echoes(connection)
        terminal.until(rb"1 open, 1 so far")
    terminal.press(b"\x03")
    assert terminal.ended() == 0


def test_ctrl_c_on_a_terminal_is_the_commands_to_answer(cluster: Cluster, service: Service) -> None:
    code = "import signal, sys; signal.signal(signal.SIGINT, lambda *a: sys.exit(5)); print('up'); signal.pause()"
    terminal = Terminal(cluster, "forward", service.task, f"0:{service.port}", "--", sys.executable, "-u", "-c", code)
    terminal.until(rb"up\r\n")
    terminal.press(b"\x03")
    assert terminal.ended() == 5


def test_a_reader_of_its_output_that_goes_away_does_not_end_a_forward(
    cluster: Cluster, service: Service, dead_port: int
) -> None:
    forward = subprocess.Popen(
        [*PROGRAM, "forward", service.task, f"0:{service.port}", f"0:{dead_port}", "--json"],
        env=cluster.environment,
        stdout=subprocess.PIPE,
    )
    assert forward.stdout is not None
    _connected, good, dead, *_others = (json.loads(forward.stdout.readline()) for _ in range(5))
    forward.stdout.close()
    assert refused(dead["local_port"])  # an event that nobody can be told of
    with connect(good["local_port"]) as connection:
        assert echoes(connection)
    forward.terminate()
    assert forward.wait(TIMEOUT) == 0


def test_localhost_leads_to_the_task_by_both_its_addresses(cluster: Cluster, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    first, second = forward.event("listening"), forward.event("listening")
    assert [first["local_host"], second["local_host"]] == ["127.0.0.1", "::1"]
    assert first["local_port"] == second["local_port"]
    for address in (first["local_host"], second["local_host"]):
        with socket.create_connection((address, first["local_port"]), timeout=TIMEOUT) as connection:
            assert echoes(connection)
    assert forward.stop() == 0


def test_a_loopback_address_that_another_program_has_is_told(cluster: Cluster, service: Service) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        forward = cluster.start("forward", service.task, f"{port}:{service.port}")
        assert f"[::1]:{port}" in forward.line("another program listens there", err=True)
        with connect(port) as connection:
            assert echoes(connection)
        assert forward.stop() == 0


def _is_served(port: int) -> bool:
    try:
        with connect(port) as connection:
            return echoes(connection)
    except ConnectionError:
        return False


def test_running_out_of_descriptors_is_told_and_passes(cluster: Cluster, service: Service) -> None:
    limited = ["bash", "-c", 'ulimit -n 40 && exec "$@"', "bash", *PROGRAM]
    command = [*limited, "forward", service.task, f"0:{service.port}", "--json"]
    with subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            events = (json.loads(line) for line in forward.stdout)
            port = next(event["local_port"] for event in events if event["event"] == "listening")
            with contextlib.ExitStack() as many:
                for _ in range(60):
                    many.enter_context(connect(port))
                told = next(event for event in events if event["event"] == "out_of_descriptors")
                assert told["waiting"] > 0 or os.environ.get("KOHAKURIVER_LOOP") != "asyncio"  # uvloop resets them
            eventually(lambda: _is_served(port))
            forward.terminate()
            forward.stdout.read()
            assert forward.wait(TIMEOUT) == 0
        finally:
            forward.kill()


def test_a_rush_that_takes_all_descriptors_is_told_though_it_is_over_at_once(
    cluster: Cluster, service: Service
) -> None:
    limited = ["bash", "-c", 'ulimit -n 40 && exec "$@"', "bash", *PROGRAM]
    command = [*limited, "forward", service.task, f"0:{service.port}", "--json"]
    with subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            events = (json.loads(line) for line in forward.stdout)
            port = next(event["local_port"] for event in events if event["event"] == "listening")
            with contextlib.ExitStack() as many:
                rush = [many.enter_context(connect(port)) for _ in range(60)]
                for connection in rush:
                    with contextlib.suppress(ConnectionError, TimeoutError):
                        connection.settimeout(0.05)
                        echoes(connection)
            assert next(event for event in events if event["event"] == "out_of_descriptors")
        finally:
            forward.terminate()


def test_the_soft_limit_of_descriptors_is_no_limit_for_a_forward_and_stays_one_for_its_command(
    cluster: Cluster, service: Service
) -> None:
    limited = ["bash", "-c", 'ulimit -Sn 64 && exec "$@"', "bash", *PROGRAM]
    # Ours is raised again a moment after the command was started.
    code = 'ulimit -Sn; until grep -q "open files  *$(ulimit -Hn)" /proc/$PPID/limits; do :; done; echo raised'
    command = [*limited, "forward", service.task, f"0:{service.port}", "--", "bash", "-c", code]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stdout.split() == ["64", "raised"]


class Shell:
    """An interactive bash with job control, on a terminal."""

    def __init__(self, cluster: Cluster, **environment: str) -> None:
        self.child = pexpect.spawn(
            "bash",
            ["--norc", "--noprofile", "--noediting", "-i"],
            env={**cluster.environment, "TERM": "xterm", "PS1": "$ ", "PROMPT_COMMAND": "", **environment},
            timeout=TIMEOUT,
            encoding="utf-8",
        )
        self.child.delaybeforesend = None
        self.program = " ".join(PROGRAM)

    def types(self, line: str) -> None:
        self.child.send(line + "\r")

    def shows(self, pattern: str) -> str:
        """What came before this."""
        self.child.expect(pattern)
        return str(self.child.before)


@pytest.fixture
def shell(cluster: Cluster) -> Iterator[Shell]:
    shell = Shell(cluster)
    yield shell
    shell.child.close(force=True)


def test_a_forward_draws_only_while_the_terminal_is_its_own(shell: Shell, service: Service) -> None:
    shell.types(f"{shell.program} forward {service.task} 0:{service.port} &")
    shell.shows("Forwarding")
    shell.types("sleep 1.5; echo do$((1))ne")  # some ticks of its live line
    assert "\x1b" not in shell.shows("do1ne")
    shell.types("fg")
    shell.shows("0 open")
    shell.child.send("\x1a")
    assert "\x1b[?25l" not in shell.shows("Stopped")
    shell.types("bg; sleep 1.5; echo do$((2))ne")
    assert "\x1b[2K" not in shell.shows("do2ne")
    shell.types("fg")
    shell.shows("0 open")
    shell.child.send("\x03")
    shell.types("echo en$((1))d:$?")
    shell.shows("en1d:0")


@pytest.mark.parametrize("terminal", ["", "dumb"])
def test_a_terminal_that_nothing_is_known_of_gets_plain_lines(
    cluster: Cluster, service: Service, terminal: str
) -> None:
    shell = Shell(cluster, TERM=terminal)
    try:
        shell.types(f"{shell.program} forward {service.task} 0:{service.port} -- sleep 0; echo do$((1))ne")
        assert "\x1b" not in shell.shows("do1ne")
        shell.types(f"timeout -s INT --foreground 2 {shell.program} forward {service.task} 0:1; echo do$((2))ne")
        assert "\x1b" not in shell.shows("do2ne")
    finally:
        shell.child.close(force=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_whatever_ends_a_forward_ends_its_command(cluster: Cluster, service: Service, number: signal.Signals) -> None:
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--", sys.executable, "-c", code)
    pid = int(forward.line(""))
    forward.process.send_signal(number)
    assert forward.ended() in (128 + number, 1)  # Python's own end by SIGINT is 1 or 130
    assert not psutil.pid_exists(pid)


def test_a_hang_up_that_nohup_ignores_does_not_end_a_forward(cluster: Cluster, service: Service) -> None:
    command = ["nohup", *PROGRAM, "forward", service.task, f"0:{service.port}", "--json"]
    with subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            events = (json.loads(line) for line in forward.stdout)
            port = next(event["local_port"] for event in events if event["event"] == "listening")
            forward.send_signal(signal.SIGHUP)
            with connect(port) as connection:
                assert echoes(connection)
            forward.terminate()
            forward.stdout.read()
            assert forward.wait(TIMEOUT) == 0
        finally:
            forward.kill()


def test_wait_begins_once_the_service_listens(cluster: Cluster, service: Service) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        late = cluster.start("forward", service.task, f"0:{listener.getsockname()[1]}", "--wait", "--", "true")
        early = cluster.start("forward", service.task, f"0:{service.port}", "--wait=30", "--", "sh", "-c", "exit 9")
        assert early.ended() == 9
        assert late.process.poll() is None
        listener.listen()
        assert late.ended() == 0


def test_wait_ends_with_4_when_nobody_comes(cluster: Cluster, service: Service, dead_port: int) -> None:
    done = cluster.run("forward", service.task, f"0:{dead_port}", "--wait=0.1", "--", "false")
    assert (done.returncode, done.stdout) == (4, "")
    assert f"Nothing listens on port {dead_port} of {service.task}" in done.stderr


def test_it_listens_where_it_is_told_to(cluster: Cluster, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--local-host", "0.0.0.0")
    assert "0.0.0.0" in forward.line("Warning", err=True)
    port = int(forward.line("Forwarding 0.0.0.0:").split(" ")[1].rpartition(":")[2])
    with connect(port) as connection:
        assert echoes(connection)
    assert forward.stop() == 0
