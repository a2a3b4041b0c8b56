"""Users, owners and shares hold on every way into a task: terminals and port 8002 as well as forwards."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.support import forked
from tests.support.hops import echo, service
from tests.support.processes import PATIENCE, Cluster, a_cluster, eventually

Run = Callable[[Coroutine[Any, Any, None]], None]
V2 = Subprotocol("kohakuriver.terminal.v2")


@dataclass
class People:
    """A cluster with a task `here` of Ann's, which lets her SSH key in; she, Bob and Cid have a token each."""

    cluster: Cluster
    key: asyncssh.SSHKey
    tokens: dict[str, str]

    def share(self, user: str = "bob") -> None:
        assert self.cluster.call("POST", "/api/tasks/here/shares", {"user": user})[0] == 201

    def unshare(self, user: str = "bob") -> None:
        assert self.cluster.call("DELETE", f"/api/tasks/here/shares/{user}")[0] == 200

    @contextlib.contextmanager
    def terminal(self, user: str) -> Iterator[ClientConnection]:
        url = f"ws{self.cluster.url.removeprefix('http')}/ws/task/here/terminal?start=1"
        headers = {"Authorization": f"Bearer {self.tokens[user]}"}
        with connect(url, additional_headers=headers, subprotocols=[V2], open_timeout=PATIENCE, proxy=None) as opened:
            yield opened

    def request(self, user: str) -> tuple[socket.socket, bytes]:
        """A connection to the SSH proxy, and the line that it answered with."""
        host, _, port = str(self.cluster.host.ready["ssh_proxy"]).rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout=PATIENCE)
        sock.sendall(f"REQUEST_TUNNEL here {self.tokens[user]}\n".encode())
        line = b""
        while not line.endswith(b"\n"):
            line += sock.recv(1)
        return sock, line

    @contextlib.asynccontextmanager
    async def jump(self, **credential: Any) -> AsyncIterator[asyncssh.SSHClientConnection]:
        host, _, port = str(self.cluster.host.ready["ssh_proxy"]).rpartition(":")
        given = {"username": "me", "known_hosts": None, "client_keys": None, "config": None, "agent_path": None}
        async with asyncssh.connect(host, int(port), **{**given, **credential}) as connection:
            yield connection


@pytest.fixture
def people(tmp_path: Path) -> Iterator[People]:
    key = asyncssh.generate_private_key("ssh-ed25519")
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "process", "--user-processes")
        tokens = {}
        for name in ("ann", "bob", "cid"):
            assert cluster.call("POST", "/api/users", {"name": name})[0] == 201
            tokens[name] = cluster.call("POST", "/api/tokens", {"user": name, "name": "t"})[1]["token"]
        body = {"name": "here", "ssh_keys": [key.export_public_key().decode().strip()], "backend": "process"}
        answer = cluster.http.post("/api/tasks", json=body, headers={"Authorization": f"Bearer {tokens['ann']}"})
        assert answer.status_code == 201, answer.text
        cluster.connected("here")
        yield People(cluster, key, tokens)


def test_a_terminal_is_for_whom_the_task_is_and_ends_with_the_share(people: People) -> None:
    with pytest.raises(InvalidStatus) as refused, people.terminal("bob"):
        pass
    assert refused.value.response.status_code == 403
    assert json.loads(refused.value.response.body or b"")["error"] == "not_your_task"
    people.share()
    with people.terminal("bob") as bobs, people.terminal("ann") as anns:
        for opened in (bobs, anns):
            opened.send(json.dumps({"type": "start", "command": ["sh", "-c", "echo $$; exec cat"], "tty": False}))
        pid = int(bobs.recv(PATIENCE))
        assert anns.recv(PATIENCE)
        people.unshare()
        message = json.loads(bobs.recv(PATIENCE))
        assert (message["status"], message["error"]) == (403, "not_allowed")
        with pytest.raises(ConnectionClosed):
            bobs.recv(PATIENCE)
        assert bobs.close_code == 1008
        eventually(lambda: not Path(f"/proc/{pid}").exists())
        anns.send(b"still here\n")
        assert anns.recv(PATIENCE) == b"still here\n"


def test_connect_ends_with_exit_code_5_and_the_reason_when_its_token_is_revoked(people: People) -> None:
    environment = {
        **os.environ,
        "KOHAKURIVER_HOST": people.cluster.url,
        "KOHAKURIVER_TOKEN": people.tokens["ann"],
        "KOHAKURIVER_CONFIG_DIR": str(people.cluster.directory / "empty"),
    }
    command = [sys.executable, "-m", "kohakuriver", "connect", "here", "--", "sh", "-c", "echo there; exec cat"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"there\n"
        tokens = people.cluster.call("GET", "/api/tokens?user=ann")[1]
        assert people.cluster.call("DELETE", f"/api/tokens/{tokens[0]['id']}")[0] == 200
        assert process.wait(PATIENCE) == 5
        assert b"the token of this session was revoked" in process.stderr.read()


@pytest.mark.parametrize("way", [["0:7"], ["--reverse", "47123:7"]], ids=["port", "reverse"])
def test_an_open_forward_goes_on_to_no_other_task_of_the_same_name(people: People, way: list[str]) -> None:
    """Names come free, and nobody is asked whether a task may be shared with them."""
    environment = {
        **os.environ,
        "KOHAKURIVER_HOST": people.cluster.url,
        "KOHAKURIVER_TOKEN": people.tokens["ann"],
        "KOHAKURIVER_CONFIG_DIR": str(people.cluster.directory / "empty"),
    }
    command = [sys.executable, "-m", "kohakuriver", "forward", "here", *way, "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while json.loads(process.stdout.readline())["event"] not in ("listening", "reversed"):
            pass
        process.send_signal(signal.SIGSTOP)  # as a laptop that sleeps
        assert people.cluster.call("DELETE", "/api/tasks/here")[0] == 200
        theirs = {"Authorization": f"Bearer {people.tokens['bob']}"}
        made = people.cluster.http.post("/api/tasks", json={"name": "here", "backend": "process"}, headers=theirs)
        assert made.status_code == 201, made.text
        people.cluster.connected("here")
        people.share("ann")
        process.send_signal(signal.SIGCONT)
        events = [json.loads(line) for line in process.stdout]
        assert process.wait(PATIENCE) == 3
    assert not {"resumed", "moved"} & {event.get("event") for event in events}
    assert events[-1]["message"].startswith("There is no task 'here' any more")


def test_the_ssh_proxy_takes_those_whom_the_task_is_for_and_ends_with_the_share(run: Run, people: People) -> None:
    stranger, line = people.request("cid")
    assert line.startswith(b"ERROR Task here is not yours")
    stranger.close()
    people.share()
    (bobs, taken), (anns, also_taken) = people.request("bob"), people.request("ann")
    assert taken == also_taken == b"SUCCESS\n"
    with bobs:
        assert bobs.recv(4) == b"SSH-"
        people.unshare()
        with contextlib.suppress(ConnectionResetError):
            while bobs.recv(1 << 16):
                pass

    async def log_in() -> None:
        anns.settimeout(None)
        given = {"username": getpass.getuser(), "known_hosts": None, "config": None, "agent_path": None}
        async with asyncssh.connect(sock=anns, client_keys=[people.key], **given) as connection:
            assert (await connection.run("echo still here")).stdout == "still here\n"

    run(log_in())


def test_the_jump_host_takes_those_whom_the_task_is_for_and_ends_with_the_share(run: Run, people: People) -> None:
    async def check() -> None:
        async with service(echo) as port:
            async with people.jump(password=people.tokens["cid"]) as cids:
                with pytest.raises(asyncssh.ChannelOpenError, match="not yours"):
                    await cids.open_connection("here", port)
            people.share()
            async with people.jump(password=people.tokens["bob"]) as bobs:
                reader, writer = await bobs.open_connection("here", port)
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                await asyncio.to_thread(people.unshare)
                with contextlib.suppress(asyncssh.Error, ConnectionError):
                    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
                with pytest.raises(asyncssh.ChannelOpenError, match="not yours"):
                    await bobs.open_connection("here", port)

    run(check())


def test_the_key_of_a_user_opens_nothing_at_the_jump_host_after_the_user_was_removed(run: Run, people: People) -> None:
    async def check() -> None:
        async with service(echo) as port, people.jump(client_keys=[people.key]) as anns:
            reader, writer = await anns.open_connection("here", port)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            assert (await asyncio.to_thread(people.cluster.call, "DELETE", "/api/users/ann"))[0] == 200
            with contextlib.suppress(asyncssh.Error, ConnectionError):
                assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
            with pytest.raises(asyncssh.ChannelOpenError):
                await anns.open_connection("here", port)
            with pytest.raises(asyncssh.PermissionDenied):
                async with people.jump(client_keys=[people.key]):
                    pass

    run(check())


def test_every_way_in_is_in_the_audit_log_with_who_and_how_it_ended(run: Run, people: People) -> None:
    people.share()
    with people.terminal("bob") as terminal:
        terminal.send(json.dumps({"type": "start", "command": ["echo", "hello"], "tty": False}))
        assert terminal.recv(PATIENCE) == b"hello\n"
        assert json.loads(terminal.recv(PATIENCE)) == {"type": "exit", "code": 0}
        with pytest.raises(ConnectionClosed):
            terminal.recv(PATIENCE)
    sock, line = people.request("bob")
    assert line == b"SUCCESS\n"
    sock.close()

    async def jump() -> None:
        async with service(echo) as port, people.jump(client_keys=[people.key]) as anns:
            reader, writer = await anns.open_connection("here", port)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            await asyncio.to_thread(people.cluster.call, "DELETE", "/api/users/ann")
            ports.append(port)

    ports: list[int] = []
    run(jump())
    lines = eventually(lambda: logged if len(logged := sessions(people.cluster)) == 7 else None)
    ended = {line["proto"]: line for line in lines if line["event"] == "session_closed"}
    opened = {line["proto"]: line for line in lines if line["event"] == "session_opened"}
    assert [line["command"] for line in lines if line["event"] == "session_command"] == ["echo hello"]
    assert ended.keys() == opened.keys() == {"terminal", "ssh"}
    assert all(line["container"] and line["node"] == "n1" and line["from"].startswith("127.") for line in lines)
    terminal_closed = ended["terminal"]
    assert (terminal_closed["user"], terminal_closed["ended_by"], terminal_closed["code"]) == ("bob", "node", 1000)
    assert terminal_closed["bytes_to_user"] >= 6
    by_user = {line["user"]: line for line in lines if line["event"] == "session_closed" and line["proto"] == "ssh"}
    assert by_user["bob"]["ended_by"] == "user"
    of_ann = by_user["ann"]
    assert (of_ann["ended_by"], of_ann["code"], of_ann["ports"]) == ("host", 1008, [str(port) for port in ports])
    assert of_ann["bytes_to_container"] >= 5
    assert of_ann["key"] == people.key.get_fingerprint()
    requests = [opened["terminal"]["request"], by_user["bob"]["request"], of_ann["request"]]
    assert requests == ["GET /ws/task/here/terminal", "REQUEST_TUNNEL here", f"ssh -J here:{ports[0]}"]


def test_logins_that_are_refused_at_port_8002_are_in_the_audit_log_with_where_they_came_from(
    run: Run, people: People
) -> None:
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    people.tokens["mallory"] = "kr_wrong"
    sock, line = people.request("mallory")
    sock.close()
    assert line.startswith(b"ERROR ")

    async def check() -> None:
        with pytest.raises(asyncssh.PermissionDenied):
            async with people.jump(client_keys=[stranger], password="kr_wrong"):
                pass

    run(check())
    lines = [line for line in audited(people.cluster) if line["event"] == "login_refused"]
    assert [(line["request"], line["code"]) for line in lines] == [
        ("REQUEST_TUNNEL here", "not_authenticated"),
        ("ssh login", "unknown_key"),
        ("ssh login", "not_authenticated"),
    ]
    assert lines[1]["key"] == stranger.get_fingerprint()
    assert all(line["from"].startswith("127.0.0.1:") for line in lines)


def sessions(cluster: Cluster) -> list[dict[str, Any]]:
    """What the host's audit log has of sessions."""
    return [line for line in audited(cluster) if line["event"].startswith("session_")]


def audited(cluster: Cluster) -> list[dict[str, Any]]:
    """The host's audit log."""
    events: list[dict[str, Any]] = cluster.call("GET", "/api/audit")[1]["events"]
    return events


def test_forwards_terminals_and_ssh_connections_of_a_user_are_counted_together(tmp_path: Path) -> None:
    with a_cluster(tmp_path, env={"KOHAKURIVER_MAX_SESSIONS": "2"}) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        key = asyncssh.generate_private_key("ssh-ed25519")
        cluster.create(name="here", ssh_keys=[key.export_public_key().decode().strip()])
        cluster.connected("here")
        people = People(cluster, key, {"admin": cluster.token})
        with people.terminal("admin"), cluster.forward("here", 80):
            sock, line = people.request("admin")
            sock.close()
            assert line == b"ERROR admin has 2 sessions open, and the limit 'sessions' is 2; end one first.\n"
            with pytest.raises(InvalidStatus) as refused, people.terminal("admin"):
                pass
            assert refused.value.response.status_code == 429

        def is_let_in() -> bool:
            sock, line = people.request("admin")
            sock.close()
            return line == b"SUCCESS\n"

        assert eventually(is_let_in)


def test_ssh_knows_nobody_elses_task_by_its_bare_name(people: People) -> None:
    people.share()
    cluster = people.cluster
    keys = [people.key.export_public_key().decode()]
    task = {"name": "git.example", "command": ["sleep", "1000"], "ssh_keys": keys, "backend": "process"}
    as_ann = {"Authorization": f"Bearer {people.tokens['ann']}"}
    assert cluster.http.post("/api/tasks", json=task, headers=as_ann).status_code == 201
    assert eventually(lambda: cluster.task("git.example")["ssh_host_key"])
    names = bare_names(people, {**people.tokens, "admin": cluster.token})
    nobodys = ["Host *.kohakuriver"]
    assert names == {"ann": ["Host here *.kohakuriver"], "bob": nobodys, "cid": nobodys, "admin": nobodys}
    assert cluster.call("DELETE", "/api/users/ann")[0] == 200
    inherited = cluster.task("here")
    assert (inherited["owner"], inherited["creator"]) == ("admin", "ann")
    assert bare_names(people, {"admin": cluster.token}) == {"admin": nobodys}


def bare_names(people: People, tokens: dict[str, str]) -> dict[str, list[str]]:
    """What `ssh-config` has for hosts, by user."""
    names = {}
    for user, token in tokens.items():
        environment = {**os.environ, "KOHAKURIVER_HOST": people.cluster.url, "KOHAKURIVER_TOKEN": token}
        environment["KOHAKURIVER_CONFIG_DIR"] = str(people.cluster.directory / user)
        printed = forked.run(["ssh-config"], env=environment, stdin="", timeout=PATIENCE).stdout
        names[user] = [line for line in printed.splitlines() if line.startswith("Host ")]
    return names


def test_what_tasks_and_strangers_say_is_for_nobodys_terminal(people: People) -> None:
    cluster = people.cluster
    command = ["sh", "-c", "printf '\\033]52;c;ZXZpbA==\\007\\033[2J\\n'; exit 3"]
    body = {"name": "rude", "command": command, "backend": "process"}
    answer = cluster.http.post("/api/tasks", json=body, headers={"Authorization": f"Bearer {people.tokens['ann']}"})
    assert answer.status_code == 201, answer.text
    assert "\\x1b]52" in str(cluster.ended("rude")["message"])
    environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
    environment["KOHAKURIVER_CONFIG_DIR"] = str(cluster.directory / "empty")
    for arguments in (["vps", "status", "rude"], ["forward", "rude", "80"], ["connect", "rude"]):
        said = forked.run(arguments, env=environment, stdin=b"", timeout=PATIENCE)
        assert b"]52" in said.stdout + said.stderr
        assert not set(said.stdout + said.stderr) & set(b"\x1b\a")
    url = f"ws{cluster.url.removeprefix('http')}/ws/forward/%1b%5d52%07%0a/80"
    with pytest.raises(InvalidStatus), connect(url, subprotocols=[V2], proxy=None):
        pass
    for log in ("host.log", "n1.log"):
        text = (cluster.directory / log).read_text()
        assert "]52" in text
        assert not set(text) & set("\x1b\a")
    assert "]52\\x07\\n" in (cluster.directory / "host.log").read_text()
