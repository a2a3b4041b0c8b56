"""The `kohakuriver` program: its commands, and what becomes of an error.

Starting must stay fast: nothing here, nor in the command modules, imports a heavy library before a command runs.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from kohakuriver import __version__, binaries, descriptors, tracing
from kohakuriver.cli import (
    agent,
    audit,
    auth,
    browser,
    cluster,
    connect,
    cp,
    demo,
    doctor,
    forward,
    group,
    init,
    node,
    output,
    ssh,
    token,
    user,
    volume,
    vps,
)
from kohakuriver.cli.app import App
from kohakuriver.errors import HostUnreachableError, KohakuRiverError

__all__ = ["app", "main"]

# The base class of what the parser raises for a wrong command line. It has had other names and places in other
# versions of Typer; this class of theirs, and its place below that one, have stayed.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = App(
    name="kohakuriver",
    help="Reach any port of any task on the cluster from your own machine.",
    epilog="Example: kohakuriver forward my-task 8888",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kohakuriver {__version__}")
        if sys.platform.startswith("linux") and (note := binaries.missing()):  # only there are runners
            output.note(note)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Reach any port of any task on the cluster from your own machine."""


forward.register(app)
connect.register(app)
cp.register(app)
browser.register(app)
app.add_typer(vps.app, name="vps")
app.add_typer(volume.app, name="volume")
app.add_typer(node.app, name="node")
app.add_typer(auth.app, name="auth")
app.add_typer(token.app, name="token")
app.add_typer(user.app, name="user")
app.add_typer(group.app, name="group")
app.add_typer(init.app, name="init")
agent.register(app)
audit.register(app)
cluster.register(app)
demo.register(app)
doctor.register(app)
ssh.register(app)


@functools.cache
def command() -> Any:
    """All commands, as the parser has them: what is made of their signatures, once in a process."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code (docs/cli.md "Exit codes")."""
    descriptors.prepare()
    descriptors.raise_on_interrupt()
    try:
        code = _run(arguments)
    except KeyboardInterrupt:  # the second one, or one that came a moment too late
        code = 128 + signal.SIGINT
    tracing.finish()
    output.leave(code)


def _run(arguments: Sequence[str] | None) -> int:
    output.errors_as_json(False)
    tracing.command()
    try:
        code = command().main(args=arguments, prog_name="kohakuriver", standalone_mode=False)
        output.flush()
    except KohakuRiverError as error:
        output.failure(error.code, error.message + _advice(error), request_id=error.request_id)
        return error.exit_code
    except _CommandLineError as error:
        message = str(getattr(error, "format_message", error.__str__)())
        if message:  # else the help was shown, as for a group without a command
            output.failure("bad_request", message.replace("Value error, ", ""))
        return int(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        output.discard_stdout()
        return 1
    except OSError as error:
        output.failure("failed", _plainly(error))
        return 1
    return code if isinstance(code, int) else 0


def _plainly(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {what}." if isinstance(error.filename, str | bytes) else f"{what}."


def _advice(error: KohakuRiverError) -> str:
    """What to do where nobody answers at the place that commands turn to with nothing set."""
    from kohakuriver.config import DEFAULT_HOST, left_cluster

    if not isinstance(error, HostUnreachableError) or error.url != DEFAULT_HOST:
        return ""
    if left_cluster():
        return " The cluster that `kohakuriver up` started is not running any more; start it again, or name another \
host with `kohakuriver auth login --host URL`."
    return " Start one there with `kohakuriver up`, or name another with `kohakuriver auth login --host URL`."
