"""Programs that tests have forked: nothing of how they were made shows."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from kohakuriver import __version__
from tests.support import forked

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("KOHAKURIVER_")}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**ENVIRONMENT, "KOHAKURIVER_CONFIG_DIR": str(tmp_path)}


@pytest.mark.parametrize(
    ("command", "stdin"),
    [(["--version"], ""), (["forward", "t", "70000"], ""), (["auth", "login", "--host", "http://127.0.0.1:1"], "x\n")],
    ids=["succeeds", "fails", "reads"],
)
def test_a_forked_program_says_and_does_what_one_that_is_started_anew_does(
    command: list[str], stdin: str, environment: dict[str, str]
) -> None:
    forks = forked.run(command, env=environment, stdin=stdin, timeout=60)
    anew = forked.run(command, env={**environment, "PYTHONSAFEPATH": "1"}, stdin=stdin, timeout=60)
    assert (forks.returncode, forks.stdout, forks.stderr) == (anew.returncode, anew.stdout, anew.stderr)
    assert forks.stdout.strip() == (f"kohakuriver {__version__}" if command == ["--version"] else "")


def test_a_forked_program_has_descriptors_of_its_own_and_the_exit_code_of_what_ended_it(
    environment: dict[str, str],
) -> None:
    program = forked.start(["host", "--port=0", "--ssh-port=0", "--bind=127.0.0.1", "--json"], env=environment)
    assert isinstance(program, forked.Forked)
    with program:
        assert program.stdout is not None
        assert '"ready"' in program.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.01)
        assert _files(program.pid) & _files(forked.template()) <= {os.devnull}
        program.kill()
        assert program.wait(20) == -signal.SIGKILL
        assert program.poll() == -signal.SIGKILL
    assert not Path(f"/proc/{program.pid}").exists()


def test_what_a_forked_up_starts_is_its_own_child_under_its_own_name_and_ends_with_it(
    environment: dict[str, str],
) -> None:
    arguments = ["up", "--json", "--host-port=0", "--runner-port=0", "--ssh-port=0"]
    with forked.start(arguments, env=environment) as program:
        assert isinstance(program, forked.Forked)
        assert program.stdout is not None
        assert '"ready"' in program.stdout.readline()
        assert _words(program.pid) == [*forked.PROGRAM, *arguments]
        below = psutil.Process(program.pid).children()
        roles = {_words(each.pid)[3]: each for each in below}
        assert roles.keys() >= {"host", "runner"}
        assert all(os.getsid(roles[role].pid) == roles[role].pid for role in ("host", "runner"))
        roles["host"].kill()
        assert program.wait(60) == 1
        assert psutil.wait_procs(below, timeout=60)[1] == []


def _words(pid: int) -> list[str]:
    return [word for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0") if word]


def _files(pid: int) -> set[str]:
    return {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}
