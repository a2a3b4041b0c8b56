"""Programs that people run, through `kohakuriver up`, a process task and `kohakuriver forward`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.processes import eventually
from tests.support.up import TIMEOUT, Cluster

SIZE = 3_000_000
DATA = (bytes(i * i % 251 for i in range(251)) * (SIZE // 251 + 1))[:SIZE]
NOBODY = 65534

# Reads to end-of-file, or a request of HTTP/1.0 as far as it says that it goes, and only then answers, with what it
# got; its own end-of-file is all that tells where the answer ends.
UNTIL_EOF = """
import re, socket
def serve(listener):
    while True:
        connection, _ = listener.accept()
        with connection:
            whole, most = b"", float("inf")
            while len(whole) < most and (data := connection.recv(65536)):
                whole += data
                if found := re.search(rb"Content-Length: (\\d+)\\r\\n(?:.*\\r\\n)*?\\r\\n", whole[:4096]):
                    most = found.end() + int(found[1])
            body = whole[found.end():] if found else whole
            connection.sendall((b"HTTP/1.0 200 OK\\r\\n\\r\\n" if found else b"") + body)
"""

# Answers every query with an address made of the query's own number: whoever gets another's answer sees it.
DNS = """
import socket
def serve(sock):
    while True:
        query, client = sock.recvfrom(4096)
        number = int(query[13:13 + query[12]].decode().removeprefix("n"))
        end = query.index(b"\\0", 12) + 5
        head = query[:2] + b"\\x84\\0" + query[4:6] + b"\\0\\1\\0\\0\\0\\0"
        address = bytes([10, number >> 16, number >> 8 & 255, number & 255])
        sock.sendto(head + query[12:end] + b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\0\\0\\4" + address, client)
"""

LISTEN = """
import sys
kind = socket.SOCK_DGRAM if sys.argv[2] == "udp" else socket.SOCK_STREAM
sock = socket.socket(socket.AF_INET, kind)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.bind(("127.0.0.1", int(sys.argv[3])))
if kind == socket.SOCK_STREAM:
    sock.listen()
with open(sys.argv[1], "w") as fifo:
    fifo.write(str(sock.getsockname()[1]))
serve(sock)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


def need(*programs: str) -> None:
    """The test's programs are there: a missing one is a failure, not a test less."""
    for program in programs:
        assert shutil.which(program), f"{program} is not installed: run scripts/system-packages test"


def run(*command: str | Path, data: bytes = b"", env: dict[str, str] | None = None) -> bytes:
    """A program's stdout; it must succeed."""
    done = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT, env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    return done.stdout


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port for a program that can't pick one by itself."""
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def task(cluster: Cluster, *command: str | Path) -> str:
    """A task that runs a command: its name."""
    created = cluster.succeed("vps", "create", "--json", "--backend=process", "--", *map(str, command))
    name: str = json.loads(created)["name"]
    return name


def script(cluster: Cluster, directory: Path, program: str, *, proto: str = "tcp") -> tuple[str, int]:
    """A task that runs a Python service with ``serve(socket)``: its name and port."""
    fifo = directory / "port"
    os.mkfifo(fifo)
    name = task(cluster, sys.executable, "-c", program + LISTEN, fifo, proto, "0")
    return name, int(fifo.read_text())


def forward(cluster: Cluster, name: str, port: int, *options: str, udp: bool = False) -> int:
    """The local end of a forward."""
    return cluster.start("forward", name, f"0:{port}{'/udp' if udp else ''}", "--json", *options).listening()


def listens(port: int) -> bool:
    """Whether a service accepts connections by now; looked at from beside the tunnel."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_an_upload_that_ends_with_end_of_file_gets_its_reply(cluster: Cluster, tmp_path: Path) -> None:
    need("nc")
    name, port = script(cluster, tmp_path, UNTIL_EOF)
    local = forward(cluster, name, port)
    assert run("nc", "-N", "127.0.0.1", str(local), data=DATA) == DATA


def test_curl_uploads_to_a_server_whose_reply_ends_with_end_of_file(cluster: Cluster, tmp_path: Path) -> None:
    need("curl")
    name, port = script(cluster, tmp_path, UNTIL_EOF)
    url = f"http://127.0.0.1:{forward(cluster, name, port)}/"
    (tmp_path / "body").write_bytes(DATA)
    assert run("curl", "-sS", "--http1.0", "-T", tmp_path / "body", url) == DATA


def test_git_clones_and_pushes_over_its_own_protocol(cluster: Cluster, tmp_path: Path) -> None:
    need("git")
    env = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    env |= {f"GIT_{who}_{what}": "me@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    served, bare = tmp_path / "work", tmp_path / "served" / "repository.git"
    run("git", "init", "-q", "-b", "main", served, env=env)
    (served / "data").write_bytes(os.urandom(SIZE))
    run("git", "-C", served, "add", "data", env=env)
    run("git", "-C", served, "commit", "-q", "-m", "data", env=env)
    run("git", "clone", "-q", "--bare", served, bare, env=env)
    port = free_port()
    daemon = ["git", "daemon", "--listen=127.0.0.1", f"--port={port}", f"--base-path={bare.parent}"]
    environment = [f"--env={key}={value}" for key, value in env.items()]
    created = cluster.succeed(
        "vps", "create", "--json", "--backend=process", *environment,
        "--", *daemon, "--export-all", "--enable=receive-pack",
    )  # fmt: skip
    eventually(lambda: listens(port))
    url = f"git://127.0.0.1:{forward(cluster, json.loads(created)['name'], port)}/repository.git"
    copy = tmp_path / "copy"
    run("git", "clone", "-q", url, copy, env=env)
    assert (copy / "data").read_bytes() == (served / "data").read_bytes()
    (copy / "more").write_bytes(os.urandom(SIZE))
    run("git", "-C", copy, "add", "more", env=env)
    run("git", "-C", copy, "commit", "-q", "-m", "more", env=env)
    run("git", "-C", copy, "push", "-q", "origin", "main", env=env)
    assert run("git", "-C", bare, "rev-parse", "main", env=env) == run("git", "-C", copy, "rev-parse", "main", env=env)


def postgres(cluster: Cluster, directory: Path) -> tuple[str, int]:
    """A task that runs PostgreSQL with a new data directory, as a user other than root: its name and port."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda place: int(place.parent.name))
    assert places, "PostgreSQL is not installed: run scripts/system-packages test"
    data, port = directory / "data", free_port()
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []
    data.mkdir()
    if as_nobody:
        os.chown(data, NOBODY, NOBODY)
        for parent in list(data.parents)[:-2]:  # pytest's directories are for their owner alone
            if parent.owner() == data.parents[0].owner() and parent.name.startswith(("test_", "pytest-", "popen-")):
                parent.chmod(parent.stat().st_mode | 0o011)
    run(*as_nobody, places[-1] / "initdb", "-D", data, "-U", "me", "-A", "trust", "-N", "--locale=C", "-E", "UTF8")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    return task(cluster, *as_nobody, places[-1] / "postgres", "-D", data, *options.split()), port


def test_psql_copies_a_table_in_and_out(cluster: Cluster, tmp_path: Path) -> None:
    need("psql", "setpriv")
    name, port = postgres(cluster, tmp_path)
    eventually(lambda: listens(port))
    local = forward(cluster, name, port)
    rows = "".join(f"{i}\t{i * i:040x}\n" for i in range(60_000)).encode()

    def psql(command: str, data: bytes = b"") -> bytes:
        url = f"postgresql://me@127.0.0.1:{local}/postgres?sslmode=disable"
        return run("psql", "-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", url, "-c", command, data=data)

    eventually(lambda: subprocess.run(["pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode == 0)
    psql("CREATE TABLE t (a int, b text)")
    psql("COPY t FROM STDIN", rows)
    assert psql("SELECT count(*) FROM t") == b"60000\n"
    assert psql("COPY (SELECT * FROM t ORDER BY a) TO STDOUT") == rows


def test_rsync_copies_a_tree_up_and_down(cluster: Cluster, tmp_path: Path) -> None:
    need("rsync")
    here, there, back = (tmp_path / name for name in ("here", "there", "back"))
    for directory in (here, there, here / "sub"):
        directory.mkdir()
    (here / "large").write_bytes(DATA)
    for number in range(200):
        (here / "sub" / str(number)).write_bytes(DATA[: number * 10])
    port = free_port()
    user = f"uid = {os.getuid()}\ngid = {os.getgid()}\n" if os.getuid() == 0 else ""
    config = tmp_path / "rsyncd.conf"
    config.write_text(f"use chroot = no\n{user}[files]\npath = {there}\nread only = no\n")
    name = task(
        cluster, "rsync", "--daemon", "--no-detach", f"--config={config}", "--address=127.0.0.1", f"--port={port}"
    )
    eventually(lambda: listens(port))
    url = f"rsync://127.0.0.1:{forward(cluster, name, port)}/files/"
    run("rsync", "-a", f"{here}/", url)
    run("rsync", "-a", url, f"{back}/")

    def tree(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert tree(back) == tree(there) == tree(here)


def dig(port: int, numbers: Sequence[int]) -> list[str]:
    names = [f"n{number}.example" for number in numbers]
    command = ["dig", "@127.0.0.1", "-p", str(port), "+short", "+tries=1", "+time=10", "+noedns"]
    return run(*command, *names).decode().split()


def address_of(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def test_two_clients_of_a_dns_server_at_once_never_get_each_others_answers(cluster: Cluster, tmp_path: Path) -> None:
    need("dig")
    name, port = script(cluster, tmp_path, DNS, proto="udp")
    local = forward(cluster, name, port, udp=True)
    halves = [range(0, 150), range(100_000, 100_150)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda numbers: dig(local, numbers), halves))
    for numbers, answer in zip(halves, answers, strict=True):
        assert answer == [address_of(number) for number in numbers]


def test_a_dns_server_that_dies_answers_again_through_the_same_forward_once_it_is_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    need("dig")
    # The shell starts the service again on the port that it had, as a service manager would.
    fifo, port = tmp_path / "port", free_port(socket.SOCK_DGRAM)
    os.mkfifo(fifo)
    (tmp_path / "dns.py").write_text(DNS + LISTEN)
    again = f"while :; do {sys.executable} {tmp_path / 'dns.py'} {fifo} udp {port}; done"
    name = task(cluster, "sh", "-c", again)
    fifo.read_text()
    local = forward(cluster, name, port, udp=True)
    assert dig(local, [7]) == [address_of(7)]
    (service,) = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "dns.py") in (p.info["cmdline"] or [])]
    service.send_signal(signal.SIGKILL)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"lost", ("127.0.0.1", local))
    fifo.read_text()
    assert dig(local, [8]) == [address_of(8)]


@pytest.mark.alone
def test_iperf3_measures_udp_through_a_forward_without_loss_at_a_moderate_rate(
    cluster: Cluster, tmp_path: Path
) -> None:
    need("iperf3")
    port = free_port()
    name = task(cluster, "iperf3", "-s", "-B", "127.0.0.1", "-p", str(port), "--forceflush")
    eventually(lambda: listens(port))
    # iperf3 speaks TCP and UDP to one port, so both need the same local one: an address that nobody else uses here
    # keeps others' outgoing connections off it.
    both = cluster.start("forward", name, str(port), f"{port}/udp", "--json", "--local-host=127.0.0.2")
    assert both.listening() == both.listening() == port
    # A kernel's usual buffer for datagrams holds 0.4 s of this rate: a busy machine lets programs wait that long.
    client = ["iperf3", "-c", "127.0.0.2", "-p", str(port), "-u", "-b", "4M", "-l", "1200", "-n", "1M", "-J"]
    end = json.loads(run(*client))["end"]
    received = end.get("sum_received", end["sum"])
    assert received["packets"] >= 1_000_000 // 1200
    assert received["lost_percent"] < 1
