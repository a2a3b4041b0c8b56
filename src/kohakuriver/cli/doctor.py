"""`kohakuriver doctor`: why the host, or a task on it, can't be reached from here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from kohakuriver.cli import output
from kohakuriver.cli.options import MaybeTaskArgument, Remote, remote

if TYPE_CHECKING:
    from kohakuriver.client.doctor import Finding

__all__ = ["register"]

WIDTH = 11


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Examples:\n\nkohakuriver doctor\n\nkohakuriver doctor my-task")(remote(doctor))


def doctor(at: Remote, task: MaybeTaskArgument = None) -> int:
    """Look at each step of the way to the host, and to TASK, and say what is wrong and what to do about it."""
    from kohakuriver import __version__
    from kohakuriver.client.doctor import examine
    from kohakuriver.runtime import run

    settings = at.resolved(at.token)

    async def look() -> list[Finding]:
        found = []
        async for finding in examine(settings, task, __version__):
            found.append(finding)
            if not at.json:
                _show(finding)
        return found

    found = run(look())
    wrong = [finding for finding in found if not finding.ok]
    if at.json:
        output.json_line({"ok": not wrong, "host": settings.host, "findings": [each.to_json() for each in found]})
    return wrong[0].exit_code if wrong else 0


def _show(finding: Finding) -> None:
    output.line(f"{'ok' if finding.ok else 'WRONG':<6}{finding.check:<{WIDTH}}{finding.message}")
    if finding.advice:
        output.line(f"{'':<6}{'':<{WIDTH}}→ {finding.advice}")
