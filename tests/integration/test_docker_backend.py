"""Tasks in real containers: real engine, real host and runner, the static tunnel client inside."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import kohakuriver
from kohakuriver.cli.pki import Authority
from kohakuriver.client.forward import Event, StreamError
from kohakuriver.errors import UnavailableError
from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.processes import PATIENCE, Cluster, a_cluster, ask, eventually

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("engine")]

# A port inside a container is nobody else's.
PORT = 7
ECHO = ("/bin/busybox", "nc", "-ll", "-p", str(PORT), "-e", "/bin/busybox", "cat")
STAY = ("/bin/busybox", "sleep", "100000")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for the tests that leave host and runner as they are."""
    with with_docker(tmp_path_factory.mktemp("docker")) as cluster:
        yield cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster for one test."""
    with with_docker(tmp_path) as cluster:
        yield cluster


@contextmanager
def with_docker(directory: Path) -> Iterator[Cluster]:
    with a_cluster(directory) as cluster, ExitStack() as stack:
        stack.callback(remove_all, cluster)
        cluster.start_runner("n1", "--backend", "docker")
        yield cluster


def remove_all(cluster: Cluster) -> None:
    """Remove what a test left, also where its runner is gone."""
    for task in cluster.call("GET", "/api/tasks")[1]:
        cluster.call("DELETE", f"/api/tasks/{task['task_id']}")
        subprocess.run(["docker", "rm", "-f", task["container"]], capture_output=True, check=False)


@contextmanager
def plain_container(image: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
    """A container that `docker run` started; its id."""
    container = docker("run", "-d", *options, image, *command)
    try:
        yield container
    finally:
        docker("rm", "-f", container)


def echoes(cluster: Cluster, reference: str, question: bytes = b"hello") -> bool:
    """Whether the echo service in a task answers through a forward."""
    with cluster.forward(reference, PORT) as forward:
        # The tunnel may be up before the service listens.
        return eventually(lambda: _asked(forward.local_port, question)) == question


def echoes_again(cluster: Cluster, reference: str) -> bool:
    """The same of one that was started past the runner: its host may yet have to hear that it runs."""

    def tried() -> bool:
        try:
            return echoes(cluster, reference)
        except UnavailableError:
            return False

    return eventually(tried)


def _asked(port: int, question: bytes) -> bytes | None:
    try:
        return ask(port, question) or None
    except OSError:
        return None


def adopt(cluster: Cluster, container: str, name: str) -> dict[str, Any]:
    cluster.call("DELETE", f"/api/tasks/{name}")  # where an earlier try of the same test has left it
    status, task = cluster.call("POST", "/api/tasks/adopt", {"container": container, "name": name})
    assert status == 201, task
    return dict(task)


def container_state(container: str) -> str:
    return docker("inspect", "-f", "{{.State.Status}}", container)


def test_a_forward_reaches_a_service_in_a_container(shared: Cluster, busybox: str) -> None:
    task = shared.create(*ECHO, image=busybox, name="web")
    assert (task["backend"], task["container"]) == ("docker", f"kohakuriver-vps-{task['task_id']}")
    shared.connected("web")
    assert echoes(shared, "web")
    labels = docker("inspect", "-f", '{{index .Config.Labels "kohakuriver.task"}}', task["container"])
    assert labels == str(task["task_id"])


def test_containers_reach_a_runner_that_serves_tls_and_find_it_where_it_was_after_its_restart(
    tmp_path: Path, busybox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "ca")
    made = authority.issue(["127.0.0.1"], 1)
    tls = (f"--tls-cert={made.cert}", f"--tls-key={made.key}")
    monkeypatch.setenv("KOHAKURIVER_CA_FILE", str(authority.cert))
    with a_cluster(tmp_path, *tls) as cluster, ExitStack() as stack:
        stack.callback(remove_all, cluster)
        everywhere = ("--bind", "0.0.0.0")  # so that its own port is taken on every address
        cluster.start_runner("n1", "--backend", "docker", *tls, *everywhere)
        task = cluster.create(*ECHO, image=busybox, name="web")
        cluster.connected("web")
        assert cluster.runners["n1"].ready["url"].startswith("https://127.0.0.1:")
        assert echoes(cluster, "web")
        cluster.runners["n1"].end(signal.SIGKILL)
        cluster.start_runner("n1", "--backend", "docker", *tls, *everywhere)
        cluster.connected("web")
        assert echoes(cluster, "web")
        assert docker("top", task["container"], "-o", "pid,args").count("tunnel-client") == 1


def test_an_image_with_one_static_binary_and_no_shell_is_enough(shared: Cluster) -> None:
    image = docker_images.single_binary_image()
    shared.create("/only", "run", image=image, name="single")
    assert shared.connected("single")["status"] == "running"


def test_a_container_whose_user_is_not_root_is_enough(shared: Cluster) -> None:
    image = docker_images.unprivileged_image()
    shared.create(*STAY, image=image, name="nobody")
    assert shared.connected("nobody")["status"] == "running"


def test_a_task_without_a_command_stays_up_in_its_container(shared: Cluster, busybox: str) -> None:
    shared.create(image=busybox, name="idle")
    assert shared.connected("idle")["status"] == "running"


def test_environment_and_mounts_reach_the_container(shared: Cluster, busybox: str, tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("from the node")
    script = (
        'echo "$GREETING" > /data/theirs; cat /fixed/ours >> /data/theirs; echo no > /fixed/ours; echo $? > /data/ro'
    )
    more = {"env": {"GREETING": "hello there"}, "mounts": [f"{tmp_path}:/data", f"{tmp_path}:/fixed:ro"]}
    shared.create("/bin/sh", "-c", script, image=busybox, name="mounted", **more)
    assert shared.ended("mounted")["status"] == "stopped"
    assert (tmp_path / "theirs").read_text() == "hello there\nfrom the node"
    assert (tmp_path / "ro").read_text() != "0\n"
    assert (tmp_path / "ours").read_text() == "from the node"


def test_what_a_task_keeps_in_a_volume_outlives_it_until_the_volume_is_removed(shared: Cluster, busybox: str) -> None:
    def volumes() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = shared.call("GET", "/api/volumes")[1]
        return found

    def prints(script: str, name: str, volume: str) -> str:
        shared.create("/bin/sh", "-c", script, image=busybox, name=name, volumes=[volume])
        return shared.ended(name)["status"]  # type: ignore[no-any-return]

    assert prints("echo kept > /data/file", "writer", "data:/data") == "stopped"
    assert shared.call("DELETE", "/api/volumes/data")[0] == 409  # a stopped task has it, too
    assert shared.call("DELETE", "/api/tasks/writer")[0] == 200
    assert prints('test "$(cat /mine/file)" = kept && ! touch /mine/x', "reader", "data:/mine:ro") == "stopped"
    labelled = ("volume", "ls", "-q", "--filter", "label=kohakuriver.volume=data")
    assert [volumes()[0]["tasks"], len(docker(*labelled).split())] == [["reader"], 1]
    shared.call("DELETE", "/api/tasks/reader")
    assert shared.call("DELETE", "/api/volumes/data")[0] == 200
    assert (volumes(), docker(*labelled)) == ([], "")
    assert prints("test ! -e /data/file", "later", "data:/data") == "stopped"
    shared.call("DELETE", "/api/tasks/later")
    assert shared.call("DELETE", "/api/volumes/data")[0] == 200


def test_a_task_that_can_not_be_started_leaves_no_volume(shared: Cluster, busybox: str) -> None:
    before, after = {"image": "nosuch:1"}, {"image": busybox, "run_as": "nobody-here"}  # the volume was made
    for what, told in ((before, (404, "image_not_found")), (after, (409, "docker"))):
        status, answer = shared.call("POST", "/api/tasks", {**what, "volumes": ["unmade:/kept"]})
        assert (status, answer["error"]) == told, answer
        assert [each for each in shared.call("GET", "/api/volumes")[1] if each["name"] == "unmade"] == []
        assert docker("volume", "ls", "-q", "--filter", "label=kohakuriver.volume=unmade") == ""


@pytest.mark.parametrize(
    ("mount", "words"),
    [("/no/such/place/anywhere:/data", "/no/such/place/anywhere"), ("some/where:/data", "whole path")],
)
def test_a_mount_that_can_not_be_is_refused_and_leaves_nothing(
    shared: Cluster, busybox: str, mount: str, words: str
) -> None:
    body = {"image": busybox, "name": "unmounted", "mounts": [mount]}
    status, answer = shared.call("POST", "/api/tasks", body)
    assert status in (400, 409)
    assert words in answer["message"]
    assert shared.call("GET", "/api/tasks/unmounted")[0] == 404


def test_a_user_mounts_what_the_administrator_of_the_node_allows_and_no_symlink_leads_out_of_it(
    tmp_path: Path, busybox: str
) -> None:
    data, home = tmp_path / "data", tmp_path / "home/ann"
    for directory in (data / "set", home):
        directory.mkdir(parents=True)
    (data / "set/one").write_text("a set")
    (data / "out").symlink_to("/etc")
    roots = ("--mount-root", f"{data}:ro", "--mount-root", f"{tmp_path}/home/{{user}}")
    with a_cluster(tmp_path) as cluster, ExitStack() as stack:
        stack.callback(remove_all, cluster)
        cluster.start_runner("n1", "--backend", "docker", *roots)
        assert cluster.call("POST", "/api/users", {"name": "ann"})[0] == 201
        token = cluster.call("POST", "/api/tokens", {"user": "ann"})[1]["token"]
        ann = {"Authorization": f"Bearer {token}"}
        script = "cat /set/one > /mine/copy; echo no > /set/one"
        body = {"image": busybox, "name": "mounted", "command": ["/bin/sh", "-c", script]}
        body["mounts"] = [f"{data}/set:/set:ro", f"{home}:/mine"]
        assert cluster.http.post("/api/tasks", json=body, headers=ann).status_code == 201
        cluster.ended("mounted")
        assert ((home / "copy").read_text(), (data / "set/one").read_text()) == ("a set", "a set")

        body |= {"name": "out", "mounts": [f"{data}/out:/set:ro"]}
        answer = cluster.http.post("/api/tasks", json=body, headers=ann)
        assert (answer.status_code, answer.json()["error"]) == (403, "mount_not_allowed")
        assert f"{data}/out leads out of {data}" in answer.json()["message"]
        assert cluster.call("GET", "/api/tasks/out")[0] == 404

        (data / "set/one").unlink()  # a task that is started again is checked again
        (data / "set").rmdir()
        (data / "set").symlink_to("/etc")
        again = cluster.http.post("/api/tasks/mounted/restart", headers=ann)
        assert again.status_code == 403, again.text


def test_a_container_that_exits_leaves_its_exit_code_and_its_last_words(shared: Cluster, busybox: str) -> None:
    shared.create("/bin/sh", "-c", "echo no more cheese >&2; exit 3", image=busybox, name="shop")
    task = shared.ended("shop")
    assert task["status"] == "failed"
    assert "exit code 3" in task["message"]
    assert task["exit_code"] == 3
    assert "no more cheese" in task["message"]


def test_a_command_that_is_not_in_the_image_is_named(shared: Cluster, busybox: str) -> None:
    shared.create("/bin/nothing-here", image=busybox, name="typo")
    assert "/bin/nothing-here" in shared.ended("typo")["message"]


def test_stop_restart_and_remove_do_that_to_the_container(shared: Cluster, busybox: str) -> None:
    task = shared.create(*ECHO, image=busybox, name="cycle")
    shared.connected("cycle")
    for _ in range(2):
        status, stopped = shared.call("POST", "/api/tasks/cycle/stop")
        assert (status, stopped["status"], stopped["tunnel"], stopped["message"]) == (200, "stopped", False, None)
        assert container_state(task["container"]) == "exited"
    for _ in range(2):
        status, running = shared.call("POST", "/api/tasks/cycle/restart")
        assert (status, running["status"]) == (200, "running")
        shared.connected("cycle")
        assert echoes(shared, "cycle")
    assert shared.call("DELETE", "/api/tasks/cycle")[0] == 200
    assert docker("ps", "-aq", "--filter", f"name={task['container']}") == ""


def test_a_killed_container_ends_the_users_connection_within_a_second_and_is_back_after_a_restart(
    shared: Cluster, busybox: str
) -> None:
    task = shared.create(*ECHO, image=busybox, name="victim")
    shared.connected("victim")
    assert echoes(shared, "victim")
    with shared.forward("victim", PORT) as forward, open_stream(forward.local_port) as sock:
        docker("kill", task["container"])
        killed = time.monotonic()
        try:
            assert sock.recv(1) == b""
        except ConnectionError:
            pass
        assert time.monotonic() - killed < 1
        ended = shared.ended("victim")
        assert time.monotonic() - killed < 5
        assert (ended["status"], ended["tunnel"]) == ("failed", False)
        assert "SIGKILL" in ended["message"]
        assert shared.call("POST", "/api/tasks/victim/restart")[0] == 200
        shared.connected("victim")
        assert eventually(lambda: _asked(forward.local_port, b"back")) == b"back"


@contextmanager
def open_stream(port: int) -> Iterator[socket.socket]:
    """A connection to the echo service that has been seen to work."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        yield sock


def test_a_container_removed_behind_our_back_is_lost_and_made_anew_by_a_restart(shared: Cluster, busybox: str) -> None:
    task = shared.create(*ECHO, image=busybox, name="vanished")
    shared.connected("vanished")
    docker("rm", "-f", task["container"])
    eventually(lambda: shared.task("vanished")["status"] == "lost")
    assert shared.call("POST", "/api/tasks/vanished/restart")[0] == 200
    shared.connected("vanished")
    assert echoes(shared, "vanished")


@pytest.mark.timeout(400)  # where the tree must be fetched
def test_a_service_in_a_debian_tree_is_reached(shared: Cluster, tmp_path: Path) -> None:
    image = docker_images.debian_image(tmp_path)
    program = (
        f'$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => {PORT}, Listen => 5, ReuseAddr => 1);'
        "while ($c = $s->accept) { while (sysread($c, $b, 65536)) { syswrite($c, $b) } close $c }"
    )
    shared.create("perl", "-MIO::Socket::INET", "-e", program, image=image, name="debian")
    shared.connected("debian")
    assert echoes(shared, "debian")


def test_a_running_container_is_adopted_without_a_restart(shared: Cluster, busybox: str) -> None:
    with plain_container(busybox, *ECHO) as container:
        started = docker("inspect", "-f", "{{.State.StartedAt}}", container)
        task = adopt(shared, container[:12], "adopted")
        assert task["container"] == f"kohakuriver-vps-{task['task_id']}"
        shared.connected("adopted")
        assert echoes(shared, "adopted")
        assert docker("inspect", "-f", "{{.State.StartedAt}}", container) == started
        _, again = shared.call("POST", "/api/tasks/adopt", {"container": container})
        assert (again["task_id"], again["name"]) == (task["task_id"], "adopted")
        status, answer = shared.call("POST", "/api/tasks/adopt", {"container": container, "name": "another-name"})
        assert (status, answer["error"]) == (409, "adopted")
        assert "task adopted already" in answer["message"]
        assert shared.call("DELETE", "/api/tasks/adopted")[0] == 200
        assert container_state(container) == "running"
        eventually(lambda: "tunnel-client" not in docker("top", container))


def test_a_container_of_one_binary_is_adopted(shared: Cluster) -> None:
    elsewhere = ("-e", "RUNNER_URL=http://127.0.0.1:1", "-e", "CONTAINER_ID=none")
    with plain_container(docker_images.single_binary_image(), "/only", "run", options=elsewhere) as container:
        adopt(shared, container, "adopted-single")
        shared.connected("adopted-single")


def test_an_adopted_container_that_is_restarted_gets_its_tunnel_back(shared: Cluster, busybox: str) -> None:
    with plain_container(busybox, *ECHO, options=("--stop-signal", "KILL")) as container:
        adopt(shared, container, "readopted")
        shared.connected("readopted")
        docker("restart", "-t", "0", container)
        eventually(lambda: "tunnel-client" in docker("top", container))
        shared.connected("readopted")
        assert echoes(shared, "readopted")
        for action in ("stop", "restart"):
            status, refused = shared.call("POST", f"/api/tasks/readopted/{action}")
            assert (status, refused["error"]) == (409, "adopted"), refused
            assert "--container" in refused["message"]
        assert container_state(container) == "running"
        assert echoes(shared, "readopted")
        assert shared.call("POST", "/api/tasks/readopted/restart?container=true")[0] == 200
        shared.connected("readopted")
        assert echoes(shared, "readopted")


def test_a_tunnel_client_that_was_killed_in_an_adopted_container_is_started_again(
    shared: Cluster, busybox: str
) -> None:
    with plain_container(busybox, *ECHO) as container:
        adopt(shared, container, "client-killed")
        shared.connected("client-killed")
        (before,) = clients_in(container)
        os.kill(before, signal.SIGKILL)
        eventually(lambda: [each for each in clients_in(container) if each != before])
        shared.connected("client-killed")
        assert echoes(shared, "client-killed")


def clients_in(container: str) -> list[int]:
    """The tunnel clients in a container, as this machine numbers them."""
    return [int(line.split()[1]) for line in docker("top", container).splitlines() if "tunnel-client" in line]


def test_an_adopted_container_that_is_removed_and_made_again_is_the_same_task(shared: Cluster, busybox: str) -> None:
    name = f"{docker_images.PREFIX}-again"
    with plain_container(busybox, *ECHO, options=("--name", name)):
        adopt(shared, name, "again")
        shared.connected("again")
    lost = eventually(lambda: task if (task := shared.task("again"))["status"] == "lost" else None)
    assert "made again" in lost["message"]
    with plain_container(busybox, *ECHO, options=("--name", name)):
        eventually(lambda: shared.task("again")["status"] == "running")
        shared.connected("again")
        assert echoes(shared, "again")
        status, task = shared.call("POST", "/api/tasks/adopt", {"container": name})
        assert (status, task["task_id"]) == (201, lost["task_id"])


def test_an_adopted_container_that_is_made_again_while_the_runner_is_away_is_the_same_task(
    cluster: Cluster, busybox: str
) -> None:
    name = f"{docker_images.PREFIX}-away"
    with plain_container(busybox, *ECHO, options=("--name", name)):
        adopt(cluster, name, "away")
        cluster.connected("away")
        cluster.runners["n1"].end(signal.SIGKILL)
    with plain_container(busybox, *ECHO, options=("--name", name)):
        cluster.start_runner("n1", "--backend", "docker")
        cluster.connected("away")
        assert echoes(cluster, "away")


def test_an_adopted_container_on_a_network_of_its_own_is_reached(shared: Cluster, busybox: str) -> None:
    network = docker("network", "create", f"{docker_images.PREFIX}-net")
    try:
        with plain_container(busybox, *ECHO, options=("--network", network)) as container:
            adopt(shared, container, "networked")
            shared.connected("networked")
            assert echoes(shared, "networked")
    finally:
        docker("network", "rm", network)


def test_what_can_not_be_adopted_is_refused_with_the_reason(shared: Cluster, busybox: str) -> None:
    def refused(container: str) -> tuple[int, str]:
        status, answer = shared.call("POST", "/api/tasks/adopt", {"container": container})
        return status, answer["message"]

    status, message = refused("no-such-container")
    assert status == 404
    assert "no-such-container" in message
    with plain_container(busybox, *STAY) as container:
        docker("pause", container)
        assert "docker unpause" in refused(container)[1]
        docker("unpause", container)
        docker("kill", container)
        assert "docker start" in refused(container)[1]
    assert all(task["status"] != "starting" for task in shared.call("GET", "/api/tasks")[1])


UNTOUCHABLE = ("--read-only", "--network", "none")
ELSEWHERE = "127.0.0.9"
"""Part of a container's loopback, though not the address that everybody tries first."""

UDP_ECHO = f"""
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(({ELSEWHERE!r}, {PORT}))
print("listening", flush=True)
while True:
    data, sender = sock.recvfrom(65536)
    sock.sendto(data, sender)
"""


@contextmanager
def udp_echo_in(container: str) -> Iterator[None]:
    """A UDP echo service in the network of a container."""
    pid = docker("inspect", "-f", "{{.State.Pid}}", container)
    command = ["nsenter", "--target", pid, "--net", sys.executable, "-c", UDP_ECHO]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        try:
            yield
        finally:
            process.kill()


def processes_in(container: str) -> list[str]:
    return docker("top", container, "-o", "pid,args").splitlines()[1:]


def test_a_container_into_which_nothing_can_be_put_is_reached_from_its_own_network(
    shared: Cluster, busybox: str
) -> None:
    with plain_container(busybox, *ECHO, options=UNTOUCHABLE) as container, udp_echo_in(container):
        task = adopt(shared, container, "untouchable")
        assert (task["status"], task["tunnel"]) == ("running", True)
        assert "no tunnel client" in task["message"]
        assert not any("tunnel-client" in process for process in processes_in(container))
        assert echoes(shared, "untouchable", b"half-closed" * 100_000)
        with shared.forward("untouchable", PORT, proto="udp") as forward, socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(("127.0.0.1", forward.local_port))
            for size in (0, 1, 9000):
                sock.send(bytes(size))
                assert sock.recv(65536) == bytes(size)
        with shared.forward("untouchable", PORT) as forward:
            assert eventually(lambda: _asked(forward.local_port, b"before")) == b"before"
            docker("restart", "-t", "0", container)  # a new process, and a new network
            assert eventually(lambda: _asked(forward.local_port, b"after")) == b"after"
        status, answer = shared.call("DELETE", "/api/tasks/untouchable")
        assert status == 200, answer
        assert container_state(container) == "running"


def ports_of(cluster: Cluster, reference: str) -> list[dict[str, Any]]:
    status, answer = cluster.call("GET", f"/api/tasks/{reference}/ports")
    assert status == 200, answer
    return list(answer["ports"])


def test_the_ports_of_a_container_are_all_that_listen_in_its_network_but_what_we_and_the_engine_have_there(
    shared: Cluster, busybox: str
) -> None:
    shared.create(*ECHO, image=busybox, name="listens", ssh_keys=[KEY])
    shared.connected("listens")
    eventually(lambda: shared.task("listens").get("ssh_port"))
    (found,) = eventually(lambda: ports_of(shared, "listens") or None)
    assert (found["port"], found["proto"], found["program"]) == (PORT, "tcp", "busybox")
    with plain_container(busybox, *ECHO) as container:
        adopt(shared, container, "also-listens")
        shared.connected("also-listens")
        assert [port["port"] for port in eventually(lambda: ports_of(shared, "also-listens") or None)] == [PORT]


def test_of_a_container_on_the_nodes_network_no_port_of_the_node_is_told(shared: Cluster, busybox: str) -> None:
    with socket.create_server(("127.0.0.1", 0)), ExitStack() as stack:
        apart, with_the_nodes_processes = (
            stack.enter_context(plain_container(busybox, *STAY, options=("--network", "host", *more)))
            for more in ((), ("--pid", "host"))
        )
        adopt(shared, apart, "on-the-node")
        adopt(shared, with_the_nodes_processes, "in-the-node")
        for name in ("on-the-node", "in-the-node"):
            shared.connected(name)
        assert ports_of(shared, "on-the-node") == []
        status, answer = shared.call("GET", "/api/tasks/in-the-node/ports")
        assert (status, answer["error"]) == (409, "ports_unknown")
        assert "shares its network and its processes with its node" in answer["message"]


def test_a_port_that_nothing_listens_on_is_told_as_such_where_the_container_has_no_ipv6(
    shared: Cluster, busybox: str
) -> None:
    told: queue.Queue[str] = queue.Queue()

    def hear(event: Event) -> None:
        if isinstance(event, StreamError):
            told.put(event.message)

    with plain_container(busybox, *ECHO, options=UNTOUCHABLE) as container:
        adopt(shared, container, "without-ipv6")
        with kohakuriver.forward_sync("without-ipv6", 9, host=shared.url, token=shared.token, on_event=hear) as forward:
            assert _asked(forward.local_port, b"x") is None
        assert told.get(timeout=PATIENCE).startswith("ECONNREFUSED: nothing listens on port 9")
        assert shared.call("DELETE", "/api/tasks/without-ipv6")[0] == 200


def test_a_container_that_is_to_be_left_alone_is_and_is_found_again_after_a_restart_of_the_runner(
    cluster: Cluster, busybox: str
) -> None:
    with plain_container(busybox, *ECHO) as container:
        wanted = {"container": container, "name": "alone", "no_client": True}
        status, task = cluster.call("POST", "/api/tasks/adopt", wanted)
        assert status == 201, task
        assert docker("diff", container) == ""
        assert echoes(cluster, "alone")
        cluster.runners["n1"].end(signal.SIGKILL)
        cluster.start_runner("n1", "--backend", "docker")
        cluster.connected("alone")
        assert echoes(cluster, "alone")
        assert len(processes_in(container)) == 1


def test_containers_outlive_a_killed_runner_and_are_reached_through_the_next_one(
    cluster: Cluster, busybox: str
) -> None:
    task = cluster.create(*ECHO, image=busybox, name="web")
    cluster.connected("web")
    with plain_container(busybox, *ECHO) as container:
        adopt(cluster, container, "adopted")
        cluster.connected("adopted")
        cluster.runners["n1"].end(signal.SIGKILL)
        assert container_state(task["container"]) == "running"
        cluster.start_runner("n1", "--backend", "docker")
        for name in ("web", "adopted"):
            cluster.connected(name)
            assert echoes(cluster, name)
        assert docker("top", container).count("--container-id") == 1


def test_containers_are_found_again_by_their_labels_when_the_runners_list_is_lost(
    cluster: Cluster, busybox: str
) -> None:
    task = cluster.create(*ECHO, image=busybox, name="web")
    cluster.connected("web")
    cluster.runners["n1"].end()
    (cluster.state_of("n1") / "tasks.json").unlink()
    cluster.start_runner("n1", "--backend", "docker")
    assert cluster.connected("web")["task_id"] == task["task_id"]
    assert echoes(cluster, "web")


def test_what_happens_while_the_runner_is_away_is_known_when_it_is_back(cluster: Cluster, busybox: str) -> None:
    exits = cluster.create("/bin/sh", "-c", "sleep 100000", image=busybox, name="exits")
    stays = cluster.create(*STAY, image=busybox, name="stays")
    cluster.runners["n1"].end()
    docker("kill", exits["container"])
    cluster.start_runner("n1", "--backend", "docker")
    assert "SIGKILL" in cluster.ended("exits")["message"]
    assert cluster.connected("stays")["container"] == stays["container"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_time_to_live_that_ends_while_no_runner_is_there_is_over_when_one_is(
    cluster: Cluster, busybox: str, number: signal.Signals
) -> None:
    task = cluster.create(*STAY, image=busybox, name="short", ttl=3)
    stays = cluster.create(*STAY, image=busybox, name="long", ttl=3600)
    ends = cluster.connected("long")["ends_at"]
    cluster.runners["n1"].end(number)
    assert container_state(task["container"]) == "running"
    cluster.start_runner("n1", "--backend", "docker")
    assert cluster.ended("short")["message"] == "its time to live of 3 s is over"
    assert container_state(task["container"]) == "exited"
    assert cluster.connected("long")["ends_at"] == ends
    assert container_state(stays["container"]) == "running"


def test_a_runner_that_listens_elsewhere_now_still_reaches_its_containers(cluster: Cluster, busybox: str) -> None:
    cluster.create(*ECHO, image=busybox, name="web")
    cluster.connected("web")
    cluster.runners["n1"].end()
    (cluster.state_of("n1") / "port").unlink()
    cluster.start_runner("n1", "--backend", "docker")
    cluster.connected("web")
    assert echoes(cluster, "web")


def test_a_runner_told_to_do_so_ends_its_containers_and_only_those_it_made(tmp_path: Path, busybox: str) -> None:
    with with_docker(tmp_path) as cluster:
        cluster.runners["n1"].end()
        cluster.start_runner("n1", "--backend", "docker", "--stop-tasks-on-exit")
        task = cluster.create(*ECHO, image=busybox, name="web")
        with plain_container(busybox, *STAY) as container:
            adopt(cluster, container, "adopted")
            assert cluster.runners["n1"].end() == 0
            assert container_state(task["container"]) == "exited"
            assert container_state(container) == "running"
        assert cluster.task("web")["status"] == "stopped"


def test_adopted_containers_reach_nothing_of_a_runner_on_loopback_but_their_tunnel(
    shared: Cluster, busybox: str
) -> None:
    with plain_container(busybox, *STAY) as container:
        adopt(shared, container, "curious")
        shared.connected("curious")
        command = docker("top", container, "-eo", "pid,args")
        url = next(word for word in command.split() if word.startswith("http://"))

        def status_of(path: str) -> str:
            ask_for = f"/bin/busybox wget -S -O - {url}{path} 2>&1 | /bin/busybox head -3"
            return docker("exec", container, "/bin/sh", "-c", ask_for)

        assert "404" in status_of("/api/tasks")
        assert "404" in status_of("/health")


def test_docker_is_offered_from_when_the_engine_answers(tmp_path: Path, busybox: str) -> None:
    socket_path = tmp_path / "docker.sock"
    with a_cluster(tmp_path) as cluster, ExitStack() as stack:
        stack.callback(remove_all, cluster)
        cluster.start_runner("n1", "--backend", "docker", env={"DOCKER_HOST": f"unix://{socket_path}"})
        status, answer = cluster.call("POST", "/api/tasks", {"image": busybox, "name": "early"})
        assert (status, answer["error"]) == (409, "backend_not_offered")
        assert "Docker engine" in answer["message"]
        socket_path.symlink_to("/var/run/docker.sock")
        eventually(lambda: "docker" in (cluster.node("n1") or {})["backends"])
        cluster.create(*STAY, image=busybox, name="late")
        cluster.connected("late")
