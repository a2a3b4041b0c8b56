"""One request through all programs: its id in every log, and its trace at a collector."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
from tests.support.processes import PATIENCE, Cluster, a_cluster, eventually
from tests.support.services import echo, port_in

JSON = {"KOHAKURIVER_LOG_FORMAT": "json"}


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def opened(log: Path) -> list[str]:
    """The ids of the requests by which sessions were opened."""
    return [line["request_id"] for line in lines(log) if line["event"] == "session opened"]


def run(cluster: Cluster, *arguments: str, **environment: str) -> tuple[int, str]:
    """A command's exit code and stderr."""
    own = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token, **environment}
    done = forked.run(arguments, env=own, stdin="", timeout=PATIENCE)
    return done.returncode, done.stderr


def echo_task(cluster: Cluster) -> tuple[str, int]:
    task = cluster.create(*echo())
    return task["name"], eventually(lambda: port_in(cluster.log_of(task)))


def test_a_commands_request_has_one_id_in_the_logs_of_host_and_runner_and_in_the_audit_log(tmp_path: Path) -> None:
    with a_cluster(tmp_path, env=JSON) as cluster:
        runner = cluster.start_runner("n1", "--backend", "process", env=JSON)
        task, port = echo_task(cluster)
        code, said = run(cluster, "forward", task, f"0:{port}", "--path=host", "--", "true", **JSON)
        assert code == 0, said
        (known,) = opened(cluster.host.log)
        assert re.fullmatch(r"[0-9a-f]{32}", known)
        assert opened(runner.log) == [known]
        assert {json.loads(line)["request_id"] for line in said.splitlines()} == {known}
        events = cluster.call("GET", "/api/audit")[1]["events"]
        assert [event["request_id"] for event in events if event["event"] == "session_opened"] == [known]


def test_an_error_that_is_no_fault_of_the_users_is_told_with_the_id_that_the_hosts_log_has(tmp_path: Path) -> None:
    with a_cluster(tmp_path, env=JSON) as cluster:
        runner = cluster.start_runner("n1", "--backend", "process")
        task, _ = echo_task(cluster)
        runner.end(signal.SIGKILL)
        code, said = run(cluster, "connect", task, "--", "true")
        assert code == 4
        told = re.search(r"^Error: .* \(request ([0-9a-f]{32})\)$", said, re.M)
        assert told is not None, said
        assert told[1] in {line.get("request_id") for line in lines(cluster.host.log) if "refused" in line["event"]}
        code, said = run(cluster, "forward", "none-such", "0:80", "--", "true")
        assert code == 3
        assert "request" not in said


@contextmanager
def a_collector() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address for OTLP over HTTP, and the spans that come there."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            sent = ExportTraceServiceRequest()
            sent.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for of in sent.resource_spans:
                about = {each.key: each.value.string_value for each in of.resource.attributes}
                for span in (span for scope in of.scope_spans for span in scope.spans):
                    ids = {"trace": span.trace_id.hex(), "id": span.span_id.hex(), "parent": span.parent_span_id.hex()}
                    result = {"error": span.status.message}
                    spans.append({"service": about["service.name"], "name": span.name, **ids, **result})
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_request(self, *_about: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", spans
        finally:
            server.shutdown()
            serving.join()


CHAIN = [
    ("kohakuriver-command", "open a session at the host"),
    ("kohakuriver-host", "GET /ws/forward/{task_id}/{port}"),
    ("kohakuriver-host", "open a session at the runner"),
    ("kohakuriver-runner", "GET /ws/forward/{container}/{port}"),
]


def test_a_collector_is_told_how_a_session_was_opened_from_the_command_to_the_runner(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    with a_collector() as (url, spans):
        traced = {**JSON, "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "50", "NO_PROXY": "127.0.0.1"}
        with a_cluster(tmp_path, env=traced) as cluster:
            cluster.start_runner("n1", "--backend", "process", env=traced)
            task, port = echo_task(cluster)
            assert run(cluster, "forward", task, f"0:{port}", "--path=host", "--", "true", **traced)[0] == 0
            (trace,) = opened(cluster.host.log)
            of_ours = eventually(
                lambda: found if len(found := [span for span in spans if span["trace"] == trace]) >= 5 else None
            )
            parent = ""
            for service, name in CHAIN:
                (step,) = [span for span in of_ours if (span["service"], span["name"]) == (service, name)]
                assert step["parent"] == parent, name
                assert step["error"] == ""
                parent = step["id"]
            # A command that traces nothing: the host's trace begins there, and has the id of the request all the same.
            assert run(cluster, "connect", task, "--", "true", OTEL_SDK_DISABLED="true")[0] == 0
            first = eventually(lambda: next((s for s in spans if s["trace"] == opened(cluster.host.log)[1]), None))
            assert first["service"] != "kohakuriver-command"
