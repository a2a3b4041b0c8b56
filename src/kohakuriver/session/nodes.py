"""What users are told of a node that the host can't use: one sentence for each fault, whatever was wanted of it."""

from __future__ import annotations

from kohakuriver.errors import UnavailableError
from kohakuriver.no_connection import own_lack

__all__ = ["AWAY", "NodeOfflineError", "node_unreachable", "ticket_refused"]

AWAY = frozenset({"node_offline", "runner_refused", "runner_timeout", "runner_unreachable"})
"""The codes of errors that say nothing of a task, since its node was not asked or gave no answer that counts."""


class NodeOfflineError(UnavailableError):
    """A node is away, or has said that it leaves: `node` is its name."""

    code = "node_offline"

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message)
        self.node = node


def node_unreachable(name: str, why: str, error: BaseException) -> UnavailableError:
    """The error for a node whose runner the host can't connect to, with the reason as a clause.

    The address stays out of it: it is the cluster's own and says nothing to users.
    """
    if lack := own_lack(error):
        sentence = f"The host {lack} and can't reach node {name}; try again, or ask its administrator."
    else:
        sentence = (
            f"The host can't reach node {name}: {why.rstrip('.')}; check that its runner runs and that the host can "
            "use its address (`kohakuriver runner --advertise-url`)."
        )
    return UnavailableError(sentence, code="runner_unreachable", status=502)


def ticket_refused(name: str, why: str) -> UnavailableError:
    """The error for a node that refused the host, and not the user, whose credentials are good."""
    return UnavailableError(f"Node {name} did not take the host's ticket: {why}", code="runner_refused", status=502)
