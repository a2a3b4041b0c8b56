"""A real Prometheus that reads host and runner, as deploy/ configures it."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import Cluster, eventually

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

_LISTENS = re.compile(r'msg="Listening on" address=(\S+:\d+)')


@contextlib.contextmanager
def prometheus(cluster: Cluster, runner: str, directory: Path) -> Iterator[str]:
    """Its URL. It looks each second, and evaluates the alert rules; everything of it is in `directory`."""
    config = (DEPLOY / "prometheus/prometheus.yml").read_text()
    for port, program in (("9464", cluster.host), ("9465", cluster.runners[runner])):
        address = program.ready["metrics"].removeprefix("http://").removesuffix("/metrics")
        config = config.replace(f"127.0.0.1:{port}", address)
    (directory / "prometheus.yml").write_text(config.replace("15s", "1s"))
    shutil.copy(DEPLOY / "prometheus/kohakuriver.rules.yml", directory)
    command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    path = directory / "log"
    with (
        path.open("w") as log,
        subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log) as running,
    ):
        try:
            yield f"http://{eventually(lambda: _LISTENS.search(path.read_text()))[1]}"
            assert running.poll() is None, path.read_text()
        finally:
            running.terminate()
