"""What ssh-audit, a checker of others, has to say of both our SSH servers."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def _serving(which: str, algorithms: str, directory: Path) -> Iterator[int]:
    """The port of one of our SSH servers."""
    if which == "tunnel-sshd":
        with contextlib.closing(Server(directory, algorithms)) as server:
            yield server.port
    else:  # it connects more often than one address may
        env = {"KOHAKURIVER_MAX_HANDSHAKES": "1000", "KOHAKURIVER_SSH_ALGORITHMS": algorithms}
        with a_cluster(directory, env=env) as cluster:
            yield int(cluster.host.ready["ssh_proxy"].rpartition(":")[2])


@pytest.mark.parametrize("which", ["tunnel-sshd", "the jump host"])
@pytest.mark.parametrize(
    ("algorithms", "expected"), [("all", FOR_OLD_CLIENTS | UNDER_FIPS), ("newest", set())], ids=["all", "newest"]
)
def test_ssh_audit_finds_nothing_but_what_old_clients_and_those_under_fips_need_and_nothing_at_all_of_the_newest(
    tmp_path: Path, which: str, algorithms: str, expected: set[tuple[str, str, str]]
) -> None:
    with _serving(which, algorithms, tmp_path) as port:
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
    assert found == expected
    assert [report["kex"][0]["algorithm"], report["key"][0]["algorithm"]] == ["mlkem768x25519-sha256", "ssh-ed25519"]
    assert not report["cves"]
