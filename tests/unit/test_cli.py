"""The command line: its parsing, its exit codes, and how light it starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from kohakuriver import __version__, config
from kohakuriver.cli import vps
from kohakuriver.cli.behind_dashes import command_of
from kohakuriver.cli.main import app, main

HEAVY = ["aiodocker", "fastapi", "httpx", "pydantic", "rich", "sqlalchemy", "uvicorn", "uvloop", "websockets"]
COMMANDS = sorted(
    words
    for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    for words in [[name, inner] for inner in getattr(command, "commands", {})] or [[name]]
)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("KOHAKURIVER_HOST", "KOHAKURIVER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(tmp_path))
    return tmp_path


def outcome(*arguments: str) -> int:
    """The exit code of one command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_starting_imports_nothing_heavy() -> None:
    code = f"import sys, kohakuriver.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_forward_has_nothing_in_memory_that_only_requests_or_addresses_need() -> None:
    spared = ["httpx", "rich", "httptools", "kohakuriver.gateway", "kohakuriver.client.host"]
    code = f"import sys, kohakuriver.cli.forward_run; print([m for m in {spared} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "spared"),
    [("vps list", {"click", "pydantic", "rich.console"}), ("host", {"pydantic.v1.main", "rich.console"})],
)
def test_a_program_loads_nothing_of_libraries_that_it_has_no_use_for(
    command: str, spared: set[str], taken_port: int, unused_port: int
) -> None:
    options = {"vps list": f"--host=http://127.0.0.1:{unused_port}", "host": f"--port={taken_port}"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kohakuriver", *command.split(), options[command]],
        capture_output=True, text=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode in (6, 7), done.stderr
    assert "httpx._client" in loaded
    assert not loaded & spared


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(*command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert f"kohakuriver {' '.join(command)}" in shown
    check_help(shown)


@pytest.mark.parametrize("group", ["", *sorted({command[0] for command in COMMANDS if len(command) > 1})])
def test_the_help_of_a_group_is_for_people_too(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(*group.split(), "--help") == 0
    check_help(capsys.readouterr().out)


def check_help(shown: str) -> None:
    """That it names no type of Python's, and that nothing in it is cut for want of room."""
    assert not re.search(r"<(str|int|float|bool|path|file|list\[.*)>|<=x", shown)
    assert not re.search(r"…\s*│", shown)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("--version") == 0
    assert capsys.readouterr().out.startswith("kohakuriver ")


END = """
import os, sys, threading
from kohakuriver import __main__

class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")

def wait():
    threading.main_thread().join()
    print("the thread has ended", flush=True)

sys.kept = Kept()
threading.Thread(target=wait, daemon=sys.argv.pop() == "daemon").start()
__main__.main()
"""


@pytest.mark.parametrize(("thread", "more"), [("daemon", []), ("needed", ["the thread has ended", "taken apart"])])
def test_a_program_ends_without_being_taken_apart_unless_a_thread_has_work_to_do(thread: str, more: list[str]) -> None:
    command = [sys.executable, "-c", END, "--version", thread]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"kohakuriver {__version__}", *more])


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kohakuriver", "forward", "t", "99999"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["forward", "t", "99999"], "Port 99999 is out of range"),
        (["forward", "t", "0"], "Port 0 is out of range"),
        (["forward", "t", "65536"], "Port 65536 is out of range"),
        (["forward", "t", "1:99999"], "Port 99999 is out of range"),
        (["forward", "t", "99999:1"], "Port 99999 is out of range"),
        (["forward", "t", "http"], "'http' is not a port"),
        (["forward", "t", "1:2:3"], "not a port"),
        (["forward", "t", "80/sctp"], "tcp or udp"),
        (["forward", "t", "80", "--proto", "sctp"], "sctp"),
        (["forward", "t", "80", "--local-port", "99999"], "local port must be between 0"),
        (["forward", "t", "80", "81", "--local-port", "9"], "--local-port goes with one remote port"),
        (["forward", "t", "9:80", "--local-port", "9"], "leave --local-port out"),
        (["forward", "t", "80", "80"], "more than once"),
        (["forward", "t", "9:80", "9:81"], "more than once"),
        (["forward", "t", "80", "--"], "command must follow"),
        (["forward", "t", "80", "--json", "--", "true"], "stdout is the command's"),
        (["forward", "t"], "Give at least one REMOTE_PORT, or --all"),
        (["forward", "t", "--all", "--local-port", "9"], "--all and --local-port don't go together"),
        (["forward", "t", "--all", "--wait"], "--wait waits for ports that are named"),
        (["forward", "t", "--all", "--", "true"], "--all and a command don't go together"),
        (["forward", "t", "53/udp", "--web"], "give a TCP port"),
        (["forward", "t", "--all", "--web"], "--all and --web don't go together"),
        (["open", "t"], "`kohakuriver open t 8888`"),
        (["open", "t", "99999"], "Port 99999 is out of range"),
        (["open", "t", "9:80"], "'9:80' is not a port"),
        (["open", "t", "80", "--local-port", "99999"], "65535"),
        (["open", "t", "80", "--print", "--json"], "--print and --json"),
        (["open", "--local-port", "7"], "are for a task's port"),
        (["open", "--print", "--json"], "--print and --json"),
        (["forward"], "TASK"),
        (["forward", "t", "unix:/x:53/udp"], "a Unix socket leads to a TCP port"),
        (["forward", "t", "unix:80"], "a Unix socket here is unix:PATH:REMOTE"),
        (["forward", "t", "unix:/x:80", "unix:/x:81"], "/x is given more than once"),
        (["forward", "--socks"], "--socks is for one task"),
        (["forward", "t", "--socks=70000"], "--socks"),
        (["forward", "t", "1080:80", "--socks"], "1080 (tcp) is given more than once"),
        (["forward", "t", "--socks", "--local-port", "9"], "--local-port goes with one remote port"),
        (["forward", "--profile", "db"], "no kohakuriver.toml here"),
        (["forward", "t", "80", "--profile", "db"], "without a TASK"),
        (["forward", "t", "80", "--detach", "--", "true"], "--detach and a command"),
        (["forward", "--list", "t"], "--list takes no TASK"),
        (["forward", "--list", "--stop", "--all"], "--list takes no TASK"),
        (["forward", "--stop"], "by their ids or TASKs"),
        (["forward", "--stop", "t", "--all"], "by their ids or TASKs"),
        (["forward", "--all"], "--all is for one task"),
        (["forward", "--list", "--all"], "--list takes no TASK, and goes without --stop and --all"),
        (["forward", "t", "80", "--colour"], "--colour"),
        (["vps", "create"], "--image"),
        (["vps", "create", "--name", "noimg"], "--backend process"),
        (["vps", "create", "--backend", "docker", "--", "ls"], "--image"),
        (["vps", "create", "--image", "i", "--env", "A"], "--env takes NAME=VALUE"),
        (["vps", "create", "--image", "i", "--mount", "data:/data"], "absolute paths"),
        (["vps", "create", "--image", "i", "--env-file", "/no/such/file"], "/no/such/file can't be read: No such file"),
        (["vps", "create", "--image", "i", "--workdir", "work"], "--workdir takes a whole path"),
        (["vps", "create", "--image", "i", "--device", "null"], "--device takes a device of the node"),
        (["vps", "create", "--image", "i", "--gpus", "-1"], "--gpus takes a number, all"),
        (["vps", "create", "--image", "i", "--restart", "sometimes"], "on-failure:N, always"),
        (["vps", "create", "--image", "i", "--pull", "maybe"], "missing, always, never"),
        (["vps", "create", "--image", "i", "--mount", "/a:/b:rx"], "SRC:DST"),
        (["vps", "create", "--backend", "vm"], "vm"),
        (["vps", "adopt"], "either a CONTAINER, --address IP or --slurm"),
        (["vps", "adopt", "c", "--address", "10.0.0.1", "--node", "n"], "either a CONTAINER, --address IP or --slurm"),
        (["vps", "status", "a\udcff"], "UTF-8"),
        (["user", "add", "\udcff"], "UTF-8"),
        (["token", "list", "--user", "\udcff"], "UTF-8"),
        (["vps", "create", "--backend", "process", "--", "echo", "\udcfe"], "UTF-8"),
        (["vps", "list", "--host", "http://h:8000/api"], "http://h:8000"),
        (["vps", "list", "--json", "--colour"], "--colour"),
        (["vps", "list", "--host", "ftp://x"], "host must be a URL"),
        (["vps", "unshare", "lab", ".."], "'..' can't be a name"),
        (["vps", "rm", ""], "'' can't be a name"),
        (["user", "remove", "../tasks/lab"], "can't be a name"),
        (["forward", "../lab", "0:80"], "can't be a name"),
        (["token", "list", "--all", "--user", "ann"], "--all and --user"),
        (["up", "--host-port", "99999"], "--host-port"),
        (["user", "add", "ann", "--role", "boss"], "'boss' is not one of"),
        (["token", "create", "x", "--expires", "1y"], "in s, m, h, d or w"),
        (["token", "create", "x", "--expires", "99999d"], "36500d at most"),
        (["vps", "list", "--token", "kr_\u00fc"], "character"),
        (["forward", "t", "80", "--token", "two words"], "character"),
        (["runner", "--port=0", "--host-url", "http://127.0.0.1:1", "--node-token", "krn_\u00fc"], "character"),
        (["rivers"], "rivers"),
        (["--json", "vps", "list"], "behind the command"),
        (["connect", "dev", "-l"], "No such option: -l"),
        (["connect", "-t", "dev"], "--tty needs a terminal"),
        (["connect", "-e", "A", "dev"], "--env takes NAME=VALUE"),
        (["vps", "restart"], "or --all"),
        (["vps", "restart", "web", "--all"], "or --all"),
        (["vps", "list", "-q", "--json"], "--quiet and --json"),
        (["connect", "--", "dev"], "TASK"),
        (["vps", "create", "g", "--image", "i"], "a name is --name g"),
        (["vps", "create", "--name", "g", "busybox:lab"], "an image is --image busybox:lab"),
        (["vps", "create", "--name", "g", "--image", "i", "ls"], "-- ls"),
        (["forward", "--wait", "2", "dev", "80"], "--wait=2 dev 80"),
        (["vps", "connect", "-L", "1:a:2", "dev"], "-L is no option of this command"),
        (["vps", "connect", "--user", "me"], "TASK"),
        (["vps", "connect", "dev", "--proxy-port", "0"], "--proxy-port"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(*arguments) == 2
    captured = capsys.readouterr()
    assert "--json" in arguments or captured.out == ""
    assert said in captured.err
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert "Value error" not in captured.err


@pytest.mark.parametrize(
    ("words", "own", "theirs"),
    [
        (["dev"], {}, []),
        (["dev", "--user", "me", "--key=id", "ls", "--user"], {"user": "me", "key": Path("id")}, ["ls", "--user"]),
        (["--user", "me", "dev", "--host", "h", "-L", "1:a:2"], {"user": "me", "host": "h"}, ["-L", "1:a:2"]),
        (["--ca-file", "ca", "dev", "--token=t"], {"ca_file": "ca", "token": "t"}, []),
        (["dev", "--proxy-port", "9", "-v", "--host", "h"], {"proxy_port": 9}, ["-v", "--host", "h"]),
        (["dev", "--", "--user", "me"], {}, ["--", "--user", "me"]),
        (["dev", "-o", "A=b", "--", "ls"], {}, ["-o", "A=b", "--", "ls"]),
    ],
    ids=" ".join,
)
def test_our_options_count_on_either_side_of_the_task_up_to_the_first_word_for_ssh(
    words: list[str], own: dict[str, object], theirs: list[str]
) -> None:
    command: Any = get_command(app).commands["vps"].commands["connect"]  # type: ignore[attr-defined]
    context = command.make_context("connect", words)
    given = context.params
    assert given["task"] == "dev"
    assert command_of(context) == theirs
    assert {name: given[name] for name in own} == own
    assert given["user"] == own.get("user", "root")


@pytest.mark.parametrize(
    ("words", "run"),
    [
        (["dev"], None),
        (["dev", "ls", "-l", "a b"], ["ls", "-l", "a b"]),
        (["dev", "--", "ls", "--", "-l"], ["ls", "--", "-l"]),
        (["--host", "h", "dev", "ls", "--host"], ["ls", "--host"]),
        (["dev", "--host=h", "ls", "--json"], ["ls", "--json"]),
        (["dev", "echo", "\udcff"], ["echo", "\udcff"]),
        (["dev", "--"], []),
        (["-it", "dev", "bash", "-l"], ["bash", "-l"]),
        (["-iT", "-e", "A=-t", "dev", "-eB=1", "--no-tty", "env", "-i"], ["env", "-i"]),
    ],
)
def test_the_command_of_a_terminal_begins_with_the_first_word_that_is_no_option_of_ours(
    words: list[str], run: list[str] | None
) -> None:
    context = get_command(app).commands["connect"].make_context("connect", words)  # type: ignore[attr-defined]
    assert context.params["task"] == "dev"
    assert command_of(context) == run
    assert context.params["host"] == ("h" if "h" in " ".join(words[:3]).replace("=", " ").split() else None)


@pytest.mark.parametrize("place", ["an argument", "a value"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_bytes_that_are_no_text_get_into_no_command(
    command: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["\udcff"] if place == "an argument" else ["--host", "\udcfe"]
    assert outcome(*command, *given) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["HOST", "TOKEN", "SSH_PROXY", "CA_FILE", "PORT", "SSH_PROXY_PORT", "NODE_TOKEN"])
def test_a_variable_that_is_no_text_is_a_wrong_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["runner", "--port=0", "--host-url=h"] if name == "NODE_TOKEN" else ["vps", "connect", "dev"]
    done = subprocess.run(
        [sys.executable, "-m", "kohakuriver", *command],
        env={**os.environb, f"KOHAKURIVER_{name}".encode(): b"\xff"},
        capture_output=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("command", [["vps", "list"], ["forward"], ["auth", "login"], ["user", "add"]], ids=" ".join)
def test_what_says_which_host_stands_in_a_group_of_its_own_at_the_end_of_the_help(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome(*command, "--help")
    before, heading, after = capsys.readouterr().out.partition(" Connection ")
    assert heading
    for option in ("--host ", "--token ", "--ca-file "):
        assert option in after
        assert option not in before
    assert "--json" in before


def test_a_ca_file_that_one_command_names_is_none_of_the_next(tmp_path: Path, unused_port: int) -> None:
    before = dict(os.environ)
    outcome("vps", "list", "--host", f"http://127.0.0.1:{unused_port}", "--ca-file", str(tmp_path / "ca.pem"))
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["vps", "list", "--host", "ftp://x"], "bad_request"),
        (["vps", "list", "--colour"], "bad_request"),
        (["vps", "list", "a\udcff"], "bad_request"),
        (["vps", "lst"], "bad_request"),
        (["vps", "stop", "a/b"], "bad_request"),
        (["vps", "create"], "bad_request"),
        (["up", "--host-port=x"], "bad_request"),
        (["runner", "--host-url=h", "--node-token=\u00fc"], "bad_request"),
        (["host", "--tls-cert=/none"], "bad_request"),
        (["init", "tls", "a,,b"], "bad_request"),
        (["demo", "--size=x"], "bad_request"),
        (["vps", "list", "--host", "http://127.0.0.1:1"], "host_unreachable"),
        (["forward", "t", "0:80", "--host", "http://127.0.0.1:1"], "host_unreachable"),
    ],
)
def test_with_json_an_error_is_json_on_stdout(
    arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(*arguments, "--json") != 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["error"] == code
    assert said["message"] in captured.err
    outcome(*arguments)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("ps", "vps list"), ("ls", "vps list"), ("vps ls", "vps list"), ("vps start", "vps restart"),
     ("login", "auth login"), ("rm", "vps rm"), ("status", "vps status"), ("run", "vps create"),
     ("exec", "connect"), ("ssh", "vps connect"), ("token ls", "token list"), ("user delete", "user remove")],
)  # fmt: skip
def test_other_programs_words_for_a_command_are_understood(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(*typed.split(), "--help") == 0
    assert f"kohakuriver {meant}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "said"),
    [("lsit", "No such command 'lsit'."), ("vps staus x", "Did you mean 'status'"),
     ("forwad t 1", "Did you mean 'forward'?"), ("vps rename a b", "No such command 'rename'."), ("vps", "COMMAND")],
)  # fmt: skip
def test_a_wrong_word_suggests_what_is_near_to_it_and_nothing_else(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(*typed.split()) == 2
    captured = capsys.readouterr()
    assert said in captured.err + captured.out
    assert "'create'" not in captured.err


@pytest.mark.parametrize(
    ("typed", "shown"), [("help", "COMMAND"), ("help vps list", "vps list"), ("vps help rm", "vps rm")]
)
def test_help_may_be_asked_for_as_a_command(typed: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(*typed.split()) == 0
    assert f"kohakuriver {shown}" in capsys.readouterr().out.replace("[OPTIONS] ", "")
    assert outcome("version") == 0


@pytest.mark.parametrize("group", ["vps", "node", "auth", "token", "user", "init"])
def test_a_group_without_a_command_shows_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(group) == 2
    captured = capsys.readouterr()
    assert f"kohakuriver {group} [OPTIONS] COMMAND" in captured.out
    assert captured.err == ""


def test_whoever_has_no_host_yet_is_told_how_to_get_one(
    capsys: pytest.CaptureFixture[str], unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_HOST", f"http://127.0.0.1:{unused_port}")
    for command in (["vps", "list"], ["forward", "t", "0:80"]):
        assert outcome(*command) == 7
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "kohakuriver up" in said
        assert "auth login --host" in said


def test_a_host_that_is_not_there_ends_with_7(capsys: pytest.CaptureFixture[str], unused_port: int) -> None:
    assert outcome("vps", "list", "--host", f"http://127.0.0.1:{unused_port}") == 7
    said = capsys.readouterr().err
    assert f"127.0.0.1:{unused_port}" in said
    assert "kohakuriver up" not in said


def test_a_host_that_is_not_there_ends_a_forward_with_7(capsys: pytest.CaptureFixture[str], unused_port: int) -> None:
    assert outcome("forward", "t", "0:80", "--host", f"http://127.0.0.1:{unused_port}") == 7
    assert "Forwarding" not in capsys.readouterr().out


def test_a_taken_local_address_ends_with_6_before_the_host_is_asked(
    capsys: pytest.CaptureFixture[str], unused_port: int, taken_port: int
) -> None:
    code = outcome("forward", "t", f"{taken_port}:80", "--host", f"http://127.0.0.1:{unused_port}")
    assert code == 6
    assert f"127.0.0.1:{taken_port} is already in use" in capsys.readouterr().err


def test_an_address_of_another_machine_can_not_be_listened_on(
    capsys: pytest.CaptureFixture[str], unused_port: int
) -> None:
    # 192.0.2.0/24 is for documentation: no machine has it.
    host = f"http://127.0.0.1:{unused_port}"
    assert outcome("forward", "t", "0:80", "--local-host", "192.0.2.1", "--host", host) == 6
    said = capsys.readouterr().err
    assert "192.0.2.1 is not an address of this machine" in said
    assert "--local-port" not in said


@pytest.mark.parametrize("name", ["0.0.0.0", "a..b"])
def test_a_forward_that_never_listens_is_not_warned_about(
    capsys: pytest.CaptureFixture[str], unused_port: int, name: str
) -> None:
    outcome("forward", "t", "0:80", "--local-host", name, "--host", f"http://127.0.0.1:{unused_port}")
    assert [line[:6] for line in capsys.readouterr().err.splitlines()] == ["Error:"]


def test_a_reader_that_goes_away_is_no_crash(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "kohakuriver", "--version"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == b""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str) -> None:
    environment = {**os.environ, "_KOHAKURIVER_COMPLETE": f"source_{shell}"}
    done = subprocess.run([sys.executable, "-m", "kohakuriver"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "kohakuriver" in done.stdout


def test_completion_offers_commands() -> None:
    environment = {
        **os.environ,
        "_KOHAKURIVER_COMPLETE": "complete_bash",
        "COMP_WORDS": "kohakuriver for",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([sys.executable, "-m", "kohakuriver"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["forward"]


@pytest.fixture(params=[404, 200, 401, 403, 500, 302])
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a web server that is no host of ours."""

    class Answers(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(request.param)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"hi")

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


REMOTE = [
    *(
        ["vps", "list"],
        ["vps", "status", "t"],
        ["vps", "create", "--image=i"],
        ["vps", "rm", "t"],
        ["vps", "stop", "t"],
    ),
    *(["vps", "adopt", "c"], ["vps", "share", "t", "u"], ["vps", "agent-command", "t"], ["vps", "connect", "t"]),
    *(["node", "list"], ["auth", "login"], ["auth", "status"], ["token", "create"], ["user", "remove", "u"]),
    *(["forward", "t", "0:80"], ["connect", "t", "ls"], ["ssh-config"]),
]


@pytest.mark.parametrize("command", REMOTE, ids=" ".join)
def test_what_is_no_host_never_ends_a_command_as_a_missing_task_would(
    command: list[str], stranger: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert outcome(*command[:2], f"--host={stranger}", "--token=t", *command[2:]) == 7
    said = capfd.readouterr().err
    assert stranger in said
    assert said.count("\n") == 1


def test_a_wrong_address_is_told_before_the_token_is_asked_for(unused_port: int) -> None:
    command = [sys.executable, "-m", "kohakuriver", "auth", "login", "--host", f"http://127.0.0.1:{unused_port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as login:
        assert login.wait(30) == 7  # and nobody has typed anything
        assert login.stdout is not None
        assert login.stderr is not None
        assert login.stdout.read() == b""
        assert b"can't be reached" in login.stderr.read()


def test_a_host_that_is_not_there_is_told_by_every_command_in_one_sentence(
    unused_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    said = set()
    for command in REMOTE:
        assert outcome(*command[:2], f"--host=http://127.0.0.1:{unused_port}", "--token=t", *command[2:]) == 7
        said.add(capfd.readouterr().err)
    assert said == {f"Error: The host at http://127.0.0.1:{unused_port} can't be reached: Connection refused.\n"}


def test_what_can_be_no_machines_name_is_told_by_every_command_in_one_sentence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = set()
    for command in REMOTE:
        assert outcome(*command[:2], "--host=https://a..b:1", "--token=t", *command[2:]) == 7
        said.add(capfd.readouterr().err)
    assert said == {"Error: The host at https://a..b:1 can't be reached: this can't be the name of a machine.\n"}


def test_bytes_behind_the_dashes_are_refused_in_the_words_that_other_arguments_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = ["vps", "create", "--host=http://127.0.0.1:1", "--token=t", "--backend=process", "--", "echo"]
    assert outcome(*command, "a\udcfeb") == 2
    assert capfd.readouterr().err == "Error: b'a\\xfeb' is not UTF-8; arguments must be.\n"


@pytest.mark.parametrize("name", ["HOST", "TOKEN", "SSH_PROXY", "CA_FILE", "the task"])
def test_the_way_that_ssh_starts_refuses_what_is_no_text_and_names_it(name: str) -> None:
    given = {"HOST": "https://h:1", "TOKEN": "t", "SSH_PROXY": "h:2", "CA_FILE": "ca"}
    values = {key: b"\xff" if key == name else value.encode() for key, value in given.items()}
    done = subprocess.run(
        [sys.executable, "-m", "kohakuriver.cli.ssh_dial", b"\xff" if name == "the task" else "web"],
        env={**os.environb, **{f"KOHAKURIVER_{key}".encode(): value for key, value in values.items()}},
        capture_output=True,
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert (b"udcff" if name == "the task" else name.lower().encode()) in done.stderr


@pytest.mark.parametrize(
    ("runner", "host", "shown"),
    [
        ("http://127.0.0.1:8001", "http://gpu.lab:8000", "http://gpu.lab:8001"),
        ("http://localhost:8001", "https://gpu.lab", "http://gpu.lab:8001"),
        ("http://[::1]:8001", "http://[2001:db8::1]:8000", "http://[2001:db8::1]:8001"),
        ("http://n1.lab:8001", "http://gpu.lab:8000", "http://n1.lab:8001"),  # as --advertise-url has it
        ("http://127.0.0.1:8001", "http://localhost:8000", "http://127.0.0.1:8001"),
    ],
)
def test_an_agent_is_told_a_url_that_leads_to_its_runner_from_another_machine(
    runner: str, host: str, shown: str
) -> None:
    assert vps._from_elsewhere(runner, host) == shown
