"""How the addresses of apps at this host are called. No I/O.

    https://lab-8888-k3hd7wq2m5ta.apps.example.org/     with a domain for them
    http://lab-8888-k3hd7wq2m5ta.localhost:8000/        on one's own machine, with nothing set up

The last word is a tag, which is made of the task's id and the port with a key: a task of the same name that comes later
has another address, and so none of what the first one's pages have left in a browser. On one's own machine it also
keeps others' pages from guessing the name: to what listens on other ports of that name a browser sends the cookie too.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, replace
from functools import cached_property
from urllib.parse import SplitResult, urlsplit

from kohakuriver.errors import UsageError
from kohakuriver.gateway.names import Place, authority, is_label

__all__ = ["Address", "Addresses", "domain_in", "url_in"]

MOST_KNOWN = 1024
"""How many addresses are remembered as they were read: each request names one again."""

_TAG = 12
_LONGEST_LABEL = 63 - len("-65535-") - _TAG
_OWN = re.compile(rf"(?P<label>[a-z0-9-]+)-(?P<port>[1-9][0-9]{{0,4}})-(?P<tag>[a-z2-7]{{{_TAG}}})")
_SHORT = re.compile(r"(?P<label>[a-z0-9-]+)-(?P<port>[1-9][0-9]{0,4})")
_HOST = re.compile(r"(?P<name>[a-z0-9.-]{1,253})(?::(?P<port>[1-9][0-9]{0,4}))?")
_DOMAIN = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_LOCAL = ".localhost"


def domain_in(text: str) -> str:
    """A domain that is written down, as `apps.example.org`. Raises UsageError."""
    domain = text.lower().removeprefix("*.")
    if not _DOMAIN.fullmatch(domain) or len(domain) > 253 - 64 or domain.endswith(_LOCAL):
        raise UsageError(f"{text[:100]!r} is no domain for apps: give one as in `--apps-domain apps.example.org`.")
    return domain


def url_in(text: str) -> SplitResult:
    """The URL of a host that is written down, as `https://river.example.org`. Raises UsageError."""
    try:
        parts = urlsplit(text.lower())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    bare = authority(parts.hostname or "", port, parts.scheme) if port and parts.scheme in ("http", "https") else None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or "@" in text:
        raise UsageError(
            f"{text[:100]!r} is no URL of a host: give one as in `--public-url https://river.example.org`."
        )
    return parts._replace(netloc=bare or parts.netloc.removesuffix(":"), path="", query="", fragment="")


@dataclass(frozen=True)
class Address:
    """An address as a browser has it; `tag` is "" where it is only the short one that leads to the app's own."""

    label: str
    port: int
    tag: str
    name: str
    served_on: int
    scheme: str

    @cached_property
    def place(self) -> Place:
        """What is served there."""
        return Place(self.label, self.port, self.served_on, name=self.name, scheme=self.scheme)

    @cached_property
    def preserved(self) -> Place:
        """The same, where the service is told the address itself."""
        return replace(self.place, preserve_host=True)

    @cached_property
    def host(self) -> str:
        """What a browser puts into Host."""
        return self.place.host


class Addresses:
    """All addresses of apps of one host.

    Args:
        key: what tags are made with, the same for all hosts of one database.
        local_name: what browsers on this machine call the host, where it has no TLS.
        tls: whether the host itself serves TLS.
        domain: what is behind the names of apps; None for names under localhost, on one's own machine.
        public: where browsers find the host, which a domain needs.
    """

    def __init__(
        self, key: bytes, local_name: str, *, tls: bool, domain: str | None = None, public: SplitResult | None = None
    ) -> None:
        self._key = key
        self._local_name = local_name
        self._tls = tls
        self._domain = domain
        self._public = public
        self._known: dict[str, Address] = {}  # by what Host said
        if domain is not None and public is None:
            raise UsageError("--apps-domain needs the host's own address: give --public-url https://NAME.")
        if domain is not None and public is not None and _within(public.hostname or "", domain):
            # Pages of apps may set cookies for the domain that they are in.
            raise UsageError(f"The host can't be at {public.hostname}, where apps are; give these another domain.")

    @property
    def on_own_machine(self) -> bool:
        """Whether apps have names under localhost: then nobody is to be told by them what the host is called."""
        return self._domain is None

    def owns(self, host: str) -> bool:
        """Whether what `Host` says is the name of an app, or in the place where only those are."""
        found = _HOST.fullmatch(host.lower())
        name = (found["name"] if found else host.lower()).removesuffix(".")
        if self._domain is not None:
            return _within(name, self._domain)
        return name.endswith(_LOCAL) and _OWN.fullmatch(name.removesuffix(_LOCAL)) is not None

    def read(self, host: str) -> Address | None:
        """The address that `Host` says, None where it is none."""
        address = self._known.get(host)
        if address is None and (address := self._read(host)) is not None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[host] = address
        return address

    def _read(self, host: str) -> Address | None:
        found = _HOST.fullmatch(host.lower())
        ending = _LOCAL if self._domain is None else f".{self._domain}"
        if found is None or not found["name"].endswith(ending) or (self._domain is None and self._tls):
            return None
        first = found["name"].removesuffix(ending)
        words = _OWN.fullmatch(first) or (None if self._domain is None else _SHORT.fullmatch(first))
        if words is None or not is_label(words["label"]) or int(words["port"]) > 65535:
            return None
        address = self._address(words["label"], int(words["port"]), words.groupdict().get("tag", ""), found["port"])
        return address if address.host == host.lower() else None

    def of(self, task_id: int, name: str | None, port: int, host: str) -> Address | None:
        """The address of a port, for a browser that is at the host by `host`; None where it can't get to any.

        Args:
            name: what the task is called.
            port: that of the task.
        """
        found = _HOST.fullmatch(host.lower())
        if found is None or (self._domain is None and (self._tls or found["name"] != self._local_name)):
            return None
        usable = name is not None and is_label(name) and len(name) <= _LONGEST_LABEL and not name.isdigit()
        label = name if usable and name is not None else str(task_id)
        return self._address(label, port, self.tag(task_id, port), found["port"])

    def main(self, address: Address) -> str:
        """The origin of the host itself, for a browser that is at an app."""
        if self._public is not None:
            return self._public.geturl()
        return f"http://{authority(self._local_name, address.served_on)}"

    def tag(self, task_id: int, port: int) -> str:
        """The tag of a port."""
        digest = hmac.digest(self._key, f"app {task_id} {port}".encode(), hashlib.sha256)
        return base64.b32encode(digest).decode()[:_TAG].lower()

    def _address(self, label: str, port: int, tag: str, served_on: str | None) -> Address:
        first = f"{label}-{port}-{tag}" if tag else f"{label}-{port}"
        if self._domain is None or self._public is None:
            return Address(label, port, tag, f"{first}{_LOCAL}", int(served_on or 80), "http")
        scheme = self._public.scheme
        on = self._public.port or {"http": 80, "https": 443}[scheme]
        return Address(label, port, tag, f"{first}.{self._domain}", on, scheme)


def _within(name: str, domain: str) -> bool:
    return name == domain or name.endswith(f".{domain}")
