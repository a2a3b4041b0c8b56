"""The user's tasks and the ports that listen in them, as HTML, for the page without scripts."""

from __future__ import annotations

import asyncio
from html import escape
from urllib.parse import quote

from kohakuriver.errors import KohakuRiverError
from kohakuriver.host.parts import Services
from kohakuriver.host.schemas import Ports
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.tasks import Tasks
from kohakuriver.store import Node, Task
from kohakuriver.task import TaskView

__all__ = ["table_of"]

MOST_SHOWN = 200
"""Tasks that are shown, the newest; `kohakuriver vps list` shows all."""

MOST_LOOKED_INTO = 20
"""Of so many of them it is asked which ports listen; each is a question to a node."""

LOOK_SECONDS = 3.0
"""How long that may take, before the page goes out without it."""

Used = tuple[Task, Node, TaskView]


async def table_of(services: Services, caller: Caller, host: str) -> str:
    """The tasks that a user may use, as HTML, for a browser that is at the host by what `Host` says."""
    tasks = services.tasks
    used = (await tasks.used_by(caller))[::-1]
    if not used:
        return "<p>There is no task yet: <code>kohakuriver vps create</code> makes one.</p>\n"
    running = [each for each in used if each[2].status == "running"][:MOST_LOOKED_INTO]
    listening = await asyncio.gather(*(_look(tasks, task, node) for task, node, _ in running))
    ports = {view.task_id: found for (_, _, view), found in zip(running, listening, strict=True)}
    there = services.apps.reached_from(host)
    rows = "".join(_row(view, ports.get(view.task_id), there=there) for _, _, view in used[:MOST_SHOWN])
    more = f"<p>And {len(used) - MOST_SHOWN} older ones.</p>\n" if len(used) > MOST_SHOWN else ""
    head = "<tr><th scope=col>Task</th><th scope=col>Status</th><th scope=col>Node</th><th scope=col>Ports</th></tr>\n"
    return f"<table>\n{head}{rows}</table>\n{more}"


async def _look(tasks: Tasks, task: Task, node: Node) -> Ports | None:
    """What listens in a task; None where that can't be told soon."""
    try:
        return await asyncio.wait_for(tasks.ports(task, node), LOOK_SECONDS)
    except (KohakuRiverError, asyncio.TimeoutError):
        return None


def _row(view: TaskView, found: Ports | None, *, there: bool) -> str:
    ways = "".join(
        f"<li>{_way_to(view, port, there=there)}{escape(f' ({program})' if program else '')}</li>"
        for port, program in _tcp(found)
    )
    ports = f"<ul>{ways}</ul>" if ways else "" if found is None else "none"
    cells = (escape(view.name), escape(view.status), escape(view.node), ports)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def _way_to(view: TaskView, port: int, *, there: bool) -> str:
    """A link to the address of a port at the host; where none leads there, the command that opens it."""
    if there:
        return f'<a href="/open/{quote(view.name, safe="")}/{port}">Open {port}</a>'
    return f"<code>kohakuriver open {escape(view.name)} {port}</code>"


def _tcp(found: Ports | None) -> list[tuple[int, str]]:
    """TCP ports, each once, with the program that has it, "" where that is not known."""
    listening = [] if found is None else [port for port in found.ports if port.proto == "tcp"]
    return sorted({port.port: port.program or "" for port in listening}.items())
