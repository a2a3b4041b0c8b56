"""How the host asks a runner to do something."""

from __future__ import annotations

import ssl
from typing import Any

import httpx

from kohakuriver import tls
from kohakuriver.errors import HostUnreachableError, from_status
from kohakuriver.store import Node
from kohakuriver.tunnel import ticket

__all__ = ["RunnerClient"]

_CONNECT_SECONDS = 5.0


class RunnerClient:
    """The runners' HTTP API; every request carries a fresh ticket for its node. `trusted` is how https is checked."""

    def __init__(self, trusted: ssl.SSLContext) -> None:
        # Nodes are named by an address in our own database: a proxy from the environment has no place in between.
        self._http = httpx.AsyncClient(trust_env=False, verify=trusted)

    async def close(self) -> None:
        """Close the connections to all runners."""
        await self._http.aclose()

    async def call(
        self,
        node: Node,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        container: str,
        timeout: float = 60.0,
    ) -> dict[str, Any]:
        """The JSON object that the node's runner answers with to a request about a container; `timeout` in seconds.

        Raises HostUnreachableError "runner_unreachable" (502) or "runner_timeout" (504), or the runner's own error.
        """
        credential = ticket.issue(node.ticket_key, node=node.name, scope="control", container=container)
        try:
            answer = await self._http.request(
                method,
                node.url + path,
                json=body,
                headers={"Authorization": f"Bearer {credential}"},
                timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS),
            )
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise HostUnreachableError(
                f"Node {node.name} did not answer within {timeout:g} s; `kohakuriver vps list` shows what came of it.",
                code="runner_timeout",
                status=504,
            ) from error
        except httpx.HTTPError as error:
            why = tls.reason(error) or (
                "check that its runner runs and that the address is one the host can use "
                "(`kohakuriver runner --advertise-url`)"
            )
            raise HostUnreachableError(
                f"The host can't reach node {node.name} at {node.url}: {why}.",
                code="runner_unreachable",
            ) from error
        if answer.status_code in (401, 403):  # the host was refused, and not the user, whose credentials are good
            reason = from_status(answer.status_code, answer.content).message
            raise HostUnreachableError(
                f"Node {node.name} did not take the host's ticket: {reason}", code="runner_refused"
            )
        if answer.status_code >= 400:
            raise from_status(answer.status_code, answer.content)
        content: dict[str, Any] = answer.json()
        return content
