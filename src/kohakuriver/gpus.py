"""Which GPUs of a node a task gets: what was asked for, of what is there and free.

The command line loads this too, so it needs only the standard library.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kohakuriver.errors import UnavailableError

__all__ = ["GPUS", "NotThereError", "choose", "count", "refusal"]

GPUS = r"all|[1-9][0-9]{0,2}|device=[0-9]{1,3}(,[0-9]{1,3})*|[0-9]{1,3}(,[0-9]{1,3})+"
"""How they are asked for: how many, all, or by their numbers on the node."""


class NotThereError(Exception):
    """Why a node does not give the GPUs that were asked for, as a clause; `ever`: it never does."""

    def __init__(self, why: str, *, ever: bool) -> None:
        super().__init__(why)
        self.ever = ever


def refusal(reasons: Sequence[NotThereError]) -> UnavailableError:
    """The error for a task that finds its GPUs on no node: "gpus_taken" where one has them, and not now."""
    for reason in reasons:
        if not reason.ever:
            return UnavailableError(
                f"No node has the GPUs free that this task asks for: {reason}; try again when a task has ended.",
                code="gpus_taken",
            )
    told = next((reason for reason in reasons if "no GPUs" not in str(reason)), reasons[0])
    return UnavailableError(
        f"No node has the GPUs that this task asks for: {told}; ask for others by --gpus.", code="no_gpus"
    )


def choose(asked: str, there: Sequence[str], taken: Collection[str], node: str) -> list[str]:
    """The numbers of the GPUs of a node that a task gets. `there` are the node's, `taken` those of running tasks.

    Raises NotThereError.
    """
    named = _named(asked)
    if named is None:
        free = [gpu for gpu in there if gpu not in taken]
        wanted = max(1, len(there)) if asked == "all" else int(asked)
        if wanted > len(there):
            raise _lacking(node, there)
        if wanted > len(free):
            raise _busy(f"node {node} has {len(free)} of its {count(there)} free")
        return free[:wanted]
    if not set(named) <= set(there):
        raise _lacking(node, there)
    if busy := [gpu for gpu in named if gpu in taken]:
        raise _busy(f"GPU {busy[0]} of node {node} is in use")
    return named


def count(gpus: Collection[str]) -> str:
    """How many, in words."""
    return "1 GPU" if len(gpus) == 1 else f"{len(gpus) or 'no'} GPUs"


def _named(asked: str) -> list[str] | None:
    if not asked.startswith("device=") and "," not in asked:
        return None
    return list(dict.fromkeys(str(int(number)) for number in asked.removeprefix("device=").split(",")))


def _lacking(node: str, there: Sequence[str]) -> NotThereError:
    numbers = f", with the numbers {', '.join(there)}" if there else ""
    return NotThereError(f"node {node} has {count(there)}{numbers}", ever=True)


def _busy(what: str) -> NotThereError:
    return NotThereError(what, ever=False)
