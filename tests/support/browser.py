"""A browser with a page of a host open, as far as the host sees of it: cookies, and who sends what from where."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.support.host_only import HostUnderTest

__all__ = ["Browser", "link_of"]


class Browser:
    """One browser, which goes to the host by `name`, "" for that of its links.

    `site` of a request is what it says of the page that sent it, as Fetch Metadata has it.
    """

    def __init__(self, host: HostUnderTest, name: str = "") -> None:
        self.authority = f"{name or host.logins.name}:{urlsplit(host.url).port}"
        self.origin = f"http://{self.authority}"
        self.cookies: dict[str, str] = {}
        self._http = host.client(None)

    async def ask(
        self,
        method: str,
        path: str,
        *,
        site: str | None = "same-origin",
        origin: str | None = "",
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> httpx.Response:
        """The answer, whose cookies are kept. `origin` "" is this host's, where a browser sends one."""
        origin = (None if method == "GET" else self.origin) if origin == "" else origin
        sent = {"Host": self.authority, **(headers or {})}
        sent |= {} if origin is None else {"Origin": origin}
        sent |= {} if site is None else {"Sec-Fetch-Site": site}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        answer = await self._http.request(method, path, headers=sent, **more)
        self._http.cookies.clear()
        for field in answer.headers.get_list("set-cookie"):
            name, _, value = field.partition(";")[0].partition("=")
            self.cookies[name] = value.strip('"')
            if not self.cookies[name]:
                del self.cookies[name]
        return answer

    async def open(self, link: str, *, site: str = "none", **headers: str) -> httpx.Response:
        """Go to a link: by hand, or from a page of another `site`."""
        parts = urlsplit(link)
        fields = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Accept": "text/html", **headers}
        return await self.ask(
            "GET", f"{parts.path}?{parts.query}" if parts.query else parts.path, site=site, headers=fields
        )

    async def log_in(self, token: str) -> httpx.Response:
        """Send the form with a token."""
        return await self.ask("POST", "/login", data={"token": token})

    async def user(self) -> str | None:
        """As whom it is logged in."""
        answer = await self.ask("GET", "/api/auth")
        return str(answer.json()["user"]) if answer.status_code == 200 else None


async def link_of(client: httpx.AsyncClient) -> str:
    """A login link, made with a token."""
    answer = await client.post("/api/auth/link")
    assert answer.status_code == 201, answer.text
    path: str = answer.json()["path"]
    return path
