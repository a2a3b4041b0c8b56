"""How much a new task gets of its node: what was asked for, or what is given by default, within what its user may have.

Source: docs/guide/limits.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from kohakuriver.backends import kind_of
from kohakuriver.errors import NotAllowedError, UnavailableError, UsageError
from kohakuriver.gpus import NotThereError, choose, refusal
from kohakuriver.host.services.credentials import Caller
from kohakuriver.quotas import LEAST_MEMORY, LEAST_PIDS, SHARE, Offer, Quotas, in_words, over_limit
from kohakuriver.store import Node
from kohakuriver.task import NewTask, TaskOrder, taken_from

__all__ = ["BOUNDS", "TIMES", "give_bounds", "give_times", "offer_of", "open_to", "roomy", "with_gpus"]

BOUNDS: Final = ("memory", "cpus", "pids", "shm_size", "log_size")
"""The fields of an order that say how much."""

TIMES: Final = ("ttl", "idle_stop")
"""The fields of an order that say when a task is stopped."""

_OF_NODE = ("memory", "cpus")
_SUMMED: Final[dict[str, float]] = {"memory": LEAST_MEMORY, "cpus": 0.01, "pids": LEAST_PIDS}
"""What the tasks of a user have together, each with the least that a task can do with."""


def offer_of(node: Node) -> Offer:
    """What a node said that it has."""
    return taken_from(node.offer, Offer)


def open_to(owner: Caller, nodes: Sequence[Node], backends: Sequence[str]) -> list[Node]:
    """The nodes on which this user may have such a task. Raises NotAllowedError where there is none.

    A process can do on its node whatever the runner can, and act there as every task.
    """
    if owner.is_admin or not all(kind_of(name).as_runner for name in backends):
        return list(nodes)
    allowed = [node for node in nodes if offer_of(node).user_processes]
    if not allowed:
        owner.need_admin("Running processes on a node whose runner has no --user-processes")
    return allowed


def roomy(nodes: Sequence[Node], request: NewTask) -> Node:
    """The first node that is large enough for the task. Raises UnavailableError "node_too_small"."""
    reason = ""
    for node in nodes:
        offer = offer_of(node)
        lacks = [name for name in _OF_NODE if 0 < getattr(offer, name) < (getattr(request, name) or 0)]
        if not lacks:
            return node
        name = lacks[0]
        reason = reason or f"node {node.name} has {in_words(name, getattr(offer, name))}; ask for less by --{name}"
    raise UnavailableError(f"No node has as much as this task asks for: {reason}.", code="node_too_small")


def with_gpus(nodes: Sequence[Node], asked: str, taken: Mapping[str, Collection[str]]) -> list[Node]:
    """The nodes that have the GPUs that are asked for, and free. `taken` are those of tasks, by node.

    Raises UnavailableError "no_gpus" where none ever has them, "gpus_taken" where some have and all are in use.
    """
    fitting: list[Node] = []
    reasons: list[NotThereError] = []
    for node in nodes:
        try:
            choose(asked, offer_of(node).gpus, taken.get(node.name, ()), node.name)
        except NotThereError as error:  # noqa: PERF203 - the others are asked all the same
            reasons.append(error)
        else:
            fitting.append(node)
    if not fitting:
        raise refusal(reasons)
    return fitting


def give_bounds(order: TaskOrder, offer: Offer, user: str, quotas: Quotas) -> None:
    """Fill in what the task gets.

    Raises NotAllowedError "over_limit" for more than its user may ever have, or UsageError for what can't go together.
    """
    if kind_of(order.backend).scheduled:
        return  # what it prints is its user's own file, and what it gets is the scheduler's to give
    order.log_size = int(_least(offer.task_log, quotas.log)) or None
    if not kind_of(order.backend).bounded:
        return
    for name, least in _SUMMED.items():
        most = getattr(quotas, name)
        asked = getattr(order, name)
        if asked is None:
            setattr(order, name, _by_default(name, offer, most, least))
        elif most and asked > most:
            raise over_limit(name, user, used=0, wanted=asked, most=most)
    if order.shm_size is None:
        order.shm_size = int(_least(offer.task_shm, order.memory or 0)) or None
    elif order.memory is not None and order.shm_size > order.memory:
        raise UsageError(
            f"Shared memory is a part of a task's memory, which is {in_words('memory', order.memory)}; "
            "give less by --shm-size, or more by --memory."
        )


def give_times(order: TaskOrder, user: str, quotas: Quotas) -> None:
    """Fill in when the task is stopped: as it was asked for, or as its user's limits have it.

    Raises NotAllowedError "over_limit" for a longer time than these.
    """
    for name in TIMES:
        most, asked = getattr(quotas, name), getattr(order, name)
        if asked is None:
            setattr(order, name, most or None)
        elif most and asked > most:
            raise NotAllowedError(
                f"The limit {name!r} of {user} is {in_words(name, most)}, and this task asks for "
                f"{in_words(name, asked)}; give less by --{name.replace('_', '-')}.",
                code="over_limit",
            )


def _by_default(name: str, offer: Offer, most: float, least: float) -> float | None:
    share = max(least, most / SHARE) if most else 0
    given = _least(getattr(offer, f"task_{name}"), share, getattr(offer, name, 0) if share else 0)
    return (given if name == "cpus" else int(given)) or None


def _least(*amounts: float) -> float:
    """The least of these, of which 0 is no limit."""
    return min((amount for amount in amounts if amount), default=0)
