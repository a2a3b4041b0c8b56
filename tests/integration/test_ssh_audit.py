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

# For clients older than OpenSSH 9.9, which know no other exchange that we have: the hybrid one goes first.
NOT_QUANTUM_SAFE = "does not provide protection against post-quantum attacks"
FOR_OLD_CLIENTS = {
    ("warn", "curve25519-sha256", NOT_QUANTUM_SAFE),
    ("warn", "curve25519-sha256@libssh.org", NOT_QUANTUM_SAFE),
    # For libssh2 before 1.11, which takes no other MAC.
    ("warn", "hmac-sha2-256", "using encrypt-and-MAC mode"),
    ("warn", "hmac-sha2-512", "using encrypt-and-MAC mode"),
}
# For clients whom FIPS 140 leaves no other. ssh-audit fails every server that has NIST's curves, whoever asks for them.
SUSPECTED = "using elliptic curves that are suspected as being backdoored by the U.S. National Security Agency"
UNDER_FIPS = {
    ("fail", "ecdh-sha2-nistp256", SUSPECTED),
    ("warn", "ecdh-sha2-nistp256", NOT_QUANTUM_SAFE),
    ("fail", "ecdsa-sha2-nistp256", SUSPECTED),
    ("warn", "ecdsa-sha2-nistp256", "using weak random number generator could reveal the key"),
}


@pytest.fixture(params=["tunnel-sshd", "the jump host"])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    if request.param == "tunnel-sshd":
        server = Server(tmp_path)
        yield server.port
        server.close()
    else:  # it connects more often than one address may
        with a_cluster(tmp_path, env={"KOHAKURIVER_MAX_HANDSHAKES": "1000"}) as cluster:
            yield int(cluster.host.ready["ssh_proxy"].rpartition(":")[2])


def test_ssh_audit_finds_nothing_but_what_old_clients_and_those_under_fips_need(port: int) -> None:
    argv = [sys.executable, "-m", "ssh_audit", "--skip-rate-test", "-j", "-p", str(port), "127.0.0.1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=3 * PATIENCE, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    found = {
        (level, each["algorithm"], note)
        for kind in ("kex", "key", "enc", "mac")
        for each in report[kind]
        for level in ("fail", "warn")
        for note in each["notes"].get(level, [])
    }
    assert found == FOR_OLD_CLIENTS | UNDER_FIPS
    assert [report["kex"][0]["algorithm"], report["key"][0]["algorithm"]] == ["mlkem768x25519-sha256", "ssh-ed25519"]
    assert not report["cves"]
