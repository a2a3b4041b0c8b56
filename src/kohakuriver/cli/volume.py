"""`kohakuriver volume …`: what you keep on nodes, whatever becomes of your tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import Remote, remote
from kohakuriver.errors import KohakuRiverError

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient

__all__ = ["app"]

app = App(
    help="What you keep on nodes, whatever becomes of your tasks; `vps create --volume` makes it.",
    epilog="Example: kohakuriver volume list",
)


@app.command("list", epilog="Example: kohakuriver volume list --json")
@remote
def list_volumes(at: Remote) -> None:
    """List your volumes, where they are and which tasks have them; for admins everybody's."""
    volumes = at.ask(lambda client: client.volumes())
    if at.json:
        output.json_line({"volumes": [volume.to_json() for volume in volumes]})
        return
    output.table(
        ["Name", "Owner", "Node", "Age", "Tasks"],
        [
            [volume.name, volume.owner, volume.node, output.age(volume.created_at), ", ".join(volume.tasks) or "-"]
            for volume in volumes
        ],
    )
    if not volumes:
        output.note("There are no volumes; `kohakuriver vps create --volume NAME:/path` makes one.")


@app.command(epilog="Example: kohakuriver volume rm data")
@remote
def rm(
    at: Remote,
    volumes: Annotated[list[str], typer.Argument(metavar="VOLUME", help="The volume's name.", show_default=False)],
    user: Annotated[
        str | None, typer.Option("--user", metavar="USER", help="For admins: whose it is.", show_default=False)
    ] = None,
) -> None:
    """Remove volumes that no task has, with all that is in them."""

    async def remove(client: HostClient) -> None:
        failed: list[KohakuRiverError] = []
        for name in dict.fromkeys(volumes):
            try:
                gone = await client.remove_volume(name, owner=user)
            except KohakuRiverError as error:  # noqa: PERF203 - the others are to be tried all the same
                failed.append(error)
            else:
                at.show(gone.to_json(), f"Removed the volume {gone.name} on node {gone.node}.")
        for other in failed[1:]:
            output.failure(other.code, other.message)
        if failed:
            raise failed[0]

    at.ask(remove)
