"""What a container runs: as docker puts ENTRYPOINT, CMD and what was asked for together."""

from __future__ import annotations

from typing import Any

import pytest

from kohakuriver.runner.backends.docker.program import program_of
from kohakuriver.runner.services.state import TaskRecord

SERVER = {"Entrypoint": ["/start"], "Cmd": ["serve", "-v"]}


@pytest.mark.parametrize(
    ("image", "asked", "words"),
    [
        (SERVER, {}, ["/start", "serve", "-v"]),
        (SERVER, {"command": ["help"]}, ["/start", "help"]),
        (SERVER, {"entrypoint": ["/other"]}, ["/other"]),
        (SERVER, {"entrypoint": ["/other"], "command": ["x"]}, ["/other", "x"]),
        (SERVER, {"entrypoint": []}, []),
        (SERVER, {"entrypoint": [], "command": ["x"]}, ["x"]),
        ({"Entrypoint": None, "Cmd": ["bash"]}, {}, ["bash"]),
        ({"Entrypoint": ["/start"]}, {}, ["/start"]),
        ({}, {"command": ["x"]}, ["x"]),
        ({}, {}, []),
    ],
)
def test_a_container_runs_what_docker_would_run(image: dict[str, Any], asked: dict[str, Any], words: list[str]) -> None:
    task = TaskRecord(task_id=1, container="kohakuriver-vps-1", backend="docker", **asked)
    program = program_of(task, image)
    assert program.words == words
    assert program.open_stdin == ("command" not in asked)
