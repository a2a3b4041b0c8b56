"""`kohakuriver node …`: the machines of the cluster."""

from __future__ import annotations

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import Remote, remote

__all__ = ["app"]

app = App(help="The machines that run tasks.", epilog="Example: kohakuriver node list")


@app.callback()
def _group() -> None:
    """The machines that run tasks."""


@app.command("list", epilog="Example: kohakuriver node list --json")
@remote
def list_nodes(at: Remote) -> None:
    """List the nodes: state, last seen, tasks, traffic."""
    nodes = at.ask(lambda client: client.nodes())
    if at.json:
        output.json_line({"nodes": [node.to_json() for node in nodes]})
        return
    output.table(
        ["Name", "Status", "Last seen", "Backends", "Tasks", "Sessions", "Streams", "To tasks", "From tasks"],
        [
            [
                node.name,
                node.status,
                output.age(node.last_seen),
                ",".join(node.backends) or "-",
                str(node.tasks),
                str(node.traffic.sessions),
                str(node.traffic.streams),
                output.size(node.traffic.bytes_to_container),
                output.size(node.traffic.bytes_to_user),
            ]
            for node in nodes
        ],
    )
