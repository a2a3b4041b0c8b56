"""`kohakuriver node …`: the machines of the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import Remote, complete_node, remote
from kohakuriver.errors import KohakuRiverError, NotFoundError

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient, Node, Task

__all__ = ["app"]

app = App(help="The machines that run tasks.", epilog="Example: kohakuriver node list")

NodeArgument = Annotated[
    str,
    typer.Argument(metavar="NODE", help="The node's name.", autocompletion=complete_node, show_default=False),
]


@app.callback()
def _group() -> None:
    """The machines that run tasks."""


@app.command("list", epilog="Example: kohakuriver node list --json")
@remote
def list_nodes(at: Remote) -> None:
    """List the nodes: state, last seen, tasks, GPUs, traffic."""
    nodes = at.ask(lambda client: client.nodes())
    if at.json:
        output.json_line({"nodes": [node.to_json() for node in nodes]})
        return
    output.table(
        ["Name", "Status", "Last seen", "Backends", "Tasks", "GPUs", "Sessions", "Streams", "To tasks", "From tasks"],
        [
            [
                node.name,
                _status(node),
                output.age(node.last_seen),
                ",".join(node.backends) or "-",
                str(node.tasks),
                f"{len(node.gpus_free)} of {len(node.gpus)} free" if node.gpus else "-",
                str(node.traffic.sessions),
                str(node.traffic.streams),
                output.size(node.traffic.bytes_to_container),
                output.size(node.traffic.bytes_to_user),
            ]
            for node in nodes
        ],
    )
    if not nodes:
        output.note("There are no nodes; `kohakuriver runner --host-url URL` makes one of the machine where it runs.")
    for node in nodes:
        for backend, reason in node.unavailable.items():
            output.note(f"Node {node.name} offers no {backend}: {reason}.")
    for node in nodes:
        if node.reason:
            output.note(f"{node.name} at {node.url}: {node.reason}")


@app.command(epilog="Example: kohakuriver node cordon n1")
@remote
def cordon(at: Remote, node: NodeArgument) -> None:
    """Give a node no new tasks; those that it has go on. For admins."""
    _print(at.ask(lambda client: client.cordon(node)), f"Node {node} gets no new tasks.", at.json)


@app.command(epilog="Example: kohakuriver node uncordon n1")
@remote
def uncordon(at: Remote, node: NodeArgument) -> None:
    """Give a node new tasks again. For admins."""
    _print(at.ask(lambda client: client.uncordon(node)), f"Node {node} gets new tasks again.", at.json)


@app.command(epilog="Example: kohakuriver node drain n1 --stop")
@remote
def drain(
    at: Remote,
    node: NodeArgument,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the tasks that it has.")] = False,
) -> None:
    """Give a node no new tasks, and say what still runs there or stop it. For admins.

    A container that was adopted is not stopped; `kohakuriver vps stop --container` does that.
    """
    drained, left, failed = at.ask(lambda client: _drain(client, node, stop))
    if at.json:
        output.json_line({**drained.to_json(), "left": [task.name for task in left]})
    else:
        names = ", ".join(task.name for task in left)
        still = f"Still there: {names}." if left else "It has none any more."
        output.line(f"Node {node} gets no new tasks. {still}")
    for error in failed[1:]:
        output.error(error.message)
    if failed:
        raise failed[0]


async def _drain(client: HostClient, name: str, stop: bool) -> tuple[Node, list[Task], list[KohakuRiverError]]:
    """The node, the tasks that it still runs, and why those were not stopped that should have been."""
    await client.cordon(name)
    left: list[Task] = []
    failed: list[KohakuRiverError] = []
    for task in await client.tasks():
        if task.node != name or task.status not in ("starting", "running"):
            continue
        try:
            if stop:
                await client.stop(str(task.task_id))
                continue
        except KohakuRiverError as error:
            failed.append(error)
        left.append(task)
    node = next((node for node in await client.nodes() if node.name == name), None)
    if node is None:  # somebody has removed it meanwhile
        raise NotFoundError(f"There is no node {name!r}.")
    return node, left, failed


@app.command("rm", epilog="Example: kohakuriver node rm n1")
@remote
def remove(
    at: Remote,
    node: NodeArgument,
    force: Annotated[bool, typer.Option("--force", help="Also where it has tasks: the host forgets them.")] = False,
) -> None:
    """Forget a node that is offline. For admins.

    The node token that it has stays good: revoke one that was made for it alone.
    """
    removed = at.ask(lambda client: client.remove_node(node, force=force))
    lost = f", and {'1 task' if removed.tasks == 1 else f'{removed.tasks} tasks'} with it" if removed.tasks else ""
    _print(removed, f"Removed node {node}{lost}.", at.json)


def _status(node: Node) -> str:
    return f"{node.status}, cordoned" if node.cordoned else node.status


def _print(node: Node, sentence: str, json: bool) -> None:
    if json:
        output.json_line(node.to_json())
    else:
        output.line(sentence)
