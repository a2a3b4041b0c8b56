"""`kohakuriver init`: what a cluster needs before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import JsonOption
from kohakuriver.errors import UsageError

if TYPE_CHECKING:
    from kohakuriver.cli.pki import Authority, Certificate

__all__ = ["app"]

app = App(help="What a cluster needs before it starts.")


@app.callback()
def _group() -> None:
    """What a cluster needs before it starts."""


@app.command("tls", epilog="Example: kohakuriver init tls host.lab,10.0.0.1 node1.lab,10.0.0.11 node2.lab")
def tls(
    machines: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME[,NAME...]",
            help="The names and addresses of a machine, the host first. Default: this machine's.",
            show_default=False,
        ),
    ] = None,
    directory: Annotated[Path, typer.Option("--directory", help="Where the files go.")] = Path("kohakuriver-tls"),
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="How long the certificates are good for.")] = 825,
    json: JsonOption = False,
) -> None:
    """Make a certificate authority and a certificate for each machine, for a cluster that has none.

    Run again, it takes the authority that is there: for more machines, or to renew certificates.
    """
    from kohakuriver.cli.pki import Authority, check_machines

    wanted = [_names(machine) for machine in machines] if machines else [_own_names()]
    check_machines(wanted)
    authority = Authority(directory)
    issued = [authority.issue(names, days) for names in wanted]
    if json:
        output.json_line({"ca": str(authority.cert), "certificates": [_to_json(each) for each in issued]})
    else:
        _explain(authority, issued)


def _names(machine: str) -> list[str]:
    names = [name.strip() for name in machine.split(",")]
    if not all(names):
        raise UsageError(f"{machine!r} has an empty name in it; give NAME,NAME,… without spaces.")
    return names


def _own_names() -> list[str]:
    import socket

    name, whole = socket.gethostname(), socket.getfqdn()
    return list(dict.fromkeys([name, whole, "localhost", "127.0.0.1", "::1"]))


def _to_json(made: Certificate) -> dict[str, object]:
    expires = made.expires.isoformat()
    return {"names": made.names, "cert": str(made.cert), "key": str(made.key), "expires": expires}


def _explain(authority: Authority, issued: list[Certificate]) -> None:
    where = "" if authority.is_new else " (it was there already)"
    output.line(f"{authority.cert}: the authority{where}. Give it to the host, to every node and to every user.")
    output.line(f"{authority.key}: its key. Keep it off the cluster; it is needed for new certificates only.")
    for made in issued:
        output.line(f"{made.cert}, {made.key}: for {', '.join(made.names)}, until {made.expires:%Y-%m-%d}.")
    output.line("")
    if authority.is_new:
        _explain_first(issued)
    else:
        _explain_more(issued)


def _explain_first(issued: list[Certificate]) -> None:
    """What to start where, with the first certificates of an authority."""
    host, *nodes = issued
    output.line(f"On {host.names[0]}, with its two files and ca.pem:")
    output.line(f"  kohakuriver host --tls-cert {host.cert.name} --tls-key {host.key.name} --ca-file ca.pem")
    for node in nodes or [host]:
        name = _node_name(node)
        output.line(
            f"On {node.names[0]}, likewise, with a node token from `kohakuriver token create {name} --node {name}`:"
        )
        output.line(f"  {_runner_command(_in_url(host), node)}")
    output.line("Users, once:")
    output.line(f"  kohakuriver auth login --host https://{_in_url(host)}:8000 --ca-file ca.pem")


def _explain_more(issued: list[Certificate]) -> None:
    """The same for later ones, for which no option says whether they are for old machines or new ones."""
    output.line("A machine that had a certificate: replace its two files; its program notices by itself.")
    for node in issued:
        output.line(f"If {node.names[0]} is a new node, with its two files, ca.pem and a node token there:")
        output.line(f"  {_runner_command('HOST', node)}")


def _runner_command(host: str, node: Certificate) -> str:
    urls = f"--name {_node_name(node)} --host-url https://{host}:8000 --advertise-url https://{_in_url(node)}:8001"
    files = f"--tls-cert {node.cert.name} --tls-key {node.key.name} --ca-file ca.pem --node-token-file node-token"
    return f"kohakuriver runner {urls} {files}"


def _node_name(made: Certificate) -> str:
    """What a node may be called: a certificate's first name without its domain, or its address."""
    first = made.names[0].replace("*", "NAME")
    return first.replace(":", "-") if ":" in first or first.replace(".", "").isdigit() else first.partition(".")[0]


def _in_url(made: Certificate) -> str:
    name = next((name for name in made.names if not name.startswith("*")), made.names[0].replace("*", "NAME"))
    return f"[{name}]" if ":" in name else name
