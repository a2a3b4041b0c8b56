"""What it means for a cluster that users may run processes on its nodes."""

from __future__ import annotations

from kohakuriver.cli import output
from kohakuriver.cli.options import Remote

__all__ = ["warn_of_processes"]


def warn_of_processes(at: Remote) -> None:
    """Say what somebody who is let in can do, where that is more than to have tasks."""
    names = [node.name for node in at.ask(lambda client: client.nodes()) if node.user_processes]
    if names:
        output.note(
            f"Warning: users may run processes on {', '.join(names)} (--user-processes), and there a user can do "
            "whatever process tasks can: with no --process-user read the runner's secrets, and act as every task there."
        )
