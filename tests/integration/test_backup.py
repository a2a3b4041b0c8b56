"""Backup and restore as docs/guide/operations.md has them: its own commands, run on what a host really keeps."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest

from tests.support.postgres import Postgres, a_server
from tests.support.up import Apart, connect, echoes

GUIDE = Path(__file__).resolve().parents[2] / "docs/guide/operations.md"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with a_server() as server:
        yield server


class Guide:
    """The guide's commands, with a cluster's own places in the place of the guide's."""

    def __init__(self, cluster: Apart, database: str) -> None:
        self._cluster = cluster
        self.state = cluster.directory / "host"
        self.backups = cluster.directory / "backups"
        self.backups.mkdir(mode=0o700)
        self._database = database

    def follow(self, section: str, about: str) -> None:
        """Do what the block under a heading says that has `about` in it. systemctl is ours: it stops and starts."""
        text = re.split(rf"^## {section}$", GUIDE.read_text("utf-8"), flags=re.M)[1].split("\n## ")[0]
        (block,) = [block for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) if about in block]
        lines = block.replace("/var/lib/kohakuriver", str(self.state)).splitlines()
        if lines[0] == "systemctl stop kohakuriver-host":
            assert lines[-1] == "systemctl start kohakuriver-host"
            self._cluster.host.stop()
            self._lose_everything()
            self._run(lines[1:-1])
            self._cluster.start_host()
        else:
            self._run(lines)

    def _lose_everything(self) -> None:
        shutil.rmtree(self.state)
        self.state.mkdir(mode=0o700)

    def _run(self, lines: list[str]) -> None:
        script = "\n".join(lines).replace("/var/backups/kohakuriver", str(self.backups))
        environment = {**os.environ, "KOHAKURIVER_DATABASE": self._database}
        done = subprocess.run(["bash", "-euxc", script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def key_of_jump_host(address: str) -> bytes:
    async def ask() -> bytes:
        host, _, port = address.rpartition(":")
        key = await asyncssh.get_server_host_key(host, int(port), server_host_key_algs=["ssh-ed25519"])
        assert key is not None
        return key.export_public_key()

    return asyncio.run(ask())


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_what_the_guide_restores_is_as_it_was_and_a_task_that_lived_on_is_reached(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    database = "" if kind == "sqlite" else request.getfixturevalue("postgres").empty_database()
    options = (f"--database={database}",) if database else ()
    cluster = Apart(tmp_path, *options)
    try:
        guide = Guide(cluster, database)
        ann = json.loads(cluster.succeed("user", "add", "ann", "--json"))["token"]
        service = cluster.service()
        cluster.succeed("vps", "share", service.task, "ann")
        key = key_of_jump_host(cluster.environment["KOHAKURIVER_SSH_PROXY"])
        forward = cluster.start("forward", service.task, f"0:{service.port}", "--json", "--path=host")
        with connect(forward.listening()) as before:
            assert echoes(before)
            guide.follow("Backup", ".backup" if kind == "sqlite" else "pg_dump")
            late = json.loads(cluster.succeed("user", "add", "late", "--json"))["token"]
            guide.follow("Restore", "host.db" if kind == "sqlite" else "pg_restore")
            assert echoes(before), "what was open goes on"

        assert key_of_jump_host(cluster.environment["KOHAKURIVER_SSH_PROXY"]) == key
        users = [user["name"] for user in json.loads(cluster.succeed("user", "list", "--json"))["users"]]
        assert users == ["admin", "ann"]
        assert cluster.run("vps", "list", KOHAKURIVER_TOKEN=late).returncode != 0
        as_ann = cluster.start(
            "forward", service.task, f"0:{service.port}", "--json", "--path=host", KOHAKURIVER_TOKEN=ann
        )
        with connect(as_ann.listening()) as connection:
            assert echoes(connection)
        assert json.loads(cluster.succeed("vps", "status", service.task, "--json"))["status"] == "running"
    finally:
        cluster.close()
