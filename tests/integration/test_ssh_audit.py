"""What ssh-audit, a checker of others, has to say of both our SSH servers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_sshd_asyncssh import Server
from tests.support.processes import PATIENCE, a_cluster

# These exchanges are for clients older than OpenSSH 9.9, which know no other that we have: the hybrid one goes first.
NOT_QUANTUM_SAFE = "does not provide protection against post-quantum attacks"
FOR_OLD_CLIENTS = ("curve25519-sha256", "curve25519-sha256@libssh.org")


@pytest.fixture(params=["tunnel-sshd", "the jump host"])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    if request.param == "tunnel-sshd":
        server = Server(tmp_path)
        yield server.port
        server.close()
    else:  # it connects more often than one address may
        with a_cluster(tmp_path, env={"KOHAKURIVER_MAX_HANDSHAKES": "1000"}) as cluster:
            yield int(cluster.host.ready["ssh_proxy"].rpartition(":")[2])


def test_ssh_audit_finds_nothing_to_fail_and_warns_of_nothing_but_what_old_clients_need(port: int) -> None:
    argv = [sys.executable, "-m", "ssh_audit", "--skip-rate-test", "-j", "-p", str(port), "127.0.0.1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=3 * PATIENCE, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["kex"][0]["algorithm"] == "mlkem768x25519-sha256"
    found = [
        (level, each["algorithm"], note)
        for kind in ("kex", "key", "enc", "mac")
        for each in report[kind]
        for level in ("fail", "warn")
        for note in each["notes"].get(level, [])
    ]
    expected = [("warn", name, NOT_QUANTUM_SAFE) for name in FOR_OLD_CLIENTS if name in str(report["kex"])]
    assert found == expected
    assert {each["algorithm"] for each in report["key"]} == {"ssh-ed25519"}
    assert not report["cves"]
