"""The address backend: a virtual machine, or any host that the runner reaches. The runner dials it itself."""

from __future__ import annotations

from collections.abc import Callable

from kohakuriver.errors import UnavailableError
from kohakuriver.relay.direct import DirectTarget
from kohakuriver.runner.backends.base import Backend, ExecRequest, ExecSession, Reporter, Surroundings
from kohakuriver.runner.backends.printed import LogRequest, Printed
from kohakuriver.runner.services.state import TaskRecord

__all__ = ["AddressBackend"]


class AddressBackend(Backend):
    """Nothing to start and nothing to end: a task is an IP address."""

    name = "address"

    def __init__(self, report: Reporter) -> None:
        self._report = report

    @classmethod
    def made(cls, around: Surroundings) -> AddressBackend:
        return cls(around.report)

    async def open(self, tasks: list[TaskRecord], found: Callable[[TaskRecord], None]) -> None:
        for task in tasks:
            self._report(task.container, "running")

    async def start(self, task: TaskRecord) -> None:
        await self.adopt(task)

    async def adopt(self, task: TaskRecord) -> TaskRecord:
        self._report(task.container, "running")
        return task

    async def stop(self, task: TaskRecord) -> None:
        raise _not_ours(task)

    async def start_again(self, task: TaskRecord) -> None:
        raise _not_ours(task)

    async def remove(self, task: TaskRecord) -> None:
        pass

    def target(self, task: TaskRecord) -> DirectTarget | None:
        return DirectTarget(task.address)

    async def exec(self, task: TaskRecord, request: ExecRequest) -> ExecSession:
        raise UnavailableError(
            f"Task {task.name} is the address {task.address}, and kohakuriver runs nothing there; "
            f"if it has an SSH server, use `kohakuriver vps connect {task.name}`.",
            code="not_supported",
        )

    async def logs(self, task: TaskRecord, request: LogRequest) -> Printed:
        raise UnavailableError(
            f"Task {task.name} is the address {task.address}, and kohakuriver runs nothing there that prints; "
            "what its services print is in that machine's own logs.",
            code="not_supported",
        )

    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        pass


def _not_ours(task: TaskRecord) -> UnavailableError:
    return UnavailableError(
        f"Task {task.name} is the address {task.address}, and kohakuriver can't stop or restart what runs there; "
        f"`kohakuriver vps rm {task.name}` ends the task alone.",
        code="not_supported",
    )
