"""TLS between users, host and runner: real programs, real certificates, and every reason not to trust one."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from kohakuriver.cli.pki import Authority, Certificate
from tests.support.up import Commands, Program, Service, connect, echoes

HERE = "127.0.0.1"
MIB = 1 << 20
KEY = "AAAAC3NzaC1lZDI1NTE5AAAAIMRkPj6ZEhhLk0hLg2KJ8Yp4pjV4mJ5Yb1nCz9vS9GxB"


class OverTls(Commands):
    """A host and a runner, each with a certificate of the authority in `ca`."""

    def __init__(self, directory: Path, **host_environment: str) -> None:
        super().__init__(directory)
        self.authority = Authority(directory / "ca")
        self.environment["KOHAKURIVER_CA_FILE"] = str(self.authority.cert)
        self.made = self.issue("host")
        self.host = self.start_host(self.made, **host_environment)
        self.host_ready = self.host.event("ready")
        self.url: str = self.host_ready["url"]
        self.environment["KOHAKURIVER_HOST"] = self.url
        self.environment["KOHAKURIVER_TOKEN"] = (directory / "host" / "admin-token").read_text().strip()

    def issue(self, name: str, authority: Authority | None = None) -> Certificate:
        """A certificate for this machine, in files of this name."""
        made = (authority or self.authority).issue([HERE], 1)
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        made.key.replace(key)
        made.cert.replace(cert)
        return Certificate(made.names, cert, key, made.expires)

    def start_host(self, made: Certificate, **environment: str) -> Program:
        files = [f"--tls-cert={made.cert}", f"--tls-key={made.key}"]
        return self.start("host", "--json", f"--bind={HERE}", "--port=0", "--ssh-port=0", *files, **environment)

    def start_runner(self, made: Certificate, *options: str, host_url: str = "", **environment: str) -> Program:
        files = [f"--tls-cert={made.cert}", f"--tls-key={made.key}"]
        token = f"--node-token-file={self.directory / 'host' / 'node-token'}"
        return self.start(
            "runner", "--json", f"--host-url={host_url or self.url}", f"--bind={HERE}", "--port=0", token,
            "--backend=process", *files, *options, **environment,
        )  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverTls]:
    cluster = OverTls(tmp_path_factory.mktemp("tls"))
    runner = cluster.start_runner(cluster.issue("runner"))
    runner.event("ready")
    runner.line("registered with the host", err=True)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: OverTls) -> Service:
    return cluster.service()


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    yield commands
    commands.close()


def served_certificate(url: str) -> bytes:
    """The certificate that a server shows just now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    address = HERE, int(url.rpartition(":")[2])
    with socket.create_connection(address, 30) as sock, context.wrap_socket(sock, server_hostname=HERE) as connection:
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def on_disk(cert: Path) -> bytes:
    from ssl import PEM_cert_to_DER_cert

    return PEM_cert_to_DER_cert(cert.read_text())


def test_both_hops_serve_https_and_bytes_arrive_unchanged(cluster: OverTls, service: Service) -> None:
    nodes = json.loads(cluster.succeed("node", "list", "--json"))["nodes"]
    assert cluster.url.startswith("https://")
    assert [node["url"].partition(":")[0] for node in nodes] == ["https"]
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    data = bytes(range(256)) * (MIB // 256)
    with connect(forward.listening()) as connection:
        writer = threading.Thread(target=connection.sendall, args=(data * 32,))
        writer.start()
        got = 0
        while got < 32 * MIB:
            piece = connection.recv(65536)
            assert piece == (data + piece)[got % MIB : got % MIB + len(piece)] or piece in data + data
            got += len(piece)
        writer.join()
        connection.shutdown(socket.SHUT_WR)  # half-close: the service sees it, and ends its side
        assert connection.recv(1) == b""
    assert forward.stop() == 0


def test_browsers_are_told_to_use_nothing_but_tls(cluster: OverTls) -> None:
    trusted = ssl.create_default_context(cafile=str(cluster.authority.cert))
    with urllib.request.urlopen(f"{cluster.url}/health", context=trusted, timeout=30) as answer:
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"


def test_an_authority_may_be_named_by_flag_variable_or_settings_file(cluster: OverTls) -> None:
    ca = str(cluster.authority.cert)
    asked = cluster.run("vps", "list", "--json", KOHAKURIVER_CA_FILE="")
    assert asked.returncode == 7
    assert "--ca-file or KOHAKURIVER_CA_FILE" in asked.stderr
    assert asked.stderr.count("\n") == 1
    assert cluster.run("vps", "list", "--ca-file", ca, KOHAKURIVER_CA_FILE="").returncode == 0
    settings = cluster.directory / "config.toml"
    settings.write_text(f'ca_file = "{ca}"\n')
    try:
        assert cluster.run("vps", "list", KOHAKURIVER_CA_FILE="").returncode == 0
    finally:
        settings.unlink()


def test_a_login_keeps_the_authority_that_it_was_made_with(cluster: OverTls, commands: Commands) -> None:
    token = cluster.environment["KOHAKURIVER_TOKEN"]
    (commands.directory / "lab.pem").write_bytes(cluster.authority.cert.read_bytes())
    login = ("auth", "login", "--host", cluster.url, "--ca-file", str(commands.directory / "lab.pem"))
    assert commands.run(*login, stdin=token + "\n").returncode == 0
    assert commands.succeed("auth", "status").split()[:2] == ["host:", cluster.url]
    commands.succeed("auth", "logout")
    refused = commands.run("vps", "list", "--host", cluster.url)
    assert (refused.returncode, "not signed by an authority" in refused.stderr) == (7, True)


def test_a_page_from_a_name_of_the_certificate_is_the_hosts_own(cluster: OverTls, tmp_path: Path) -> None:
    made = cluster.authority.issue(["host.lab", HERE], 1)
    host = cluster.start_host(made, KOHAKURIVER_CONFIG_DIR=str(tmp_path))
    port = int(host.event("ready")["url"].rpartition(":")[2])
    trusted = ssl.create_default_context(cafile=str(cluster.authority.cert))

    def status(name: str, origin: str) -> int:
        connection = http.client.HTTPSConnection(HERE, port, timeout=30, context=trusted)
        with contextlib.closing(connection):
            connection.request("GET", "/health", headers={"Host": f"{name}:{port}", "Origin": origin})
            return connection.getresponse().status

    assert status("host.lab", f"https://host.lab:{port}") == 200
    assert status("host.lab", "https://evil.example") == 403
    assert status("evil.example", f"https://evil.example:{port}") == 403
    assert host.stop() == 0


def test_a_ca_file_that_is_none_is_refused_by_name(cluster: OverTls) -> None:
    for path, said in ((cluster.directory / "none.pem", "can't be read"), (cluster.made.key, "no certificate")):
        done = cluster.run("vps", "list", "--ca-file", str(path))
        assert done.returncode == 2
        assert said in done.stderr
        assert str(path) in done.stderr


def test_a_forward_to_a_host_that_is_not_trusted_ends_with_7_and_says_why(cluster: OverTls, service: Service) -> None:
    done = cluster.run("forward", service.task, f"0:{service.port}", KOHAKURIVER_CA_FILE="")
    assert done.returncode == 7
    assert "not signed by an authority that is trusted here" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_wrong_scheme_is_told_as_such(cluster: OverTls) -> None:
    plain = cluster.run("vps", "list", KOHAKURIVER_HOST=cluster.url.replace("https", "http"))
    assert plain.returncode == 7
    assert "its URL begins with https://" in plain.stderr
    forward = cluster.run("forward", "t", "0:80", KOHAKURIVER_HOST=cluster.url.replace("https", "http"))
    assert (forward.returncode, forward.stderr) == (7, plain.stderr)
    with socket.create_server((HERE, 0)) as server:
        threading.Thread(target=_answers_in_clear, args=(server,), daemon=True).start()
        tls = cluster.run("vps", "list", KOHAKURIVER_HOST=f"https://{HERE}:{server.getsockname()[1]}")
    assert tls.returncode == 7
    assert "does not speak TLS" in tls.stderr


def _answers_in_clear(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


@pytest.mark.parametrize("what", ["expired", "not valid yet", "another name"])
def test_a_certificate_that_is_no_good_is_refused_for_its_own_reason(
    tmp_path: Path, commands: Commands, what: str
) -> None:
    authority = Authority(tmp_path / "ca")
    now = datetime.now(timezone.utc)
    since = {"expired": now - timedelta(days=9), "not valid yet": now + timedelta(days=9)}.get(what)
    made = authority.issue(["elsewhere.example" if what == "another name" else HERE], 1, since=since)
    host = commands.start(
        "host",
        "--json",
        f"--bind={HERE}",
        "--port=0",
        "--ssh-port=0",
        f"--tls-cert={made.cert}",
        f"--tls-key={made.key}",
    )
    url = host.event("ready")["url"]
    done = commands.run(
        "vps", "list", KOHAKURIVER_HOST=url, KOHAKURIVER_TOKEN="x", KOHAKURIVER_CA_FILE=str(authority.cert)
    )
    assert done.returncode == 7
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
    host.stop()
    assert any("has expired" in line for line in host.rest(err=True)) == (what == "expired")


def test_a_host_that_does_not_trust_a_node_says_so_to_the_user(cluster: OverTls, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger")
    runner = cluster.start_runner(
        cluster.issue("stranger", stranger), "--name=stranger", KOHAKURIVER_CONFIG_DIR=str(tmp_path / "config")
    )
    runner.event("ready")
    runner.line("registered with the host", err=True)
    done = cluster.run("vps", "create", "--node", "stranger", "--backend", "process", "--", "true")
    assert done.returncode == 4
    assert "can't reach node stranger" in done.stderr
    assert "not signed by an authority" in done.stderr
    runner.stop()


def test_a_runner_that_does_not_trust_its_host_says_so_and_goes_on_trying(cluster: OverTls, tmp_path: Path) -> None:
    directory = tmp_path / "config"
    runner = cluster.start_runner(
        cluster.issue("doubter"), "--name=doubter", KOHAKURIVER_CONFIG_DIR=str(directory), KOHAKURIVER_CA_FILE=""
    )
    runner.event("ready")
    assert "not signed by an authority" in runner.line("does not take this node in", err=True)
    assert runner.stop() == 0


def test_a_runner_that_was_told_the_wrong_scheme_says_so(cluster: OverTls) -> None:
    runner = cluster.start_runner(cluster.issue("plain"), "--name=plain", host_url=cluster.url.replace("https", "http"))
    runner.event("ready")
    assert "its URL begins with https://" in runner.line("does not take this node in", err=True)
    assert runner.stop() == 0


def test_jobs_of_a_runner_that_serves_tls_can_not_be_sent_to_it_in_clear(cluster: OverTls, tmp_path: Path) -> None:
    runner = cluster.start_runner(
        cluster.issue("slurm"),
        *("--name=slurm", "--backend=slurm", "--slurm-url=http://login1:8001"),
        KOHAKURIVER_CONFIG_DIR=str(tmp_path / "config"),
    )
    assert runner.ended() == 2
    assert [line for line in runner.rest(err=True) if "Error" in line or "Jobs" in line] == [
        "Error: Jobs can't come to http://login1:8001 in clear where this runner serves TLS: give --slurm-url https://…."
    ]


@pytest.mark.parametrize("way", ["by itself", "on SIGHUP"])
def test_a_new_certificate_is_taken_without_a_restart_and_sessions_go_on(
    cluster: OverTls, service: Service, way: str
) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    with connect(forward.listening()) as connection:
        assert echoes(connection)
        before = served_certificate(cluster.url)
        cluster.made = cluster.issue("host")
        assert on_disk(cluster.made.cert) != before
        if way == "on SIGHUP":
            cluster.host.process.send_signal(signal.SIGHUP)
        cluster.host.line("certificate was read again", err=True)
        assert served_certificate(cluster.url) == on_disk(cluster.made.cert)
        assert echoes(connection)
    assert forward.stop() == 0
    cluster.succeed("vps", "list")


@pytest.mark.parametrize("how", ["no PEM", "another key", "expired", "gone"])
def test_a_broken_new_certificate_is_refused_in_one_line_and_the_old_one_stays(cluster: OverTls, how: str) -> None:
    before = served_certificate(cluster.url)
    cert, key = cluster.made.cert, cluster.made.key
    kept = {path: path.read_bytes() for path in (cert, key)}
    if how == "no PEM":
        cert.write_text("-----BEGIN CERTIFICATE-----\n")
    elif how == "another key":
        shutil.copy(cluster.issue("other").key, key)
    elif how == "expired":
        made = cluster.authority.issue([HERE], 1, since=datetime.now(timezone.utc) - timedelta(days=9))
        made.key.replace(key)
        made.cert.replace(cert)
    else:
        cert.unlink()
    cluster.host.process.send_signal(signal.SIGHUP)
    assert str(cert) in cluster.host.line("The certificate from before stays in use", err=True)
    assert served_certificate(cluster.url) == before
    cluster.succeed("vps", "list")
    for path, content in kept.items():
        path.write_bytes(content)
    cluster.host.process.send_signal(signal.SIGHUP)
    cluster.host.line("certificate was read again", err=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tls-cert={cert}"], "go together"),
        (["--tls-cert={cert}", "--tls-key={cert}"], "in PEM form"),
        (["--tls-cert={cert}.none", "--tls-key={key}"], "host.pem.none can't be read"),
        (["--tls-cert={cert}", "--tls-key={ca}"], "does not belong"),
    ],
)
@pytest.mark.parametrize("program", ["host", "runner"])
def test_a_program_does_not_start_with_files_that_are_no_good(
    cluster: OverTls, program: str, options: list[str], said: str
) -> None:
    places = {"cert": cluster.made.cert, "key": cluster.made.key, "ca": cluster.authority.key}
    filled = [option.format(**places) for option in options]
    more = [f"--host-url={cluster.url}", "--node-token=x"] if program == "runner" else []
    done = cluster.run(program, f"--bind={HERE}", "--port=0", *more, *filled)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_terminal_and_an_ssh_connection_go_over_tls_to_the_node(cluster: OverTls, tmp_path: Path) -> None:
    key = tmp_path / "key.pub"
    key.write_text(f"ssh-ed25519 {KEY} nobody\n")
    cluster.succeed("vps", "create", "--backend=process", "--name=shell", f"--public-key-file={key}")
    said = cluster.run("connect", "shell", "--", "sh", "-c", "echo over TLS; exit 3")
    assert (said.returncode, said.stdout) == (3, "over TLS\n"), said.stderr
    proxy = str(cluster.host_ready["ssh_proxy"])
    with socket.create_connection((HERE, int(proxy.rpartition(":")[2])), 30) as connection:
        connection.sendall(f"REQUEST_TUNNEL shell {cluster.environment['KOHAKURIVER_TOKEN']}\n".encode())
        answer = connection.makefile("rb")
        assert answer.readline() == b"SUCCESS\n"
        assert answer.readline().startswith(b"SSH-2.0-")
    # What ssh runs asks the host for the task's host key first, so it needs the authority as well.
    program = [sys.executable, "-m", "kohakuriver.cli.ssh_dial", "--direct", "shell"]
    dialled = subprocess.run(
        program,
        env={**cluster.environment, "KOHAKURIVER_SSH_PROXY": proxy},
        input=b"SSH-2.0-nobody\r\n\r\n",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert dialled.stdout.startswith(b"SSH-2.0-"), dialled.stderr
    with socket.create_server((HERE, 0)) as listening:  # what an eavesdropper on the way to the proxy would see
        overheard = {**cluster.environment, "KOHAKURIVER_SSH_PROXY": f"{HERE}:{listening.getsockname()[1]}"}
        with subprocess.Popen(program, env=overheard, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as lines:
                assert lines.readline().startswith(b"REQUEST_TUNNEL shell krp_")
    assert "shell" in (cluster.directory / "ssh" / "known_hosts").read_text()
