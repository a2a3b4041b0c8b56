"""A task in the engine's words: what a new container is made of, what its labels tell, how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiodocker

from kohakuriver.errors import UsageError
from kohakuriver.quotas import in_words
from kohakuriver.runner.backends.docker.bounds import bounds_of
from kohakuriver.runner.backends.docker.engine import TROUBLE, limit
from kohakuriver.runner.backends.docker.program import program_of
from kohakuriver.runner.backends.process.tasks import last_words
from kohakuriver.runner.services.doors import Doors
from kohakuriver.runner.services.gpus import Grant
from kohakuriver.runner.services.ssh_helper import SshHelper
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.tunnel_helper import DOOR, TunnelHelper
from kohakuriver.task import describe_exit

__all__ = ["Description", "ending", "of_runner", "task_in", "task_of"]

NO_GPUS = Grant()

_LABEL_TASK = "kohakuriver.task"
_LABEL_NODE = "kohakuriver.node"
_LABEL_NAME = "kohakuriver.name"
_LABEL_CONTAINER = "kohakuriver.container"
_LABEL_RUNNER = "kohakuriver.runner"
_LABEL_VOLUME = "kohakuriver.volume"
_LABEL_URL = "kohakuriver.tunnel-url"


@dataclass(frozen=True)
class Description:
    """What every new container of a runner has: marks of its `node` and of the runner's `instance`, and programs."""

    node: str
    instance: str
    helper: TunnelHelper
    ssh: SshHelper
    doors: Doors

    def config(self, task: TaskRecord, image: Mapping[str, Any], network: str, gpus: Grant = NO_GPUS) -> dict[str, Any]:
        """What the engine makes the task's container of, on that network; `image` is its image's configuration.

        Raises UnavailableError, UsageError.
        """
        assert task.tunnel_url is not None
        program = program_of(task, image)
        tunnel = self.helper.container_environment(task.container, task.tunnel_url)
        env = {**self.helper.settings, **task.env, **tunnel}
        ours = [*self.helper.mounts(), *(self.ssh.mounts() if task.ssh_keys else [])]
        if task.has_door:
            ours.append((self.doors.folder(task.container), DOOR))
        mounts = [
            {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": True} for source, target in ours
        ]
        return {
            "Image": task.image,
            "Entrypoint": self.helper.container_command(program.words, open_stdin=program.open_stdin),
            "Cmd": [],
            **{key: said for key, said in (("WorkingDir", task.workdir), ("User", task.run_as)) if said},
            "Env": [f"{name}={value}" for name, value in env.items()],
            "Labels": {
                **dict(label.split("=", 1) for label in task.labels),
                _LABEL_TASK: str(task.task_id),
                _LABEL_NAME: task.name,
                _LABEL_NODE: self.node,
                _LABEL_CONTAINER: task.container,
                _LABEL_RUNNER: self.instance,
                _LABEL_URL: task.tunnel_url,
            },
            "HostConfig": {
                "Mounts": [*mounts, *map(_mount, task.mounts), *map(_volume, task.volumes, task.volume_ids)],
                "Devices": [*map(_device, task.devices), *gpus.devices],
                "DeviceRequests": gpus.requests,
                "NetworkMode": network,
                **bounds_of(task),
            },
        }


def of_runner(instance: str) -> str:
    """The label by which a runner knows its containers."""
    return f"{_LABEL_RUNNER}={instance}"


def task_in(labels: dict[str, str]) -> str:
    """Which task, by its name on the tunnel, a container of ours is."""
    return labels[_LABEL_CONTAINER]


def task_of(labels: dict[str, str], show: dict[str, Any]) -> TaskRecord:
    """The task of a container whose record got lost."""
    return TaskRecord(
        task_id=int(labels[_LABEL_TASK]),
        container=labels[_LABEL_CONTAINER],
        backend="docker",
        name=labels[_LABEL_NAME],
        image=show["Config"]["Image"],
        engine_id=show["Id"],
        engine_name=labels[_LABEL_CONTAINER],
        tunnel_url=labels[_LABEL_URL],
    )


async def ending(docker: aiodocker.Docker, task: TaskRecord, state: dict[str, Any]) -> tuple[str, str | None]:
    """Status and message of a task whose container does not run."""
    if task.stopped:
        return "stopped", task.stop_reason
    if state["OOMKilled"]:
        had = f", of which it had {in_words('memory', task.memory)}; --memory gives a task more" if task.memory else ""
        return "failed", f"it ran out of memory{had}"
    if state.get("Error"):
        return "failed", str(state["Error"])
    status, message = describe_exit(state["ExitCode"])
    with contextlib.suppress(*TROUBLE):
        container = docker.containers.container(task.engine_id or task.container)
        message += last_words(
            state["ExitCode"], await container.log(stdout=True, stderr=True, tail=20, timeout=limit())
        )
    return status, message


def _mount(text: str) -> dict[str, Any]:
    """`SRC:DST[:ro]` in the engine's words; SRC is a path on the node or the name of a volume."""
    source, target, *mode = text.split(":")
    if not source.startswith("/") and "/" in source:
        raise UsageError(f"--mount {text}: {source!r} must be a whole path on the node, or a volume's name.")
    kind = "bind" if source.startswith("/") else "volume"
    return {"Type": kind, "Source": source, "Target": target, "ReadOnly": mode == ["ro"]}


def _volume(text: str, volume_id: str) -> dict[str, Any]:
    """`NAME:/TARGET[:ro]` in the engine's words; it makes the volume where that is not there."""
    name, target, *mode = text.split(":")
    labels = {"Labels": {_LABEL_VOLUME: name}}
    return {
        "Type": "volume", "Source": volume_id, "Target": target, "ReadOnly": mode == ["ro"], "VolumeOptions": labels
    }  # fmt: skip


def _device(text: str) -> dict[str, str]:
    """`/dev/NAME[:/dev/INSIDE][:rwm]` in the engine's words."""
    there, *more = text.split(":")
    inside = [part for part in more if part.startswith("/")]
    rights = [part for part in more if not part.startswith("/")]
    return {"PathOnHost": there, "PathInContainer": (inside or [there])[0], "CgroupPermissions": (rights or ["rwm"])[0]}
