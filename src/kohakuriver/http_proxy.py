"""HTTP proxies between a user and a host: which one there is, and a tunnel through it.

Sources: docs/cli.md "Proxies"; RFC 9110 §9.3.6 (CONNECT), RFC 7617 (Basic credentials).
"""

from __future__ import annotations

import base64
import os
import socket
import sys
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from kohakuriver.errors import HostUnreachableError, UsageError
from kohakuriver.resolve import ascii_named, connected, resolving
from kohakuriver.tls import is_this_machine

__all__ = ["Connect", "HttpProxy", "connect_through", "http_proxy"]

VARIABLE = "KOHAKURIVER_PROXY"
MAX_HEAD = 16 * 1024

_PORTS = {"http": 80, "https": 443}
_BEGINNING = b"HTTP/1."


@dataclass(frozen=True)
class HttpProxy:
    """One proxy: its own address, whether it is spoken to by TLS, and what it is shown ("" for nothing)."""

    host: str
    port: int
    secure: bool = False
    name: str = ""
    password: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """The address, for people and programs: without the credentials."""
        return f"http{'s' if self.secure else ''}://{_authority(self.host, self.port)}"

    @property
    def credentials(self) -> tuple[str, str] | None:
        """Name and password, None where there are none."""
        return (self.name, self.password) if self.name or self.password else None

    def unreachable(self, reason: str) -> HostUnreachableError:
        """The error for a proxy that can't be reached, with the reason as a clause."""
        return self._error(f"can't be reached: {reason.rstrip('.')}", "proxy_unreachable")

    def late(self, timeout: float) -> HostUnreachableError:
        """The error for a proxy that has not answered for `timeout` seconds."""
        return self._error(f"did not answer within {timeout:g} s", "proxy_unreachable")

    def no_proxy(self) -> HostUnreachableError:
        """The error for what does not answer as a proxy does."""
        return self._error("does not answer as an HTTP proxy does", "proxy_unreachable")

    def refused(self, status: int, target: str) -> HostUnreachableError:
        """The error for a proxy that opened no tunnel to `target` (name:port), and answered with this HTTP status."""
        if status in (401, 407):  # 401 is what some say of wrong ones
            if self.credentials:
                what = "does not take the name and the password in its URL"
            else:
                what = "wants a name and a password; give its URL as http://NAME:PASSWORD@…"
        elif status in (502, 503, 504):
            what = f"can't reach {target}"
        else:
            what = f"does not let connections to {target} through"
        return self._error(f"{what} (HTTP status {status})", "proxy_refused")

    def _error(self, what: str, code: str) -> HostUnreachableError:
        advice = f"see to HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, or go without a proxy by {VARIABLE}=none"
        return HostUnreachableError(f"The proxy at {self.url} {what}; {advice}.", code=code)


def http_proxy(url: str) -> HttpProxy | None:
    """The proxy by which a user's program reaches the server at `url` (http, https, ws or wss); None for no proxy.

    KOHAKURIVER_PROXY says it for every server, "none" for none. Else it is what the standard library finds in
    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in either case (on macOS and Windows also in the system's
    settings), and nothing on this machine itself is reached by a proxy. Raises UsageError where it can't be used.
    """
    asked = os.environ.get(VARIABLE, "").strip()
    if asked:
        return None if asked == "none" else _parse(asked)
    if sys.platform not in ("darwin", "win32") and not any(name[-6:].lower() == "_proxy" for name in os.environ):
        return None  # before a module is imported that takes its time
    parts = urlsplit(url)
    if is_this_machine(parts.hostname or ""):
        return None
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    named = proxies.get(parts.scheme.replace("ws", "http")) or proxies.get("all")
    return _parse(named) if named and not proxy_bypass(parts.netloc.rpartition("@")[2]) else None


def _parse(text: str) -> HttpProxy:
    try:
        parts = urlsplit(ascii_named(text if "://" in text else f"http://{text}"))
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError("The address of the proxy in the environment is no URL.") from error
    if parts.scheme not in _PORTS or not host:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        raise UsageError(
            f"The proxy {shown} can't be used: only http:// and https:// proxies can. Name one in HTTPS_PROXY, or go "
            f"without a proxy by {VARIABLE}=none."
        )
    name, password = (unquote(part or "") for part in (parts.username, parts.password))
    return HttpProxy(host, port or _PORTS[parts.scheme], parts.scheme == "https", name, password)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Connect:
    """One CONNECT request. Sans-I/O: send `request`, and `feed` it what comes."""

    def __init__(self, proxy: HttpProxy, host: str, port: int) -> None:
        self._proxy = proxy
        with resolving():
            self._target = _authority(host if host.isascii() else host.encode("idna").decode(), port)
        self._head = b""

    @property
    def request(self) -> bytes:
        """What is sent to the proxy."""
        lines = [f"CONNECT {self._target} HTTP/1.1", f"Host: {self._target}", "User-Agent: kohakuriver"]
        if self._proxy.credentials:
            shown = base64.b64encode(":".join(self._proxy.credentials).encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {shown}")
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("ascii", "replace")

    def feed(self, data: bytes) -> bool:
        """Take what the proxy says, b"" where it hung up. True once the tunnel is open.

        Raises HostUnreachableError where it will not be.
        """
        self._head += data
        head, end, behind = self._head.partition(b"\r\n\r\n")
        if not data or not head.startswith(_BEGINNING[: len(head)]) or len(head) > MAX_HEAD:
            raise self._proxy.no_proxy()
        if not end:
            return False
        status = head.partition(b" ")[2][:3]
        if not status.isdigit():
            raise self._proxy.no_proxy()
        if not 200 <= int(status) < 300:
            raise self._proxy.refused(int(status), self._target)
        if behind:  # behind the tunnel a server waits for us to speak
            raise self._proxy.no_proxy()
        return True


def connect_through(proxy: HttpProxy, host: str, port: int, timeout: float) -> socket.socket:
    """A socket that leads through `proxy` to `host`:`port`; `timeout` in seconds is the socket's own too.

    Raises HostUnreachableError; UsageError for a proxy that is spoken to by TLS: the socket is handed to programs that
    know nothing of that.
    """
    if proxy.secure:
        raise UsageError(f"The proxy at {proxy.url} speaks TLS, which SSH can't be led through; name an http:// one.")
    try:
        connect = Connect(proxy, host, port)
        with resolving():
            sock = connected(proxy.host, proxy.port, timeout)
    except OSError as error:
        raise proxy.unreachable(error.strerror or str(error)) from error
    opened = False
    try:
        sock.sendall(connect.request)
        while not connect.feed(sock.recv(MAX_HEAD)):
            pass
        opened = True
    except TimeoutError as error:
        raise proxy.late(timeout) from error
    except OSError as error:
        raise proxy.unreachable(error.strerror or str(error)) from error
    finally:
        if not opened:
            sock.close()
    return sock
