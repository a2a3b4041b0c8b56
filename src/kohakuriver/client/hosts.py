"""The hosts that a user's program may go by, of which any serves everything: the first that answers is asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kohakuriver.config import Settings
from kohakuriver.errors import HostUnreachableError
from kohakuriver.http_proxy import http_proxy
from kohakuriver.tls import client_context
from kohakuriver.tunnel.dial import Server

__all__ = ["Hosts", "nobody_answers"]

T = TypeVar("T")


class Hosts:
    """Where WebSockets are opened. The host that is tried next stands first."""

    def __init__(self, settings: Settings) -> None:
        self._token = settings.token
        self._all = deque((url, client_context(url, settings.ca_file)) for url in settings.hosts)

    def turn(self) -> None:
        """Have the next host tried first: this one is going, or gone."""
        self._all.rotate(-1)

    async def reach(self, path: str, open_at: Callable[[Server], Awaitable[T]]) -> T:
        """What `open_at` gives for a path at the first host that can be reached. Raises what it raises for the last."""
        failures = []
        for url, trusted in list(self._all):
            address = url.replace("http", "ws", 1) + path
            try:
                return await open_at(Server(address, self._token, trusted, http_proxy(address)))
            except HostUnreachableError as error:
                failures.append(error)
                self.turn()
        raise nobody_answers(failures)


def nobody_answers(failures: list[HostUnreachableError]) -> HostUnreachableError:
    """The error for hosts of which none could be reached, each for its reason."""
    last, said = failures[-1], list(dict.fromkeys(each.message for each in failures))
    if len(said) == 1:  # there is one host, or one database behind them
        return last
    reasons = "; ".join(f"{each[:1].lower()}{each[1:].rstrip('.')}" for each in said)
    return HostUnreachableError(f"No host answers: {reasons}.", code=last.code, status=last.status)
