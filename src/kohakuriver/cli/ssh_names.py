"""The names under which OpenSSH's programs know our tasks."""

from __future__ import annotations

__all__ = ["DOMAIN", "alias", "task_of"]

DOMAIN = ".kohakuriver"
"""What may stand behind a task's name where ssh wants a host's."""


def task_of(host_name: str) -> str:
    """The task that ssh means by a host name."""
    return host_name.removesuffix(DOMAIN)


def alias(task_id: int) -> str:
    """The name under which a task's host key is known whatever the task is called."""
    return f"kohakuriver-{task_id}"
