"""Which ports listen in tasks: their tunnel clients are asked while somebody wants to know, once for all who do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

from kohakuriver.backends import kind_of
from kohakuriver.errors import UnavailableError
from kohakuriver.relay.legs import PORTS_SECONDS, TunnelLeg
from kohakuriver.task import ListeningPort
from kohakuriver.text import printable
from kohakuriver.tunnel.protocol import PROTO_UDP, BoundPort, PortsAnswer, PortScope

__all__ = ["FRESH_SECONDS", "LONGEST_NAME", "OpenPorts", "TaskSockets"]

FRESH_SECONDS = 1.0
"""For so long one look is the answer to everybody who asks."""

LONGEST_NAME = 40
"""Characters of a program's name that are told."""

Look = asyncio.Task[dict[str, Any]]


@dataclass(frozen=True)
class TaskSockets:
    """Which sockets are a task's, as its tunnel client is asked for them; `mark` is of scope OWN.

    What listens on the addresses `hidden` is there for the container and none of its services.
    """

    scope: PortScope = PortScope.NETWORK
    mark: bytes = b""
    hidden: Collection[str] = ()


class Listening(Protocol):
    """A task whose ports are asked for; `dialled` says that it has no tunnel client of its own."""

    @property
    def container(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def ssh_port(self) -> int | None: ...
    @property
    def dialled(self) -> bool: ...


T = TypeVar("T", bound=Listening)


class OpenPorts(Generic[T]):
    """Looks at most once a second at one task, however many ask.

    Args:
        task_of: the task with a container id; raises NotFoundError.
        sockets: which sockets are a task's; may raise KohakuRiverError where that can't be said.
        tunnel_of: a container's tunnel, None where none is connected.
    """

    def __init__(
        self,
        task_of: Callable[[str], T],
        sockets: Callable[[T], Awaitable[TaskSockets]],
        tunnel_of: Callable[[str], TunnelLeg | None],
    ) -> None:
        self._task_of = task_of
        self._sockets = sockets
        self._tunnel_of = tunnel_of
        self._looks: dict[TunnelLeg, Look] = {}

    async def of(self, container: str) -> dict[str, Any]:
        """`ports` (each a ListeningPort) and `more`, whether there are some that are not told.

        Raises NotFoundError, or UnavailableError with why it can't be known.
        """
        task = self._task_of(container)
        tunnel = self._tunnel(task)
        look = self._looks.get(tunnel)
        if look is None:
            look = self._looks[tunnel] = asyncio.get_running_loop().create_task(self._look(task, tunnel))
            look.add_done_callback(lambda look: self._looked(tunnel, look))
        return await asyncio.shield(look)

    def _looked(self, tunnel: TunnelLeg, look: Look) -> None:
        """What was found is good for a while; what went wrong may be well at the next try."""
        if look.cancelled() or look.exception() is not None:
            self._looks.pop(tunnel, None)
        else:
            asyncio.get_running_loop().call_later(FRESH_SECONDS, self._looks.pop, tunnel, None)

    def _tunnel(self, task: Listening) -> TunnelLeg:
        """The tunnel whose client can be asked. Raises UnavailableError."""
        tunnel = self._tunnel_of(task.container)
        if tunnel is None and kind_of(task.backend).dialled:
            raise _unknown(
                f"Task {task.name} is a machine in which no tunnel client runs that could look which ports listen; "
                f"`kohakuriver vps agent-command {task.name}` starts one there."
            )
        if tunnel is None and task.dialled:
            raise _unknown(
                f"In the container of task {task.name} runs no tunnel client that could look which ports listen; "
                "forward one by its number."
            )
        if tunnel is None:
            raise UnavailableError(
                f"The tunnel of task {task.name} is not connected; is the task running?", code="tunnel_not_connected"
            )
        if tunnel.version < 2:
            raise _unknown(
                f"The tunnel client of task {task.name} is of version 1 and can't tell which ports listen; forward one "
                "by its number."
            )
        return tunnel

    async def _look(self, task: T, tunnel: TunnelLeg) -> dict[str, Any]:
        sockets = await self._sockets(task)
        try:
            answer = await tunnel.ask_ports(sockets.scope, sockets.mark)
        except asyncio.TimeoutError:
            raise UnavailableError(
                f"The tunnel client of task {task.name} did not say within {PORTS_SECONDS:g} s which ports listen; try "
                "again, and restart the task if that does not help.",
                code="no_answer",
                status=504,
            ) from None
        except ConnectionError:
            raise UnavailableError(
                f"The tunnel client of task {task.name} went away while it was asked; try again.",
                code="tunnel_not_connected",
            ) from None
        if answer is None:
            raise _unknown(
                f"The tunnel client of task {task.name} gave an answer that makes no sense; restart the task."
            )
        return _told(task, sockets, answer)


def _told(task: Listening, sockets: TaskSockets, answer: PortsAnswer) -> dict[str, Any]:
    """What users hear of an answer: everything but what we ourselves have put into the task, in order."""
    ports = dict.fromkeys(
        _shown(port)
        for port in sorted(answer.ports, key=lambda each: (each.port, each.proto, each.address.version, each.address))
        if str(port.address) not in sockets.hidden and not _is_ssh_server(task, port)
    )
    return {"ports": [asdict(port) for port in ports], "more": answer.more}


def _is_ssh_server(task: Listening, port: BoundPort) -> bool:
    return port.port == task.ssh_port and port.proto != PROTO_UDP and port.address.is_loopback


def _shown(port: BoundPort) -> ListeningPort:
    name = printable(port.program.decode("utf-8", "replace"), keep="")[:LONGEST_NAME]
    proto = "udp" if port.proto == PROTO_UDP else "tcp"
    return ListeningPort(port.port, proto, str(port.address), name or None)  # type: ignore[arg-type]


def _unknown(sentence: str) -> UnavailableError:
    return UnavailableError(sentence, code="ports_unknown")
