"""`kohakuriver token …`: make, list and revoke tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import Remote, complete_node, remote, seconds
from kohakuriver.cli.processes import warn_of_processes
from kohakuriver.errors import UsageError

if TYPE_CHECKING:
    from kohakuriver.client.host import Token

__all__ = ["app"]

app = App(
    help="Make, list and revoke tokens.",
    epilog="Example: kohakuriver token create laptop --expires 90d",
)

OfUserOption = Annotated[
    str | None, typer.Option("--user", metavar="USER", help="For admins: that user's, not yours.", show_default=False)
]


@app.command(epilog="Example: kohakuriver token create laptop --expires 90d")
@remote
def create(
    at: Remote,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="What you will call it. Default: after its day.", show_default=False),
    ] = None,
    user: OfUserOption = None,
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            metavar="NODE",
            help="For admins: a token for this node's runner.",
            autocompletion=complete_node,
            show_default=False,
        ),
    ] = None,
    agent: Annotated[
        bool, typer.Option("--agent", help="For 'kohakuriver agent': it makes one task, once, and can do nothing else.")
    ] = False,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires",
            metavar="TIME",
            help="How long it is good, as 12h or 30d. Default: for ever; with --agent for a day.",
        ),
    ] = None,
) -> None:
    """Make a token and print it, this once."""
    expires_in = None if expires is None else seconds(expires, "--expires")
    made = at.ask(lambda client: client.make_token(name, user=user, node=node, agent=agent, expires_in=expires_in))
    if user is not None:
        warn_of_processes(at)
    if at.json:
        output.json_line(made.to_json())
    else:
        output.note(f"Token {made.name} ({made.id}) for {_whose(made)}, {_until(made)}. It is shown only now:")
        output.line(made.token or "")


@app.command("list", epilog="Example: kohakuriver token list")
@remote
def list_tokens(
    at: Remote,
    user: OfUserOption = None,
    every: Annotated[bool, typer.Option("--all", help="For admins: all tokens, of users and nodes.")] = False,
) -> None:
    """List tokens, without their secrets."""
    if every and user is not None:
        raise UsageError("--all and --user don't go together: --all lists everybody's.")
    tokens = at.ask(lambda client: client.tokens(user=user, every=every))
    if at.json:
        output.json_line({"tokens": [item.to_json() for item in tokens]})
        return
    output.table(
        ["Id", "Name", "Whose", "Status", "Made", "Expires"],
        [
            [
                item.id,
                item.name,
                _whose(item),
                item.status,
                f"{output.age(item.created_at)} ago",
                item.expires_at or "never",
            ]
            for item in tokens
        ],
    )


@app.command(epilog="Example: kohakuriver token revoke laptop")
@remote
def revoke(
    at: Remote,
    name: Annotated[str, typer.Argument(metavar="TOKEN", help="The token's id or name.", show_default=False)],
) -> None:
    """Make a token worthless, at once: what it has opened ends."""
    revoked = at.ask(lambda client: client.revoke_token(name))
    if at.json:
        output.json_line(revoked.to_json())
    else:
        output.line(f"Revoked {revoked.name} ({revoked.id}) of {_whose(revoked)}.")


def _whose(token: Token) -> str:
    if token.node is None:
        return token.user or ""
    return "any node" if token.node == "*" else f"node {token.node}"


def _until(token: Token) -> str:
    return f"good until {token.expires_at}" if token.expires_at else "good for ever"
