"""Keeps web pages of others out: cross-site WebSockets, cross-site requests, and DNS rebinding.

A browser lets any page open WebSockets and send simple requests anywhere, with the page's address in `Origin` (RFC 6455
§10.2). And the owner of a domain can have its name resolve to an address of ours, after which the browser takes us for
a part of that page's site: then only the name in `Host` tells. Programs send no Origin, and none is asked of them.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from urllib.parse import SplitResult, urlsplit

from kohakuriver.errors import NotAllowedError

__all__ = ["Guard", "is_own_page"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_LONGEST_SHOWN = 100
_OWN_SITES = frozenset({"same-origin", "none"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """Judges requests by their `Host` and `Origin`.

    Args:
        names: names that a server is known by beside its IP addresses, `localhost` and the machine's own name, e.g.
            from the address that it advertises.
        hosts: the same, named by the server's administrator: they are asked for wherever a request arrives, while
            otherwise only what arrives over loopback must have a known name. "*" stands for every name.
        origins: other sites whose pages may connect, as `https://name[:port]`.
        elsewhere: whether what `Host` says is served by something else here, and never by this server.
    """

    def __init__(
        self,
        *,
        names: Iterable[str] = (),
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        elsewhere: Callable[[str], bool] = lambda host: False,
    ) -> None:
        self._elsewhere = elsewhere
        named = {name.lower() for name in hosts}
        self._any_host = "*" in named
        self._always = bool(named)
        self._names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names), *named}
        self._origins = {origin.rstrip("/").lower() for origin in origins}

    def check(self, hosts: list[str], origins: list[str], local: str | None) -> None:
        """Judge a request by all its Host and Origin headers; `local` is the address of ours that it came to.

        Raises NotAllowedError "host_not_allowed" or "origin_not_allowed", or "misdirected" (421).
        """
        host = hosts[0] if len(hosts) == 1 else ""
        if any(map(self._elsewhere, hosts)):
            raise NotAllowedError(
                "This connection began with a request to another name; a proxy has to keep connections for the "
                "addresses of apps apart.",
                code="misdirected",
                status=421,
            )
        name = _name(host)
        if name is None or ((self._always or _is_loopback(local)) and not self._knows(name)):
            raise NotAllowedError(
                f"This server is not known by the name {host[:_LONGEST_SHOWN]!r}; use its address, or start it with "
                "--allowed-host and that name.",
                code="host_not_allowed",
            )
        for origin in origins:
            self._check_origin(origin.lower(), host)

    def _check_origin(self, origin: str, host: str) -> None:
        if origin in self._origins:
            return
        parts = _parts(origin)
        if parts is not None and parts.netloc == host.lower() and not self._knows(parts.hostname or ""):
            raise NotAllowedError(
                f"Pages of this server may not use it by the name {host[:_LONGEST_SHOWN]!r}, which it does not know: "
                "use its address, or start it with --allowed-host and that name.",
                code="origin_not_allowed",
            )
        if parts is None or not self._is_same(parts.scheme, parts.netloc, host):
            raise NotAllowedError(
                f"A page of {origin[:_LONGEST_SHOWN]!r} may not use this server; if it should, start the server with "
                "--allowed-origin and that origin.",
                code="origin_not_allowed",
            )

    def _is_same(self, scheme: str, netloc: str, host: str) -> bool:
        """Whether a page of ours made the request: one that came from the name and port that the request goes to."""
        name = _name(netloc)
        default = _DEFAULT_PORTS.get(scheme)
        return (
            name is not None
            and default is not None
            and self._knows(name)
            and (name, _port(netloc, default)) == (_name(host), _port(host, default))
        )

    def _knows(self, name: str) -> bool:
        return self._any_host or name in self._names or name.endswith(".localhost") or _is_address(name)


def is_own_page(method: str, host: str, origins: list[str], sites: list[str], *, tls: bool) -> bool:
    """Whether a page of this very origin sent a request, or the user without a page, as far as the browser says.

    What comes with a cookie is judged by this. To a browser all ports of a name, and the names of one domain, are one
    site: it sends cookies to them from each other's pages (Fetch Metadata, RFC 6265bis section 5.2).

    Args:
        host: what `Host` says, which a `Guard` has let through.
        origins: all `Origin` headers.
        sites: all `Sec-Fetch-Site` headers. Browsers send none to a name without TLS that is not this machine's.
        tls: whether it came over TLS. Where it did not, there may be a proxy before us to which it did.
    """
    own = {f"https://{host.lower()}", *([] if tls else [f"http://{host.lower()}"])}
    if any(origin.lower() not in own for origin in origins) or not _OWN_SITES.issuperset(sites):
        return False
    return bool(origins or sites) or method in _SAFE


def _parts(origin: str) -> SplitResult | None:
    try:
        return urlsplit(origin) if "://" in origin else None
    except ValueError:
        return None


def _name(host: str) -> str | None:
    """The name in `name[:port]`, None where that is no such thing."""
    if not host or any(character in host for character in "/\\@?#% ") or not host.isascii():
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # a bad one raises
        return (parts.hostname or "").removesuffix(".") or None
    except ValueError:
        return None


def _port(host: str, default: int) -> int:
    return urlsplit(f"//{host}").port or default


def _is_address(name: str) -> bool:
    # A browser sends an address only where the page's author wrote one: no name was resolved, so none was rebound.
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(address: str | None) -> bool:
    try:
        found = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return False
    # What listens on :: sees 127.0.0.1 as ::ffff:127.0.0.1.
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
