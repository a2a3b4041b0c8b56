"""One host's HTTP API, and what befalls requests on the way there in words of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from kohakuriver import tls
from kohakuriver.errors import NOT_OUR_ANSWER, HostUnreachableError, KohakuRiverError, from_answer
from kohakuriver.http_proxy import HttpProxy, http_proxy
from kohakuriver.no_connection import reason

__all__ = ["ANSWER_TIMEOUT", "CONNECT_TIMEOUT", "LONGEST_LINE", "HostHttp", "time_for", "too_long", "unheard", "whole"]

CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 60.0

LONGEST_ANSWER = 128 << 20
"""Bytes; a thousand tasks that were asked for with as much as can be."""

LONGEST_LINE = 4 << 20
"""Bytes of one line of what a task printed."""


def time_for(hold: float) -> httpx.Timeout:
    """How long an answer may take that the host was asked to hold back for so many seconds."""
    return httpx.Timeout(ANSWER_TIMEOUT + hold, connect=CONNECT_TIMEOUT)


_OF_THE_WAY = ("content-encoding", "content-length", "transfer-encoding")


class HostHttp:
    """The host at `url`, as requests reach it."""

    def __init__(
        self, url: str, ca_file: str | None, headers: Mapping[str, str], transport: httpx.AsyncBaseTransport | None
    ) -> None:
        self.url = url
        self._proxy = http_proxy(url)
        self._proxy_answered: int | None = None  # the HTTP status
        self.http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=time_for(0),
            transport=transport,
            # As for the WebSockets: the same certificate authorities, and the same HTTP proxy.
            verify=tls.trusted_at(url, ca_file),
            proxy=_httpx_proxy(self._proxy),
            trust_env=False,
        )

    async def whole(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer to a request, whole; `request` is what httpx calls it. Raises what `whole` does, and httpx."""
        asked = self.http.build_request(method, path, extensions={"trace": self.trace}, **request)
        return await whole(await self.http.send(asked, stream=True))

    @contextlib.contextmanager
    def in_words(self) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL, OSError) as error:
            raise self._of_proxy(error) or self._unreachable(error) from error

    def failure(self, answer: httpx.Response) -> KohakuRiverError:
        """The error that an answer is."""
        location = answer.headers.get("location", "")
        failure = from_answer(self.url, answer.status_code, answer.content, location=location)
        if self._proxy is not None and failure.code == NOT_OUR_ANSWER:  # proxies answer plain HTTP themselves
            return self._proxy.refused(answer.status_code, self.url)
        return failure

    def _unreachable(self, error: Exception) -> HostUnreachableError:
        if isinstance(error, httpx.TimeoutException):
            return HostUnreachableError(f"The host at {self.url} did not answer in time.")
        if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
            why = tls.reason(error) or tls.hung_up(self.url)
        else:
            why = reason(error)
        return HostUnreachableError(f"The host at {self.url} can't be reached: {why}.", url=self.url)

    async def trace(self, event: str, about: Any) -> None:
        """Heed what a proxy says to CONNECT: the HTTP library tells of it in words alone."""
        if self._proxy is not None and event == "http11.receive_response_headers.complete":
            self._proxy_answered = about["return_value"][1]

    def _of_proxy(self, error: Exception) -> HostUnreachableError | None:
        """The error for a proxy that opened no way to the host; None where it did, or there is none."""
        if self._proxy is None or (self._proxy_answered is not None and 200 <= self._proxy_answered < 300):
            return None
        if self._proxy_answered is not None:
            return self._proxy.refused(self._proxy_answered, self.url)
        if isinstance(error, httpx.TimeoutException):
            return self._proxy.late(CONNECT_TIMEOUT if isinstance(error, httpx.ConnectTimeout) else ANSWER_TIMEOUT)
        if isinstance(error, httpx.RemoteProtocolError):
            return self._proxy.no_proxy()
        return self._proxy.unreachable(reason(error))


async def whole(answer: httpx.Response) -> httpx.Response:
    """An answer with its body, which is read here. Raises KohakuRiverError where that is longer than any of ours."""
    content = bytearray()
    try:
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > LONGEST_ANSWER:
                raise too_long()
    finally:
        await answer.aclose()
    headers = [(name, value) for name, value in answer.headers.items() if name not in _OF_THE_WAY]
    return httpx.Response(answer.status_code, headers=headers, content=bytes(content))


def too_long() -> KohakuRiverError:
    """The error for an answer that would fill this machine's memory: not every host is one, nor every proxy."""
    return KohakuRiverError("The answer of the host, or of what is between, has no end; check the host's URL.")


def unheard(error: HostUnreachableError) -> bool:
    """Whether no host has heard the request that failed like this."""
    return isinstance(error.__cause__, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError))


def _httpx_proxy(proxy: HttpProxy | None) -> httpx.Proxy | None:
    if proxy is None:
        return None
    context = tls.client_context(proxy.url)
    return httpx.Proxy(proxy.url, auth=proxy.credentials, ssl_context=context)
