"""How many terminals there may be on a node, however they are carried."""

from __future__ import annotations

from collections.abc import Callable

from kohakuriver.errors import UnavailableError
from kohakuriver.limits import Limits

__all__ = ["TerminalRoom"]


class TerminalRoom:
    """Who has a terminal open: of which task, and of which user ("" is nobody in particular)."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[object, tuple[int, str]] = {}

    def enter(self, task_id: int, user: str) -> Callable[[], None]:
        """One more; the answer is called when it has ended.

        Raises UnavailableError "too_many_terminals" (429) where there are as many as may be.
        """
        limits, those = self._limits, list(self._open.values())
        for most, count, whose in (
            (limits.max_task_terminals, sum(task == task_id for task, _ in those), "This task has"),
            (limits.max_terminals, sum(each == user for _, each in those), f"{user or 'Whoever has no token'} has"),
            (limits.max_node_terminals, len(those), "All users of this node have"),
        ):
            if most and count >= most:
                raise UnavailableError(
                    f"{whose} {most} terminals and commands open, as many as the node allows; end some of them first.",
                    code="too_many_terminals",
                    status=429,
                )
        terminal = object()
        self._open[terminal] = (task_id, user)

        def leave() -> None:
            self._open.pop(terminal, None)

        return leave
