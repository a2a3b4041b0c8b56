"""What host and runner tell Prometheus: real programs, and a real Prometheus that reads them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import forked
from tests.support.processes import PATIENCE, Cluster, Program, a_cluster, ask, eventually
from tests.support.prometheus import DEPLOY, prometheus

ECHO = (
    "import socket\n"
    "s = socket.create_server(('127.0.0.1', 0))\n"
    "print(s.getsockname()[1], flush=True)\n"
    "while True:\n"
    " c = s.accept()[0]\n"
    " c.sendall(c.recv(100))\n"
    " c.close()\n"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A host and a runner that both measure, and a task through which something has passed."""
    with a_cluster(tmp_path_factory.mktemp("cluster"), "--metrics", "0") as cluster:
        cluster.start_runner("n1", "--backend", "process", "--metrics", "127.0.0.1:0")
        task = cluster.connected(cluster.create(sys.executable, "-c", ECHO, name="secret-name")["task_id"])
        port = int(eventually(lambda: re.search(r"^(\d+)$", cluster.log_of(task), re.M))[1])
        with cluster.forward("secret-name", port) as forward:
            assert ask(forward.local_port, b"x" * 100) == b"x" * 100
        cluster.call("GET", "/api/tasks/no-such-task")
        with pytest.raises(Exception, match="no-such-task"), cluster.forward("no-such-task", port):
            pass
        yield cluster


def values(program: Program) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The samples that a program gives, by their names."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(httpx.get(program.ready["metrics"], trust_env=False).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float:
    return sum(value for seen, value in found[name] if labels.items() <= seen.items())


def test_a_host_tells_of_sessions_bytes_nodes_tasks_and_its_database(cluster: Cluster) -> None:
    found = values(cluster.host)
    assert value(found, "kohakuriver_bytes_total", kind="forward", direction="to_container") >= 100
    assert value(found, "kohakuriver_sessions", kind="forward") == 0
    assert value(found, "kohakuriver_nodes", state="online") == 1
    assert value(found, "kohakuriver_tasks", status="running") == 1
    assert value(found, "kohakuriver_database_up") == 1
    assert value(found, "kohakuriver_opening_seconds_count", kind="forward", result="ok") == 1
    assert value(found, "kohakuriver_opening_seconds_count", kind="forward", result="not_found") == 1
    assert value(found, "kohakuriver_build_info", program="host") == 1
    assert value(found, "process_open_fds") > 0


def test_a_runner_tells_of_streams_tunnels_tasks_and_backends(cluster: Cluster) -> None:
    found = values(cluster.runners["n1"])
    assert value(found, "kohakuriver_bytes_total", direction="to_user") >= 100
    assert value(found, "kohakuriver_tunnels") == 1
    assert value(found, "kohakuriver_tasks", status="running") == 1
    assert value(found, "kohakuriver_backend_up", backend="process") == 1
    assert value(found, "kohakuriver_opening_seconds_count", kind="forward", result="ok") == 1


def test_no_name_of_a_task_user_or_token_is_among_the_measures(cluster: Cluster) -> None:
    for program in (cluster.host, cluster.runners["n1"]):
        text = httpx.get(program.ready["metrics"], trust_env=False).text
        assert "secret-name" not in text
        assert "no-such-task" not in text
        assert "admin" not in text
    routes = {labels["route"] for labels, _ in values(cluster.host)["kohakuriver_http_request_seconds_count"]}
    assert "/api/tasks/{task}" in routes


def test_requests_that_nobody_knows_make_no_measures_of_their_own(cluster: Cluster) -> None:
    for number in range(20):
        cluster.http.get(f"/nothing/{number}")
        cluster.http.request(f"ODD{number}", "/health")
    labels = [labels for labels, _ in values(cluster.host)["kohakuriver_http_request_seconds_count"]]
    assert not [label for label in labels if "nothing" in label["route"] or label["method"].startswith("ODD")]


def test_nothing_but_the_measures_is_served_there_and_nothing_of_them_elsewhere(cluster: Cluster) -> None:
    beside = cluster.host.ready["metrics"].removesuffix("/metrics")
    for path in ("/api/tasks", "/health", "/login", "/"):
        assert httpx.get(beside + path, trust_env=False).status_code == 404
    assert cluster.http.get("/metrics").status_code == 404


def test_a_metrics_address_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken:
        for given, sentence in (
            ("prometheus", "--metrics 'prometheus' has no port; give one, as 9464, or with an address"),
            ("99999", "--metrics '99999' has no port"),
            (f"127.0.0.1:{taken.getsockname()[1]}", "can't be listened on: Address already in use."),
        ):
            options = ("host", "--state-dir", str(tmp_path / "host"), "--port", "0", "--ssh-port", "0")
            refused = forked.run(
                (*options, "--bind", "127.0.0.1", "--metrics", given), env=dict(os.environ), stdin="", timeout=PATIENCE
            )
            assert refused.returncode != 0
            assert sentence in refused.stderr
            assert len(refused.stderr.splitlines()) == 1


def test_a_real_prometheus_reads_both_programs_and_evaluates_the_alert_rules(cluster: Cluster, tmp_path: Path) -> None:
    with prometheus(cluster, "n1", tmp_path) as url:
        _see(f"{url}/api/v1")


def _see(api: str) -> None:
    def asked(path: str, **query: str) -> Any:
        try:
            answer = httpx.get(f"{api}/{path}", params=query, trust_env=False)
        except httpx.TransportError:
            return None  # it has not begun to listen
        return answer.json()["data"] if answer.status_code == 200 else None

    def up() -> set[str]:
        found = (asked("query", query="up == 1") or {}).get("result", [])
        return {seen["metric"]["job"] for seen in found}

    eventually(lambda: up() == {"kohakuriver-host", "kohakuriver-runner"})
    eventually(lambda: all(rule["health"] == "ok" for group in asked("rules")["groups"] for rule in group["rules"]))
    rules = [rule for group in asked("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    for expression in _expressions():
        assert asked("query", query=expression) is not None, expression
    names = {name for name in asked("label/__name__/values") if name.startswith("kohakuriver_")}
    used = set(re.findall(r"kohakuriver_\w+", " ".join(_expressions())))
    assert used <= names, used - names


def _expressions() -> list[str]:
    """Those of the dashboard and of the rules, with what Grafana and rules fill in."""
    panels = json.loads((DEPLOY / "grafana/kohakuriver.json").read_text())["panels"]
    return [target["expr"].replace("$__rate_interval", "1m") for panel in panels for target in panel["targets"]]


def test_every_alert_is_raised_by_what_it_is_for_and_not_otherwise() -> None:
    told = subprocess.run(
        ("promtool", "test", "rules", "kohakuriver.rules.test.yml"),
        cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
