"""What a container runs: its image's own program as `docker run` puts it together, or what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kohakuriver.runner.services.state import TaskRecord

__all__ = ["Program", "program_of"]


class Program(NamedTuple):
    """A program and its arguments, none where the container just stays up.

    `open_stdin`: its input stays open and empty, where a shell or an interpreter waits. Else it is at its end at once.
    """

    words: list[str]
    open_stdin: bool


def program_of(task: TaskRecord, image: Mapping[str, Any]) -> Program:
    """What a task's container runs, whose image's configuration is `image`, in the engine's words.

    As with docker, a command of the task's own takes the place of the image's CMD, and so does another entrypoint.
    """
    entrypoint = task.entrypoint
    default = [] if entrypoint is not None else image.get("Cmd") or []
    first = image.get("Entrypoint") or [] if entrypoint is None else entrypoint
    return Program([*first, *(task.command or default)], open_stdin=not task.command)
