"""`kohakuriver group …`: groups of users, whom tasks can be shared with. For admins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import Remote, remote

if TYPE_CHECKING:
    from kohakuriver.client.host import Group

__all__ = ["app"]

app = App(
    help="Groups of users, whom tasks can be shared with. For admins.",
    epilog="Example: kohakuriver group add lab ann bob",
)

GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="The group's name.", show_default=False)]


@app.command(epilog="Example: kohakuriver group add lab ann bob")
@remote
def add(
    at: Remote,
    name: GroupArgument,
    members: Annotated[
        list[str] | None, typer.Argument(metavar="USER", help="Who is in it.", show_default=False)
    ] = None,
) -> None:
    """Make a group; `vps share TASK --group GROUP` shares a task with all who are in it."""
    _show(at, "Added", at.ask(lambda client: client.add_group(name, members or [])))


@app.command("list", epilog="Example: kohakuriver group list")
@remote
def list_groups(at: Remote) -> None:
    """List the groups and who is in them; who is no admin sees those that they are in."""
    groups = at.ask(lambda client: client.groups())
    if at.json:
        output.json_line({"groups": [group.to_json() for group in groups]})
        return
    output.table(["Group", "Members"], [[group.name, ", ".join(group.members) or "-"] for group in groups])
    if not groups:
        output.note("There are no groups that you see; `kohakuriver group add GROUP USER` makes one.")


@app.command(epilog="Example: kohakuriver group member lab --add cid --remove bob")
@remote
def member(
    at: Remote,
    name: GroupArgument,
    put_in: Annotated[
        list[str] | None, typer.Option("--add", metavar="USER", help="Somebody to put in; may be repeated.")
    ] = None,
    take_out: Annotated[
        list[str] | None, typer.Option("--remove", metavar="USER", help="Somebody to take out; may be repeated.")
    ] = None,
) -> None:
    """Put users into a group and take others out; what these have open by it ends."""
    _show(at, "In", at.ask(lambda client: client.change_group(name, add=put_in or [], remove=take_out or [])))


@app.command(epilog="Example: kohakuriver group rm lab")
@remote
def rm(at: Remote, name: GroupArgument) -> None:
    """Forget a group; what was shared with it is not any more, and what is open by that ends."""
    _show(at, "Removed", at.ask(lambda client: client.remove_group(name)))


def _show(at: Remote, what: str, group: Group) -> None:
    at.show(group.to_json(), f"{what} {group.name}: {', '.join(group.members) or 'nobody'}.")
