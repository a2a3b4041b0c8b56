"""What host and runner log, as programs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.processes import a_cluster


def test_host_and_runner_log_nothing_but_json_where_that_is_asked_for(tmp_path: Path) -> None:
    with a_cluster(tmp_path, env={"KOHAKURIVER_LOG_FORMAT": "json"}) as cluster:
        runner = cluster.start_runner("n1", "--log-format", "json")
        assert cluster.call("GET", "/api/tasks/none-such")[0] == 404
        for program, event in ((cluster.host, "node registered"), (runner, "registered with the host")):
            lines = [json.loads(line) for line in program.log.read_text().splitlines()]
            assert event in [line["event"] for line in lines]
            assert all(line["time"].endswith("Z") and line["level"] for line in lines)
