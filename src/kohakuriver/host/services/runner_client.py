"""How the host asks a runner to do something."""

from __future__ import annotations

import json
import ssl
from typing import Any

import httpx

from kohakuriver import tls
from kohakuriver.errors import HostUnreachableError, from_answer
from kohakuriver.session import ticket
from kohakuriver.store import Node

__all__ = ["RunnerClient", "makes_no_sense"]

_CONNECT_SECONDS = 5.0
_MAX_ANSWER = 1 << 20


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
        request = self._http.build_request(
            method,
            node.url + path,
            json=body,
            # A compressed body could inflate past our limit.
            headers={"Authorization": f"Bearer {credential}", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS),
        )
        try:
            answer = await self._http.send(request, stream=True)
            try:
                content = await _read(answer, node)
            finally:
                await answer.aclose()
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
            reason = from_answer(node.url, answer.status_code, content).message
            raise HostUnreachableError(
                f"Node {node.name} did not take the host's ticket: {reason}", code="runner_refused"
            )
        if answer.status_code >= 400:
            raise from_answer(node.url, answer.status_code, content)
        try:
            told: dict[str, Any] = json.loads(content)
        except ValueError:
            raise makes_no_sense(node) from None
        return told


async def _read(answer: httpx.Response, node: Node) -> bytes:
    content = b""
    async for piece in answer.aiter_raw():
        content += piece
        if len(content) > _MAX_ANSWER:
            raise makes_no_sense(node)
    return content


def makes_no_sense(node: Node) -> HostUnreachableError:
    """The error for a node that answers what no runner does."""
    return HostUnreachableError(
        f"The host does not understand the answer of node {node.name}; its runner should be of the host's version.",
        code="runner_unreachable",
    )
