"""Schemathesis on the HTTP API of a real host with a real node, by its OpenAPI: `python -m tests.conformance.api_fuzz`.

It goes through all operations without a credential, as a user and as a node. The node runs nothing: it only takes
addresses, so that no made-up command is ever started.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.hops import ROOT
from tests.support.processes import Cluster, a_cluster

CHECKS = "not_a_server_error,documented_error"

# What is tried here is what the API takes, not how often.
UNLIMITED = {"KOHAKURIVER_MAX_REQUESTS": "0", "KOHAKURIVER_MAX_FAILURES": "0"}


def run(cluster: Cluster, token: str | None, examples: int) -> int:
    """One pass over the API; the exit code of schemathesis."""
    argv = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{cluster.url}/openapi.json"]
    argv += ["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--seed", "1", "--generation-database=none"]
    argv += ["--max-examples", str(examples), "--request-timeout", "30", "--no-color", "--max-failures", "5"]
    argv += ["--exclude-path", "/api/events"]  # its answer goes on for as long as somebody reads it
    argv += ["--header", f"Authorization: Bearer {token}"] if token else []
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.conformance.api_checks", "PYTHONPATH": str(ROOT)}
    return subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=20, help="of each operation")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="kohakuriver-api-") as directory,
        a_cluster(Path(directory), env=UNLIMITED) as cluster,
    ):
        cluster.start_runner("n1", "--backend", "address")
        node_token = (cluster.host_state / "node-token").read_text().strip()
        status, task = cluster.call("POST", "/api/tasks/adopt", {"address": "192.0.2.1", "name": "known"})
        assert status == 201, task
        assert cluster.call("POST", "/api/users", {"name": "n1"})[0] == 201  # as the node: one known name for both
        codes = [run(cluster, token, options.examples) for token in (None, cluster.token, node_token)]
        assert cluster.host.process.poll() is None, "the host has ended"
        print((Path(directory) / "host.log").read_text()[-4000:], file=sys.stderr)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
