"""The unit files under deploy/: systemd takes them, and what it can keep from a program is kept from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy/systemd"
MOST_EXPOSED = {"host": 1.5, "runner": 6.8}  # a runner has the engine, so it has the node, and rules that fence it off
FENCE = "from kohakuriver.runner.backends.docker import fence; fence._put_up('lo', '127.0.0.1', True)"
programs = pytest.mark.parametrize("program", sorted(MOST_EXPOSED))


def unit(program: str) -> Path:
    return UNITS / f"kohakuriver-{program}.service"


def analyze(*arguments: str) -> str:
    told = subprocess.run(("systemd-analyze", *arguments), capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout + told.stderr


@programs
def test_systemd_takes_the_unit_as_it_is(program: str, tmp_path: Path) -> None:
    # It looks for the program, which is installed nowhere here.
    here = tmp_path / unit(program).name
    here.write_text(unit(program).read_text().replace("/opt/kohakuriver/bin/kohakuriver", "/bin/true"))
    assert analyze("verify", str(here)) == ""


@programs
def test_the_unit_is_no_more_exposed_than_it_has_to_be(program: str) -> None:
    told = analyze("security", "--offline=true", str(unit(program)))
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert exposure is not None, told
    assert float(exposure[1]) <= MOST_EXPOSED[program]


@programs
def test_the_options_of_the_unit_are_those_of_the_command(program: str) -> None:
    commands = re.findall(r"^ExecStart=\S+ (\w+) (.*)$", unit(program).read_text(), re.M)
    assert [name for name, _ in commands] == [program]
    text = (ROOT / "docs/cli.md").read_text("utf-8")
    for option in re.findall(r"--[\w-]+", commands[0][1]):
        assert option in text


@pytest.mark.skipif(os.geteuid() != 0, reason="rules of the packet filter take root")
@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_a_runner_with_the_rights_of_its_unit_can_fence_containers_off(kind: str, tmp_path: Path) -> None:
    path = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
    programs = shutil.which(f"xtables-{kind}-multi", path=path)
    assert programs, "iptables is not installed: run scripts/system-packages test"
    for name in ("iptables", "iptables-restore", "ip6tables", "ip6tables-restore"):
        (tmp_path / name).symlink_to(programs)
    rights = re.search(r"^CapabilityBoundingSet=(.+)$", unit("runner").read_text(), re.M)
    assert rights is not None
    bounds = ",".join(f"+{right.removeprefix('CAP_').lower()}" for right in rights[1].split())
    command = ("unshare", "--net", "setpriv", f"--bounding-set=-all,{bounds}", sys.executable, "-c", FENCE)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{path}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
