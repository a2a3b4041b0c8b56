"""How the host asks a runner to do something."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx

from kohakuriver import tracing
from kohakuriver.asking import asker
from kohakuriver.errors import UnavailableError, from_answer
from kohakuriver.mount_roots import MOUNT_NOT_ALLOWED
from kohakuriver.no_connection import reason
from kohakuriver.session import ticket
from kohakuriver.session.nodes import node_unreachable, ticket_refused
from kohakuriver.store import Node
from kohakuriver.text import json_of

__all__ = ["RunnerClient", "in_words", "makes_no_sense"]

_CONNECT_SECONDS = 5.0
_REVOKE_SECONDS = 10.0
_MAX_ANSWER = 1 << 20


class RunnerClient:
    """The runners' HTTP API; every request carries a fresh ticket for its node. `trusted` is how https is checked."""

    def __init__(self, trusted: ssl.SSLContext) -> None:
        self.own: dict[str, str] = {}
        """Where this host finds the nodes that it is itself, by their names."""
        # Nodes are named by an address in our own database: a proxy from the environment has no place in between.
        self._http = httpx.AsyncClient(trust_env=False, verify=trusted)
        # Those that go on for long have connections of their own: they must not use up everybody's.
        self._lasting = httpx.AsyncClient(trust_env=False, verify=trusted, limits=httpx.Limits(max_connections=None))

    def url_of(self, node: Node) -> str:
        """Where this host finds a node."""
        return self.own.get(node.name, node.url)

    async def close(self) -> None:
        """Close the connections to all runners."""
        await self._http.aclose()
        await self._lasting.aclose()

    async def revoke(self, node: Node, container: str, user: str, why: str) -> None:
        """Have a runner end what it holds in a container for a user's next session. Raises as `call` does."""
        path = f"/api/tasks/{quote(container, safe='')}/revoke"
        body = {"user": user, "reason": why}
        await self.call(node, "POST", path, body, container=container, timeout=_REVOKE_SECONDS)

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

        Raises UnavailableError "runner_unreachable", "runner_refused" (502) or "runner_timeout" (504), or the runner's
        own error.
        """
        url = self.url_of(node) + path
        request = _request(self._http, node, method, url, body, container=container, timeout=timeout)
        with in_words(node, timeout):
            answer = await self._http.send(request, stream=True)
            try:
                content = await _read(answer, node)
            finally:
                await answer.aclose()
        _check(node, answer, content)
        try:
            told: dict[str, Any] = json_of(content)
        except ValueError:
            raise makes_no_sense(node) from None
        return told

    async def lasting(
        self, node: Node, path: str, params: dict[str, Any], *, container: str, silence: float
    ) -> httpx.Response:
        """An answer that goes on for as long as there is more to say, which the caller closes.

        `silence` is for how many seconds it may say nothing. Raises as `call` does.
        """
        url = self.url_of(node) + path
        request = _request(self._lasting, node, "GET", url, None, params, container=container, timeout=silence)
        with in_words(node, silence):
            answer = await self._lasting.send(request, stream=True)
            if answer.status_code >= 400:
                try:
                    content = await _read(answer, node)
                finally:
                    await answer.aclose()
                _check(node, answer, content)
        return answer


def _request(
    http: httpx.AsyncClient,
    node: Node,
    method: str,
    url: str,
    body: dict[str, Any] | None,
    params: dict[str, Any] | None = None,
    *,
    container: str,
    timeout: float,
) -> httpx.Request:
    """A request to a node's runner, with a fresh ticket for one container."""
    credential = ticket.issue(
        node.ticket_key, node=node.name, scope="control", container=container, user=asker().known.get("user")
    )
    return http.build_request(
        method,
        url,
        json=body,
        params=params,
        # A compressed body could inflate past our limit.
        headers={"Authorization": f"Bearer {credential}", "Accept-Encoding": "identity", **tracing.headers()},
        timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS),
    )


@contextlib.contextmanager
def in_words(node: Node, timeout: float) -> Iterator[None]:
    """Turn what befalls a request to a node into an error of ours."""
    try:
        yield
    except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
        raise UnavailableError(
            f"Node {node.name} did not answer within {timeout:g} s; `kohakuriver vps list` shows what came of it.",
            code="runner_timeout",
            status=504,
        ) from error
    except (httpx.HTTPError, OSError) as error:  # without descriptors it can fail anywhere
        late = isinstance(error, httpx.ConnectTimeout)
        why = f"it did not answer within {_CONNECT_SECONDS:g} s" if late else reason(error)
        raise node_unreachable(node.name, why, error) from error


def _check(node: Node, answer: httpx.Response, content: bytes) -> None:
    """Raises the error that an answer is, if it is one."""
    if answer.status_code < 400:
        return
    failure = from_answer(node.url, answer.status_code, content)
    if answer.status_code in (401, 403) and failure.code != MOUNT_NOT_ALLOWED:
        raise ticket_refused(node.name, failure.message)
    raise failure


async def _read(answer: httpx.Response, node: Node) -> bytes:
    content = b""
    async for piece in answer.aiter_raw():
        content += piece
        if len(content) > _MAX_ANSWER:
            raise makes_no_sense(node)
    return content


def makes_no_sense(node: Node) -> UnavailableError:
    """The error for a node that answers what no runner does."""
    return UnavailableError(
        f"The host does not understand the answer of node {node.name}; its runner should be of the host's version.",
        code="runner_unreachable",
        status=502,
    )
