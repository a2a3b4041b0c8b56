"""Terminals with a name (`connect --session`): left, taken up again, taken over, listed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import eventually
from tests.support.terminals import Terminal, a_terminal
from tests.support.up import Cluster

TASK = "desk"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("sessions"))
    try:
        cluster.succeed("vps", "create", "--backend", "process", "--name", TASK, "-e", "SHELL=/bin/bash")
        yield cluster
    finally:
        cluster.close()


def listed(cluster: Cluster) -> dict[str, bool]:
    """The sessions that `vps status` shows, and whether somebody is in them."""
    shown: list[dict[str, Any]] = json.loads(cluster.succeed("vps", "status", TASK, "--json"))["sessions"]
    return {session["name"]: session["attached"] for session in shown}


def leave(terminal: Terminal) -> None:
    terminal.child.send(b"\r~.")
    assert terminal.ended() == 0
    assert "The session goes on; `kohakuriver connect desk --session " in terminal.said()


def test_a_session_is_left_and_taken_up_again_with_all_that_is_in_it(cluster: Cluster) -> None:
    with a_terminal(cluster, TASK, "--session", "work") as terminal:
        terminal.ready()
        terminal.line("NUMBER=42; echo said-$((NUMBER + 1))-before")
        terminal.expect("said-43-before")
        assert listed(cluster) == {"work": True}
        leave(terminal)
    eventually(lambda: listed(cluster) == {"work": False})
    assert "work (nobody in it)" in cluster.succeed("vps", "status", TASK)
    with a_terminal(cluster, TASK, "--session", "work", rows=31, cols=99) as terminal:
        terminal.expect("said-43-before")
        terminal.line('echo "<$NUMBER>" $(stty size)')
        terminal.expect("<42> 31 99")
        terminal.line("exit 7")
        assert terminal.ended() == 7
    assert listed(cluster) == {}


def test_what_runs_in_a_session_runs_on_when_the_window_is_closed(cluster: Cluster, tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    job = f"echo begun; until [ -e {go} ]; do sleep 0.05; done; yes | head -c 5000000; touch {done}; sleep 1000"
    with a_terminal(cluster, TASK, "-s", "job", "--", "sh", "-c", job) as terminal:
        terminal.expect("begun")
        terminal.child.close(force=True)
    go.touch()
    eventually(done.exists)
    with a_terminal(cluster, TASK, "-s", "job") as terminal:
        terminal.expect(r"\[\d+ bytes of output were lost meanwhile\]")
        terminal.child.send(b"\x03")
        terminal.ended()
    assert listed(cluster) == {}


def test_a_shell_that_is_idle_stays_when_its_window_is_closed(cluster: Cluster) -> None:
    """That its terminal has ended, connect may see before the signal for it."""
    with a_terminal(cluster, TASK, "-s", "idle", ignores_hangup=True) as terminal:
        terminal.ready()
        terminal.line("NUMBER=42; echo set-$((NUMBER + 1))")
        terminal.expect("set-43")
        assert terminal.close_window() == 129
    with a_terminal(cluster, TASK, "-s", "idle") as terminal:
        terminal.line('echo "<$NUMBER>"; exit')
        terminal.expect("<42>")
        terminal.ended()
    assert listed(cluster) == {}


FLOOD = "yes | head -c 32M"  # a kernel's terminal may take no more than ten of them a second


def seconds_of(flood: Callable[[str], object], directory: Path) -> float:
    """How long a flood took that a terminal ran as this command says."""
    began, ended = directory / "began", directory / "ended"
    for path in (began, ended):
        path.unlink(missing_ok=True)
    flood(f"date +%s%N >{began}; {FLOOD}; date +%s%N >{ended}.new; mv {ended}.new {ended}")
    eventually(ended.exists, within=100)
    return (int(ended.read_text()) - int(began.read_text())) / 1e9


def to_a_plain_reader(command: str) -> None:
    """Run a command on a terminal whose output is read and thrown away."""
    ours, its = pty.openpty()
    with subprocess.Popen(["sh", "-c", command], stdin=its, stdout=its, stderr=its, start_new_session=True):
        os.close(its)
        with contextlib.suppress(OSError):  # EIO: the last program on it has ended
            while os.read(ours, 1 << 16):
                pass
    os.close(ours)


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_a_job_that_prints_when_nobody_is_there_runs_as_fast_as_before_a_reader_that_throws_all_away(
    cluster: Cluster, tmp_path: Path
) -> None:
    go = tmp_path / "go"

    def to_nobody(command: str) -> None:
        go.unlink(missing_ok=True)
        eventually(lambda: not listed(cluster))
        job = f"echo begun; until [ -e {go} ]; do sleep 0.05; done; {command}"
        with a_terminal(cluster, TASK, "-s", "flood", "--", "sh", "-c", job) as terminal:
            terminal.expect("begun")
            terminal.child.close(force=True)
        eventually(lambda: listed(cluster) == {"flood": False})
        go.touch()

    rounds: list[tuple[float, float]] = []
    for _ in range(3):  # a round that the machine was busy in says nothing
        rounds.append((seconds_of(to_nobody, tmp_path), seconds_of(to_a_plain_reader, tmp_path)))
        alone, read = (min(each) for each in zip(*rounds, strict=True))
        if alone <= 1.2 * read:
            return
    raise AssertionError(rounds)


def test_who_opens_a_session_takes_it_from_whoever_is_in_it(cluster: Cluster) -> None:
    with a_terminal(cluster, TASK, "--session", "one") as first:
        first.ready()
        with a_terminal(cluster, TASK, "--session", "one") as second:
            second.ready()
            assert first.ended() == 4
            assert "This session was opened elsewhere." in first.said()
            second.line("exit")
            assert second.ended() == 0


def test_a_session_is_its_users_alone_and_ends_when_the_task_is_shared_no_more(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.succeed("user", "add", "bob")
    bobs = json.loads(cluster.succeed("token", "create", "--user", "bob", "--json"))["token"]
    cluster.succeed("vps", "share", TASK, "bob")
    ended = tmp_path / "ended"
    job = f"trap 'touch {ended}; exit' HUP; echo begun; while :; do sleep 0.05; done"
    with a_terminal(cluster, TASK, "--token", bobs, "-s", "bobs", "--", "sh", "-c", job) as terminal:
        terminal.expect("begun")
        assert listed(cluster) == {}
        leave(terminal)
    assert not ended.exists()
    cluster.succeed("vps", "unshare", TASK, "bob")
    eventually(ended.exists)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--session", "a b"], "--session takes letters, digits, '.', '_' and '-', 64 at most, not 'a b'."),
        (["--session", "a", "--user", "root"], "--session and --user don't go together"),
        (["--session", "a", "--no-resume"], "--session and --no-resume don't go together"),
        (["--session", "a", "-T"], "--session and --no-tty don't go together"),
        (["--session", ""], "--session takes letters"),
        (["--session", "a"], "--session needs a terminal as stdin and stdout"),
    ],
)
def test_what_a_session_can_not_be_is_said(cluster: Cluster, options: list[str], sentence: str) -> None:
    done = cluster.run("connect", TASK, *options)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_a_task_says_that_it_has_as_many_sessions_of_one_user_as_it_may(cluster: Cluster) -> None:
    cluster.succeed(
        "vps",
        "create",
        "--backend",
        "process",
        "--name",
        "small",
        "-e",
        "SHELL=/bin/bash",
        "-e",
        "KOHAKURIVER_TERMINALS=4",
    )
    with a_terminal(cluster, "small", "-s", "one") as terminal:
        terminal.ready()
        with a_terminal(cluster, "small", "-s", "two") as second:
            assert second.ended() == 4
            assert "Task small can't keep the session two: " in second.said()
            assert "two: you have as many sessions in the task as you may; end some of them first." in second.said()
