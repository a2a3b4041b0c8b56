"""`kohakuriver open`: the host in the browser, logged in, or a port of a task, under an address of its own."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from kohakuriver.cli import output
from kohakuriver.cli.options import MaybeTaskArgument, Remote, remote
from kohakuriver.cli.web_browser import open_window
from kohakuriver.config import path_segment
from kohakuriver.errors import UsageError

if TYPE_CHECKING:
    from kohakuriver.client.forward import Event
    from kohakuriver.client.host import HostClient, LoginLink

__all__ = ["register"]

ANOTHER_PORT = "choose another one, or leave --local-port out for any free one"

PortArgument = Annotated[
    str | None, typer.Argument(metavar="PORT", help="The port of the task that speaks HTTP.", show_default=False)
]
LocalPortOption = Annotated[
    int,
    typer.Option(
        "--local-port",
        "-l",
        min=0,
        max=65535,
        help="The port of this machine in the address. Default: any free port.",
        show_default=False,
    ),
]
PrintOption = Annotated[bool, typer.Option("--print", help="Open no browser: the link on stdout, and nothing else.")]
PreserveHostOption = Annotated[
    bool,
    typer.Option(
        "--preserve-host",
        help="Tell the service the address as the browser has it. Otherwise it is told localhost and its own port.",
    ),
]


AtHostOption = Annotated[
    bool,
    typer.Option(
        "--at-host",
        help="Open the address that the port has at the host, logged in: nothing has to go on running here.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        "open",
        epilog="Examples:\n\nkohakuriver open\n\nkohakuriver open lab 8888\n\n"
        "kohakuriver open --print --local-port 7777 lab 6006",
    )(remote(open_task))


def open_task(
    at: Remote,
    task: MaybeTaskArgument = None,
    port: PortArgument = None,
    local_port: LocalPortOption = 0,
    print_link: PrintOption = False,
    preserve_host: PreserveHostOption = False,
    at_host: AtHostOption = False,
) -> int:
    """Open the host in the browser, logged in; or a task's HTTP port, under an address of its own, until Ctrl-C."""
    if print_link and at.json:
        raise UsageError("--print and --json don't go together: the JSON has the link.")
    if task is None or at_host:
        if local_port or preserve_host or (at_host and task is None):
            raise UsageError(
                "--local-port and --preserve-host are for a task's port that is opened here, as in "
                "`kohakuriver open lab 8888`, and --at-host for one that is not."
            )
        return _open_host(at, task, port, print_link=print_link)
    return _open_port(at, task, port, local_port, print_link=print_link, preserve_host=preserve_host)


def _open_host(at: Remote, task: str | None, port: str | None, *, print_link: bool) -> int:
    """Open the host, or the address that the port of a task has there."""
    there = "" if task is None else f"/open/{path_segment(task)}/{_port(task, port)}"

    async def made(client: HostClient) -> LoginLink:
        if task is not None:  # who opens a page that says so may be somebody else
            await client.task(task)
        return await client.login_link(there)

    link = at.ask(made)
    if at.json:
        output.json_line(link.to_json())
    elif print_link:
        output.line(link.url)
    else:
        output.line("Logging a browser in.")
        _open_browser(link.url)
    return 0


def _open_port(
    at: Remote, task: str, port: str | None, local_port: int, *, print_link: bool, preserve_host: bool
) -> int:
    from kohakuriver.client.events import Served
    from kohakuriver.client.ports import PortForward
    from kohakuriver.client.web import WebForwarder
    from kohakuriver.runtime import raise_file_limit, run

    number = _port(task, port)
    files = raise_file_limit()
    settings = at.settings()
    wanted = PortForward(0, number)

    async def main() -> int:
        from kohakuriver.cli.forward_run import Running
        from kohakuriver.cli.forward_view import Aside, JsonView, OpenView

        view = Aside(JsonView() if at.json else OpenView(task, print_link=print_link))

        def tell(event: Event) -> None:
            view.tell(event)
            if isinstance(event, Served) and not at.json and not print_link:
                _browse(event.link)

        with view:
            forwarder = WebForwarder(
                task,
                [wanted],
                settings=settings,
                plain=False,
                web_port=local_port,
                preserve_host=preserve_host,
                on_event=tell,
            )
            return await Running(forwarder, view, None, files, another=ANOTHER_PORT).run()

    return run(main())


def _port(task: str, port: str | None) -> int:
    from kohakuriver.client.ports import parse_port

    if port is None:
        raise UsageError(f"Say which port of {task} to open, as in `kohakuriver open {task} 8888`.")
    if not port.isascii() or not port.isdigit():
        raise UsageError(f"{port!r} is not a port: give its number, as in 8888.")
    return parse_port(port).remote


def _browse(link: str) -> None:
    """Open the browser, on a thread of its own: some return only when they are closed."""
    threading.Thread(target=_open_browser, args=(link,), name="browser", daemon=True).start()


def _open_browser(link: str) -> None:
    if open_window(link):
        return
    where = urlsplit(link)
    port = where.port or 80
    if os.environ.get("SSH_CONNECTION") and (where.hostname or "").endswith(".localhost"):
        output.note(
            f"No browser could be started here. Where yours is, log in once more with `ssh -L {port}:localhost:{port}` "
            f"and open this within a minute, it is good once: {link}"
        )
    else:
        output.note(f"No browser could be started here. Open this within a minute, it is good once: {link}")
