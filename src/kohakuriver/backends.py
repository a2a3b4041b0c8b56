"""Ways of running a task, declared once: what each is called and what it can do.

Host, command line and runner all go by this. The command line loads it too, so it needs only the standard library.
How to add one: CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BACKENDS", "BackendKind", "adopting", "by_default", "kind_of", "known", "making", "making_images", "names"]


@dataclass(frozen=True)
class BackendKind:
    """One way of running a task, and what can be done with it.

    Attributes:
        container: a task's id on the tunnel, with {} for the task's number. Source: docs/protocol.md §4.
        advice: what to do where a node does not offer it, as the end of a sentence.
        makes: whether it starts new tasks.
        adopts: what that runs already it can make a task of, if anything.
        image: whether a new task needs an image; without one it may not have one.
        mounts: whether a new task may see directories of the node.
        bounded: whether a task can be kept to an amount of memory, processors, processes and shared memory.
        controls: whether it stops and restarts what runs; one that was adopted, only when that is said.
        terminal: whether commands can be run in a task.
        ssh: whether a task can be given an SSH server.
        own_ssh: whether a task is taken to have an SSH server of its own.
        network: whether a task has a network of its own, so that its ports are nobody else's.
        as_runner: whether its tasks are the runner's own user on the node, with nothing between.
        scheduled: whether a scheduler says when and where a task runs, of which it is asked for memory, processors,
            GPUs and time, as the user whom the node's administrator has named for the task's owner.
        dialled: whether the runner itself dials a task's ports, always.
        dials_in: whether a task is whatever connects to the host as one: no runner has it, and nobody starts it again.
        default: whether a runner offers it where nothing else was said.
    """

    name: str
    container: str
    advice: str
    makes: bool = False
    adopts: Literal["container", "address", "job"] | None = None
    image: bool = False
    mounts: bool = False
    bounded: bool = False
    controls: bool = False
    terminal: bool = False
    ssh: bool = False
    own_ssh: bool = False
    network: bool = False
    as_runner: bool = False
    scheduled: bool = False
    dialled: bool = False
    dials_in: bool = False
    default: bool = False


BACKENDS: dict[str, BackendKind] = {
    kind.name: kind
    for kind in (
        BackendKind(
            name="docker",
            container="kohakuriver-vps-{}",
            advice="check that a Docker engine runs there",
            makes=True,
            adopts="container",
            image=True,
            mounts=True,
            bounded=True,
            controls=True,
            terminal=True,
            ssh=True,
            network=True,
            default=True,
        ),
        BackendKind(
            name="process",
            container="kohakuriver-task-{}",
            advice="start its runner with `--backend process`",
            makes=True,
            as_runner=True,
            controls=True,
            terminal=True,
            ssh=True,
        ),
        BackendKind(
            name="slurm",
            container="kohakuriver-job-{}",
            advice="start a runner with `--backend slurm` where sbatch is",
            makes=True,
            adopts="job",
            controls=True,
            terminal=True,
            scheduled=True,
        ),
        BackendKind(
            name="address",
            container="vm-{}",
            advice="start its runner with `--backend address`",
            adopts="address",
            own_ssh=True,
            network=True,
            dialled=True,
            default=True,
        ),
        BackendKind(
            name="agent",
            container="kohakuriver-agent-{}",
            advice="start `kohakuriver agent` where it is to run",
            terminal=True,
            dials_in=True,
        ),
    )
}


def names() -> list[str]:
    """Those that a runner can have, the most usual first."""
    return [kind.name for kind in BACKENDS.values() if not kind.dials_in]


def kind_of(name: str) -> BackendKind:
    """What a backend can do. Raises ValueError with what is wanted instead."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise ValueError(f"{name!r} is no backend; there are {', '.join(BACKENDS)}") from None


def known(name: str) -> BackendKind:
    """What can be done with a task of that backend; nothing where another version has it, and this one has not."""
    return BACKENDS.get(name) or BackendKind(name, "{}", "use a newer kohakuriver")


def making() -> list[str]:
    """Those that start new tasks."""
    return [kind.name for kind in BACKENDS.values() if kind.makes]


def making_images() -> list[str]:
    """Those of tasks that have an image: what is meant where an image is given, and no backend."""
    return [name for name in making() if BACKENDS[name].image]


def adopting(what: Literal["container", "address", "job"]) -> list[str]:
    """Those that make a task of what runs already."""
    return [kind.name for kind in BACKENDS.values() if kind.adopts == what]


def by_default() -> list[str]:
    """What a runner offers where nothing was said."""
    return [kind.name for kind in BACKENDS.values() if kind.default]
