"""Users, tokens, log-ins and shares, by the commands that people use, on a real host with a real node."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pexpect
import pytest

from tests.support.apart import cluster
from tests.support.up import Apart, Commands, connect, echoes

__all__ = ["cluster"]


class Person(Commands):
    """A user's commands, with settings of their own. `token` is not in the environment."""

    def __init__(self, cluster: Apart, directory: Path, name: str, *options: str) -> None:
        directory.mkdir()
        super().__init__(directory)
        self.name = name
        self.url = cluster.url
        self.added: dict[str, Any] = json.loads(cluster.succeed("user", "add", name, "--json", *options))
        self.token: str = self.added["token"]

    def login(self) -> None:
        done = self.run("auth", "login", "--host", self.url, stdin=self.token + "\n")
        assert done.returncode == 0, done.stderr


@pytest.fixture
def people(cluster: Apart, tmp_path: Path) -> Iterator[tuple[Person, Person]]:
    """ann and bob, who are logged in."""
    pair = Person(cluster, tmp_path / "ann", "ann"), Person(cluster, tmp_path / "bob", "bob")
    for person in pair:
        person.login()
    yield pair
    for person in pair:
        person.close()
        cluster.run("user", "remove", person.name)


def refused(done: subprocess.CompletedProcess[str], said: str, code: int = 5) -> bool:
    """Whether a command ended with `code` and one sentence."""
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    return said in done.stderr


def test_a_login_is_kept_for_its_host_in_a_file_of_ones_own(cluster: Apart, tmp_path: Path) -> None:
    cat = Person(cluster, tmp_path / "cat", "cat", "--expires", "30d")
    assert cat.added["expires_at"] is not None
    assert refused(cat.run("auth", "status", "--host", cat.url), "auth login")
    assert refused(cat.run("auth", "login", "--host", cat.url, stdin="wrong\n"), "does not know this token")
    assert not (cat.directory / "logins.json").exists()

    logged_in = cat.run("auth", "login", "--host", cat.url, stdin=cat.token + "\n")
    assert logged_in.stdout == f"Logged in to {cat.url} as cat (user).\n"
    assert stat.S_IMODE((cat.directory / "logins.json").stat().st_mode) == 0o600
    # From now on nothing has to be said.
    status = json.loads(cat.succeed("auth", "status", "--json"))
    assert (status["host"], status["user"], status["role"], status["source"]) == (cat.url, "cat", "user", "auth login")
    assert (status["token"]["name"], status["token"]["status"]) == ("first", "valid")
    assert cat.token not in json.dumps(status)
    assert "cat" in cat.succeed("auth", "status")
    # A script's own token goes before.
    other = json.loads(cat.succeed("token", "create", "script", "--json"))["token"]
    done = cat.run("auth", "status", "--json", KOHAKURIVER_TOKEN=other)
    assert json.loads(done.stdout)["token"]["name"] == "script"
    assert json.loads(done.stdout)["source"] == "KOHAKURIVER_TOKEN"

    done = cat.run("auth", "login", "--host", cat.url, stdin=cat.token + "\n", KOHAKURIVER_TOKEN=other)
    assert "another token" in done.stderr
    assert "because of KOHAKURIVER_TOKEN" in done.stderr
    done = cat.run("auth", "login", "--host", cat.url, stdin=cat.token + "\n", KOHAKURIVER_HOST="http://elsewhere:1")
    assert f"without --host {cat.url} commands use http://elsewhere:1, because of KOHAKURIVER_HOST" in done.stderr

    assert cat.succeed("auth", "logout", "--revoke") == f"Logged out of {cat.url}.\n"
    assert refused(cat.run("auth", "status", "--host", cat.url), "auth login")
    assert refused(cat.run("vps", "list", "--host", cat.url, KOHAKURIVER_TOKEN=cat.token), "revoked")
    assert cat.succeed("auth", "logout", "--host", cat.url).startswith("You were not logged in")
    # One that is worth nothing any more is forgotten all the same.
    assert cat.run("auth", "login", "--host", cat.url, stdin=other + "\n").returncode == 0
    cluster.succeed(
        "token", "revoke", json.loads(cluster.succeed("token", "list", "--user", "cat", "--json"))["tokens"][0]["id"]
    )
    assert cat.succeed("auth", "logout", "--revoke") == f"Logged out of {cat.url}.\n"
    cluster.succeed("user", "remove", "cat")


class PageOfHost:
    """A browser that is logged in to a real host, as far as forms go."""

    def __init__(self, cluster: Apart, token: str) -> None:
        name = (cluster.directory / "host" / "browser-name").read_text().strip()
        authority = f"{name}:{httpx.URL(cluster.url).port}"
        sent = {"Host": authority, "Origin": f"http://{authority}", "Sec-Fetch-Site": "same-origin"}
        self.http = httpx.Client(base_url=cluster.url, headers=sent, trust_env=False)
        (cookie,) = self.http.post("/login", data={"token": token}).headers.get_list("set-cookie")
        self.http.headers["Cookie"] = cookie.partition(";")[0]

    def answer(self, code: str, answer: str) -> None:
        """Type the code that a command line shows, and answer."""
        page = self.http.post("/device", data={"code": code}).text
        sent = dict(re.findall(r'name="(code|asked)" value="([^"]+)"', page))
        assert self.http.post("/device", data={**sent, "answer": answer}).status_code == 200


def test_a_command_line_is_logged_in_by_a_browser_with_no_token_typed_or_shown(
    cluster: Apart, people: tuple[Person, Person], tmp_path: Path
) -> None:
    ann, _ = people
    browser = PageOfHost(cluster, ann.token)
    new = Commands(tmp_path / "new")
    login = ("auth", "login", "--web", "--host", cluster.url)
    for answer in ("no", "yes"):
        program = new.start(*login)
        assert "its page /device" in program.line("kohakuriver open", err=True)
        code = program.line("Type this code there, within 10 minutes: ", err=True).rpartition(" ")[2]
        browser.answer(code.strip(), answer)
        said = program.rest(), program.rest(err=True)
        if answer == "no":
            assert said == ([], ["Error: This login was refused in the browser."])
            assert program.ended() == 5
        else:
            assert said == ([f"Logged in to {cluster.url} as ann (user)."], [])
            assert program.ended() == 0
    status = json.loads(new.succeed("auth", "status", "--json"))
    assert (status["user"], status["source"]) == ("ann", "auth login")
    assert socket.gethostname()[:20] in status["token"]["name"]
    assert status["token"]["expires_at"] is not None
    assert refused(new.run(*login, "--token", "kr_x"), "give none with it", 2)
    assert refused(new.run("auth", "login", "--with-token", "--host", cluster.url, stdin="\n"), "Give a token", 2)
    assert new.succeed("auth", "logout", "--revoke") == f"Logged out of {cluster.url}.\n"
    browser.http.close()


def test_who_types_no_token_at_a_terminal_is_logged_in_by_a_browser(
    cluster: Apart, people: tuple[Person, Person], tmp_path: Path
) -> None:
    _, bob = people
    browser = PageOfHost(cluster, bob.token)
    new = Commands(tmp_path / "new")
    argv = ["-m", "kohakuriver", "auth", "login", "--host", cluster.url]
    terminal = pexpect.spawn(sys.executable, argv, env=new.environment, timeout=60, encoding="utf-8")
    terminal.expect("or Enter to log in with a browser: ")
    terminal.sendline("")
    terminal.expect("within 10 minutes: ([A-Z]{4}-[A-Z]{4})")
    browser.answer(terminal.match[1], "yes")
    terminal.expect(r"as bob \(user\)")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    browser.http.close()


def test_a_command_line_that_waits_for_a_browser_outlives_a_restart_of_the_host(
    cluster: Apart, people: tuple[Person, Person], tmp_path: Path
) -> None:
    ann, _ = people
    new = Commands(tmp_path / "new")
    program = new.start("auth", "login", "--web", "--host", cluster.url)
    code = program.line("Type this code there", err=True).rpartition(" ")[2].strip()
    cluster.host.stop()
    cluster.start_host()
    browser = PageOfHost(cluster, ann.token)
    browser.answer(code, "yes")
    assert program.rest() == [f"Logged in to {cluster.url} as ann (user)."]
    assert program.ended() == 0
    browser.http.close()


def test_an_admin_reads_and_follows_what_was_done(cluster: Apart, people: tuple[Person, Person]) -> None:
    ann, _ = people
    assert refused(ann.run("audit"), "for admins")
    ann.succeed("token", "create", "laptop")
    done = [
        json.loads(line) for line in cluster.succeed("audit", "--user", "ann", "--since", "1h", "--json").splitlines()
    ]
    assert [event["event"] for event in done][-2:] == ["refused", "token_made"]
    last = cluster.succeed("audit", "--user=ann").splitlines()[-1].split("  ")
    assert last[1:3] == ["token_made", "ann"]
    assert last[3].startswith("127.0.0.1:")
    assert "label=laptop" in last
    assert cluster.succeed("audit", "--task=none-such") == ""
    wrong = cluster.run("audit", "--since", "yesterday")
    assert (wrong.returncode, wrong.stdout, "--since takes" in wrong.stderr) == (2, "", True)

    following = cluster.start("audit", "-f", "--user=ann", "--json")
    assert [json.loads(following.line(""))["event"] for _ in done] == [event["event"] for event in done]
    ann.succeed("token", "revoke", "laptop")
    assert json.loads(following.line(""))["event"] == "token_revoked"
    following.stop()


def test_users_and_tokens_are_listed_for_people_and_for_programs(cluster: Apart, people: tuple[Person, Person]) -> None:
    ann, _ = people
    users = {user["name"]: user["role"] for user in json.loads(cluster.succeed("user", "list", "--json"))["users"]}
    assert users == {"admin": "admin", "ann": "user", "bob": "user"}
    assert [line.split()[:2] for line in cluster.succeed("user", "list").splitlines()][1:] == [
        ["admin", "admin"],
        ["ann", "user"],
        ["bob", "user"],
    ]
    made = ann.run("token", "create", "laptop", "--expires", "12h")
    assert made.stdout.strip().startswith("kr_")
    assert "laptop" in made.stderr
    assert made.stdout.strip() not in made.stderr
    tokens = json.loads(ann.succeed("token", "list", "--json"))["tokens"]
    assert sorted(token["name"] for token in tokens) == ["first", "laptop"]
    assert {token["user"] for token in tokens} == {"ann"}
    everybodys = json.loads(cluster.succeed("token", "list", "--all", "--json"))["tokens"]
    assert {token["name"] for token in everybodys} >= {"admin-token", "node-token", "first", "laptop"}
    assert ann.succeed("token", "revoke", "laptop").startswith("Revoked laptop")
    unnamed = json.loads(ann.succeed("token", "create", "--json"))
    assert unnamed["created_at"][:10] in unnamed["name"]
    assert ann.succeed("token", "revoke", unnamed["id"]).startswith(f"Revoked {unnamed['name']}")
    assert refused(ann.run("token", "revoke", "laptop"), "no token 'laptop'", 3)


def test_what_is_for_admins_ends_with_5_for_everybody_else(people: tuple[Person, Person]) -> None:
    ann, _ = people
    for command in (
        ("user", "list"),
        ("user", "add", "cat"),
        ("user", "remove", "bob"),
        ("token", "list", "--all"),
        ("token", "create", "x", "--user", "bob"),
        ("token", "create", "x", "--node", "n1"),
        ("vps", "adopt", "some-container"),
    ):
        assert refused(ann.run(*command), "admins")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("token", "create", "x", "--expires", "soon"), "like 12h or 30d"),
        (("token", "create", "x", "--expires", "0d"), "like 12h or 30d"),
        (("token", "create", "x\ny"), "letters"),
        (("token", "create", "first"), "already"),
        (("auth", "login"), "token"),
    ],
)
def test_a_wrong_command_line_ends_with_2(people: tuple[Person, Person], command: tuple[str, ...], said: str) -> None:
    assert refused(people[0].run(*command), said, 2)


def test_a_task_is_its_makers_alone_until_it_is_shared(people: tuple[Person, Person]) -> None:
    ann, bob = people
    service = ann.service()
    task = service.task
    assert json.loads(bob.succeed("vps", "list", "--json"))["tasks"] == []
    forward = ("forward", task, f"0:{service.port}", "--json")
    for command in (("vps", "status", task), ("vps", "stop", task), ("vps", "rm", task), forward[:-1]):
        assert refused(bob.run(*command), "not yours")

    assert ann.succeed("vps", "share", task, "bob").startswith("bob may now use")
    assert "bob" in ann.succeed("vps", "status", task)
    shared = json.loads(bob.succeed("vps", "list", "--json"))["tasks"]
    assert [(seen["name"], seen["owner"], seen["shared_with"]) for seen in shared] == [(task, "ann", ["bob"])]
    assert refused(bob.run("vps", "rm", task), "ann")
    anns, bobs = ann.start(*forward), bob.start(*forward)
    with connect(anns.listening()) as hers, connect(bobs.listening()) as his:
        assert echoes(hers)
        assert echoes(his)
        assert ann.succeed("vps", "unshare", task, "bob").startswith("bob may no longer use")
        until_ended(his)
        assert echoes(hers)
    assert bobs.ended() == 5
    assert any("not yours" in line for line in bobs.rest(err=True))
    assert anns.stop() == 0
    assert refused(ann.run("vps", "share", task, "nobody"), "no user", 3)


def test_a_task_is_shared_with_a_group_and_what_a_member_has_open_ends_when_it_leaves(
    cluster: Apart, people: tuple[Person, Person]
) -> None:
    ann, bob = people
    task = ann.service().task
    assert refused(ann.run("group", "add", "lab"), "for admins")
    assert refused(ann.run("vps", "share", task, "--group", "lab"), "no group 'lab'", 3)
    assert refused(ann.run("vps", "share", task), "either a USER or --group", 2)
    assert cluster.succeed("group", "add", "lab", "bob") == "Added lab: bob.\n"
    try:
        assert ann.succeed("vps", "share", task, "--group", "lab").startswith("@lab may now use")
        assert "@lab" in ann.succeed("vps", "status", task)
        listed = json.loads(bob.succeed("group", "list", "--json"))["groups"]
        assert [(group["name"], group["members"]) for group in listed] == [("lab", ["bob"])]
        bobs = bob.start("forward", task, "0:80", "--json")
        bobs.listening()
        assert cluster.succeed("group", "member", "lab", "--remove", "bob") == "In lab: nobody.\n"
        assert bobs.ended() == 5
        assert any("not yours" in line for line in bobs.rest(err=True))
        audit = [json.loads(line) for line in cluster.succeed("audit", "--since", "1h", "--json").splitlines()]
        assert [line for line in audit if line["event"] == "group_changed"][-1]["removed"] == ["bob"]
        assert ann.succeed("vps", "unshare", task, "@lab").startswith("@lab may no longer use")
    finally:
        cluster.succeed("group", "rm", "lab")


def until_ended(connection: socket.socket) -> None:
    """Wait for the end of a connection, in good order or by a reset."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass


@pytest.mark.parametrize(("how", "said"), [("revoke", "revoked"), ("remove", "removed")])
def test_an_open_forward_ends_at_once_with_5_when_its_right_does(
    cluster: Apart, people: tuple[Person, Person], how: str, said: str
) -> None:
    ann, _ = people
    service = ann.service()
    secret = ann.succeed("token", "create", "short", "--expires", "1h").strip()
    forward = ann.start("forward", service.task, f"0:{service.port}", "--json", KOHAKURIVER_TOKEN=secret)
    with connect(forward.listening()) as connection:
        assert echoes(connection)
        if how == "revoke":
            ann.succeed("token", "revoke", "short")
        else:
            cluster.succeed("user", "remove", "ann")
        until_ended(connection)
    assert said in forward.event("reconnecting")["reason"]
    assert forward.ended() == 5
    assert forward.rest(err=True)[-1].startswith("Error: This token was revoked")


def test_a_node_with_a_token_of_its_own_joins_and_with_anothers_does_not(cluster: Apart, tmp_path: Path) -> None:
    own = json.loads(cluster.succeed("token", "create", "second", "--node", "second", "--json"))
    assert own["token"].startswith("krn_")
    runner = [f"--host-url={cluster.url}", "--bind=127.0.0.1", "--port=0", "--json"]
    environment = {"KOHAKURIVER_NODE_TOKEN": own["token"]}
    wrong = cluster.start("runner", *runner, "--name=third", f"--state-dir={tmp_path / 'third'}", **environment)
    assert "node second alone" in wrong.line("does not take this node in", err=True)
    right = cluster.start("runner", *runner, "--name=second", f"--state-dir={tmp_path / 'second'}", **environment)
    right.line("registered with the host", err=True)
    nodes = {node["name"] for node in json.loads(cluster.succeed("node", "list", "--json"))["nodes"]}
    assert "second" in nodes
    assert "third" not in nodes
    for program in (wrong, right):
        assert program.stop() == 0
    file = tmp_path / "node-token"
    file.write_text(own["token"])
    file.chmod(0o644)
    options = [f"--node-token-file={file}", "--name=second", f"--state-dir={tmp_path / 'second'}"]
    readable = cluster.start("runner", *runner, *options)
    assert str(file) in readable.line("may read the node token", err=True)
    readable.line("registered with the host", err=True)
    assert readable.stop() == 0


def test_what_a_host_keeps_is_its_users_alone_also_in_a_directory_that_others_read(tmp_path: Path) -> None:
    state = tmp_path / "host"
    state.mkdir()
    state.chmod(0o755)
    (state / "host.db").touch(mode=0o644)  # what an earlier start left
    commands = Commands(tmp_path)
    try:
        commands.start("host", "--json", "--bind=127.0.0.1", "--port=0", "--ssh-port=0").event("ready")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in state.iterdir()}
    finally:
        commands.close()
    assert modes.keys() >= {"host.db", "host.db-wal", "admin-token", "node-token", "audit.jsonl"}
    assert set(modes.values()) == {0o600}


def test_a_users_limits_are_set_shown_and_told_by_a_refusal(cluster: Apart, people: tuple[Person, Person]) -> None:
    ann, _ = people
    shown = json.loads(cluster.succeed("user", "limit", "ann", "--tokens", "1", "--memory", "1.5g", "--json"))
    assert shown["name"] == "ann"
    assert shown["limits"]["tokens"] == {"limit": 1, "used": 1, "own": True}
    assert shown["limits"]["memory"] == {"limit": 3 << 29, "used": 0, "own": True}
    rows = [line.split() for line in cluster.succeed("user", "limit", "ann").splitlines()]
    assert ["tokens", "1", "1", "own"] in rows
    assert ["memory", "0", "B", "1.5", "GiB", "own"] in rows
    assert ["tasks", "0", "100", "default"] in rows

    assert refused(ann.run("token", "create"), "the limit 'tokens' of ann is 1; revoke one", code=4)
    status = [line.split(maxsplit=1) for line in ann.succeed("auth", "status").splitlines()]
    assert ["tokens:", "1 of 1"] in status
    assert ["memory:", "0 B of 1.5 GiB"] in status
    assert ["connects:", "5000 at most"] in status
    assert json.loads(ann.succeed("auth", "status", "--json"))["limits"] == shown["limits"]
    assert refused(ann.run("user", "limit", "ann", "--tokens", "9"), "for admins")

    back = json.loads(cluster.succeed("user", "limit", "ann", "--tokens", "default", "--memory", "none", "--json"))
    assert back["limits"]["tokens"] == {"limit": 100, "used": 1, "own": False}
    assert back["limits"]["memory"] == {"limit": None, "used": 0, "own": True}
    assert ann.succeed("token", "create")
    assert refused(
        cluster.run("user", "limit", "ann", "--memory", "much"), "--memory takes a number such as 8g", code=2
    )


def test_a_user_is_added_with_limits(cluster: Apart, tmp_path: Path) -> None:
    dan = Person(cluster, tmp_path / "dan", "dan", "--tasks", "3", "--cpus", "1.5")
    assert dan.added["limits"] == {"tasks": 3, "cpus": 1.5}
    users = json.loads(cluster.succeed("user", "list", "--json"))["users"]
    assert {user["name"]: user["limits"] for user in users}["dan"] == {"tasks": 3, "cpus": 1.5}
    dan.close()
    cluster.succeed("user", "remove", "dan")
