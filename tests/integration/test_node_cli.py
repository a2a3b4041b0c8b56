"""`kohakuriver node …` with a real host and real runners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import forked
from tests.support.processes import PATIENCE, Cluster, a_cluster, eventually

ADVICE = "check that its runner runs and that the host can use its address (`kohakuriver runner --advertise-url`)."
SLEEP = (sys.executable, "-c", "import time; time.sleep(1000)")


def run(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
    return forked.run(arguments, env=environment, stdin="", timeout=PATIENCE)


def test_a_runner_that_the_host_can_not_dial_is_shown_unreachable_and_online_when_it_can(
    tmp_path: Path, unused_ports: list[int]
) -> None:
    with a_cluster(tmp_path) as cluster:
        wrong = f"http://127.0.0.1:{unused_ports[0]}"
        runner = cluster.start_runner("n1", "--advertise-url", wrong)
        eventually(lambda: (cluster.node("n1") or {})["status"] == "unreachable")
        shown = run(cluster, "node", "list")
        assert "unreachable" in shown.stdout
        assert f"n1 at {wrong}: The host can't reach node n1: Connection refused; {ADVICE}\n" in shown.stderr
        assert "can't be reached from here" in cluster.host.log.read_text()
        eventually(lambda: "the host can't reach this node" in runner.log.read_text())
        runner.end()
        cluster.start_runner("n1")
        eventually(lambda: (cluster.node("n1") or {})["status"] == "online")


def test_a_node_is_drained_and_removed_and_says_what_is_lost(tmp_path: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        runner = cluster.start_runner("n1", "--backend", "process")
        cluster.create(*SLEEP, name="web")
        drained = run(cluster, "node", "drain", "n1")
        assert (drained.returncode, drained.stdout) == (0, "Node n1 gets no new tasks. Still there: web.\n")
        assert "online, cordoned" in run(cluster, "node", "list").stdout
        refused = run(cluster, "vps", "create", "--backend", "process", "--", *SLEEP)
        assert (refused.returncode, "node uncordon n1" in refused.stderr) == (4, True)
        drained = run(cluster, "node", "drain", "n1", "--stop", "--json")
        assert (drained.returncode, json.loads(drained.stdout)["left"]) == (0, [])
        assert cluster.task("web")["status"] == "stopped"
        assert run(cluster, "node", "rm", "n1").returncode == 1
        runner.end()
        refused = run(cluster, "node", "rm", "n1")
        assert (refused.returncode, "1 task: web;" in refused.stderr) == (1, True)
        removed = run(cluster, "vps", "rm", "web")
        assert "Node n1 is away: what still runs of it there goes on" in removed.stdout
        assert run(cluster, "node", "rm", "n1").stdout == "Removed node n1.\n"
        assert cluster.node("n1") is None
