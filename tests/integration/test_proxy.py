"""Everything that a user's commands do, through a real HTTP proxy; and what never goes through one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kohakuriver.cli.pki import Authority
from tests.support.forked import PROGRAM
from tests.support.network.proxies import Proxy, behind_tls, tinyproxy
from tests.support.up import Cluster, Commands, Service, connect, echoes

HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: Cluster) -> Service:
    return cluster.service()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    with tinyproxy(tmp_path, "BasicAuth me secret") as proxy:
        yield proxy


def url(proxy: Proxy, credentials: str = "me:secret@", scheme: str = "http", port: int = 0) -> str:
    return f"{scheme}://{credentials}{HERE}:{port or proxy.port}"


def port_of(address: str) -> str:
    return address.rpartition(":")[2].rstrip("/")


def test_every_kind_of_command_reaches_the_host_through_the_proxy_alone(
    cluster: Cluster, service: Service, proxy: Proxy
) -> None:
    through = {"KOHAKURIVER_PROXY": url(proxy)}
    host = f"{HERE}:{port_of(cluster.ready['host_url'])}"
    listed = cluster.run("vps", "list", "--json", **through)
    assert service.task in listed.stdout, listed.stderr
    assert proxy.requests()[-1].startswith(f"http://{host}/")

    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json", **through)
    with connect(forward.listening()) as connection:
        assert echoes(connection, bytes(range(256)) * 4096)
    assert forward.stop() == 0
    assert proxy.tunnels() == [host]

    done = cluster.run("connect", service.task, "--", "echo", "there", **through)
    assert (done.returncode, done.stdout) == (0, "there\n"), done.stderr
    assert proxy.tunnels() == [host] * 2


def test_ssh_goes_through_the_proxy(cluster: Cluster, proxy: Proxy) -> None:
    key = cluster.directory / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    ssh = ["--ssh", f"--public-key-file={key}.pub"]
    cluster.succeed("vps", "create", "--name=shell", "--backend=process", *ssh, "--", "sleep", "infinity")
    running = subprocess.Popen(
        [*PROGRAM, "ssh-proxy", "--direct", "shell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**cluster.environment, "KOHAKURIVER_PROXY": url(proxy)},
    )  # fmt: skip
    with running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith(b"SSH-2.0-")
        running.terminate()
    host = f"{HERE}:{port_of(cluster.ready['host_url'])}"
    asked, ssh_proxy = sorted(set(proxy.tunnels()), key=lambda target: target != host)
    assert (asked, ssh_proxy.startswith(f"{HERE}:")) == (host, True)


@pytest.mark.parametrize("command", ["list", "forward", "connect", "ssh-proxy"])
@pytest.mark.parametrize(
    ("credentials", "words"), [("", "wants a name and a password"), ("me:wrong@", "does not take the name")]
)
def test_a_proxy_that_does_not_know_the_user_is_one_sentence_and_exit_code_7(
    cluster: Cluster, service: Service, proxy: Proxy, command: str, credentials: str, words: str
) -> None:
    arguments = {
        "list": ["vps", "list"],
        "forward": ["forward", service.task, f"0:{service.port}"],
        "connect": ["connect", service.task, "--", "true"],
        "ssh-proxy": ["ssh-proxy", service.task],
    }[command]
    done = cluster.run(*arguments, KOHAKURIVER_PROXY=url(proxy, credentials))
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith(f"Error: The proxy at {url(proxy, '')} ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_host_on_this_machine_is_reached_directly_whatever_the_environment_names(
    cluster: Cluster, proxy: Proxy
) -> None:
    done = cluster.run("vps", "list", HTTP_PROXY=url(proxy), HTTPS_PROXY=url(proxy), ALL_PROXY=url(proxy))
    assert done.returncode == 0, done.stderr
    assert proxy.requests() == proxy.tunnels() == []


def test_host_runner_and_tunnel_client_heed_no_proxy(tmp_path: Path, proxy: Proxy) -> None:
    named = {name: url(proxy) for name in ("KOHAKURIVER_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
    commands = Commands(tmp_path)
    try:
        up = commands.start("up", "--json", "--host-port=0", "--runner-port=0", "--ssh-port=0", **named)
        up.event("ready")
        service = commands.service()
        forward = commands.start("forward", service.task, f"0:{service.port}", "--json")
        with connect(forward.listening()) as connection:
            assert echoes(connection)
        assert proxy.requests() == proxy.tunnels() == []
    finally:
        commands.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_tls_to_the_host_goes_through_a_proxy_that_may_itself_be_reached_by_tls(
    tmp_path: Path, proxy: Proxy, scheme: str
) -> None:
    authority = Authority(tmp_path / "ca")
    made = authority.issue([HERE], 1)
    commands = Commands(tmp_path)
    try:
        files = [f"--tls-cert={made.cert}", f"--tls-key={made.key}"]
        host = commands.start("host", "--json", f"--bind={HERE}", "--port=0", "--ssh-port=0", *files)
        ready = host.event("ready")
        token = (tmp_path / "host" / "admin-token").read_text().strip()
        trusted = {"KOHAKURIVER_CA_FILE": str(authority.cert)}
        commands.environment.update(trusted, KOHAKURIVER_HOST=ready["url"], KOHAKURIVER_TOKEN=token)
        node_token = f"--node-token-file={tmp_path / 'host' / 'node-token'}"
        options = [
            "--json",
            f"--host-url={ready['url']}",
            f"--bind={HERE}",
            "--port=0",
            "--backend=process",
            node_token,
        ]
        commands.start("runner", *options).line("registered with the host", err=True)
        service = commands.service()
        with behind_tls(proxy, made) as port:
            through = {
                "KOHAKURIVER_PROXY": url(proxy, scheme=scheme, port=port if scheme == "https" else 0),
                "SSL_CERT_FILE": str(authority.cert),
            }
            assert service.task in commands.run("vps", "list", "--json", **through).stdout
            forward = commands.start("forward", service.task, f"0:{service.port}", "--json", **through)
            with connect(forward.listening()) as connection:
                assert echoes(connection, bytes(range(256)) * 4096)
            assert forward.stop() == 0
        assert set(proxy.tunnels()) == {f"{HERE}:{port_of(ready['url'])}"}
    finally:
        commands.close()
