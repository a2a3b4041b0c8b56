"""How the addresses of apps at this host are called. No I/O.

    https://lab-8888-k3hd7wq2m5ta.apps.example.org/     with a domain for them
    http://lab-8888-k3hd7wq2m5ta.localhost:8000/        on one's own machine, with nothing set up
    https://apps.example.org/lab-k3hd7wq2m5ta/8888/     where there are no names for that: one origin for all apps

The last word of the name is a tag, which is made of the task's id and the port with a key: a task of the same name that
comes later has another address, and so none of what the first one's pages have left in a browser. On one's own machine
it also keeps others' pages from guessing the name: to what listens on other ports of that name a browser sends the
cookie too. Under one origin it is the task's, which can tell its services their prefix before they are started.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from urllib.parse import SplitResult, urlsplit

from kohakuriver.errors import UsageError
from kohakuriver.gateway.names import Place, authority, is_label

__all__ = ["PREFIX_VARIABLE", "Address", "Addresses", "climbs", "domain_in", "url_in"]

MOST_KNOWN = 1024
"""How many addresses are remembered as they were read: each request names one again."""

PREFIX_VARIABLE = "KOHAKURIVER_WEB_PREFIX"
"""What tells a task where its ports are under one origin: the port stands behind it, as in `/lab-k3hd7wq2m5ta/8888`."""

_TAG = 12
_LONGEST_LABEL = 63 - len("-65535-") - _TAG
_OWN = re.compile(rf"(?P<label>[a-z0-9-]+)-(?P<port>[1-9][0-9]{{0,4}})-(?P<tag>[a-z2-7]{{{_TAG}}})")
_SHORT = re.compile(r"(?P<label>[a-z0-9-]+)-(?P<port>[1-9][0-9]{0,4})")
_PORT = rb"/(?P<port>[1-9][0-9]{0,4})(?=[/?]|$)"
_OWN_PREFIX = re.compile(rb"/(?P<label>[a-z0-9-]+)-(?P<tag>[a-z2-7]{%d})" % _TAG + _PORT)
_SHORT_PREFIX = re.compile(rb"/(?P<label>[a-z0-9-]+)" + _PORT)
_CLIMBS = re.compile(rb"(?i)[^?]*[/\\](?:\.|%2e){1,2}(?:[/\\?]|$)")
_HOST = re.compile(r"(?P<name>[a-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::(?P<port>[1-9][0-9]{0,4}))?")
_DOMAIN = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_LOCAL = ".localhost"
_DEFAULT = {"http": 80, "https": 443}


def domain_in(text: str) -> str:
    """A domain that is written down, as `apps.example.org`. Raises UsageError."""
    domain = text.lower().removeprefix("*.")
    if not _DOMAIN.fullmatch(domain) or len(domain) > 253 - 64 or domain.endswith(_LOCAL):
        raise UsageError(f"{text[:100]!r} is no domain for apps: give one as in `--apps-domain apps.example.org`.")
    return domain


def climbs(target: bytes) -> bool:
    """Whether a path has a part that leads elsewhere, `.` or `..`: no browser sends one."""
    return _CLIMBS.match(target) is not None


def url_in(text: str, example: str = "--public-url https://river.example.org") -> SplitResult:
    """The URL of a host that is written down, as in the option that is the `example`. Raises UsageError."""
    try:
        parts = urlsplit(text.lower())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    bare = authority(name, port, parts.scheme) if port and parts.scheme in ("http", "https") else None
    more = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in text
    if parts.scheme not in ("http", "https") or not parts.hostname or more:
        raise UsageError(f"{text[:100]!r} is no URL of a host: give one as in `{example}`.")
    return parts._replace(netloc=bare or parts.netloc.removesuffix(":"), path="", query="", fragment="")


@dataclass(frozen=True)
class Address:
    """An address as a browser has it; `tag` is "" where it is only the short one that leads to the app's own.

    `prefix` is its path, "" where its name is its own.
    """

    label: str
    port: int
    tag: str
    name: str
    served_on: int
    scheme: str
    prefix: str = ""

    @cached_property
    def place(self) -> Place:
        """What is served there."""
        return Place(self.label, self.port, self.served_on, name=self.name, scheme=self.scheme, prefix=self.prefix)

    @cached_property
    def places(self) -> Mapping[tuple[bool, bool], Place]:
        """The same, by whether the service is told the name of the address, and the paths that are under it."""
        both = (False, True)
        return {
            (host, prefix): replace(self.place, preserve_host=host, keep_prefix=prefix)
            for host in both
            for prefix in both
        }

    @property
    def host(self) -> str:
        """What a browser puts into Host."""
        return self.place.host

    @property
    def home(self) -> str:
        """The path of its first page, under which all others are."""
        return f"{self.prefix}/"

    @cached_property
    def key(self) -> str:
        """What it has and no other address: what a browser puts into Host, and its path."""
        return f"{self.host}{self.prefix}"


class Addresses:
    """All addresses of apps of one host.

    Args:
        key: what tags are made with, the same for all hosts of one database.
        local_name: what browsers on this machine call the host, where it has no TLS.
        tls: whether the host itself serves TLS.
        domain: what is behind the names of apps; None for names under localhost, on one's own machine.
        public: where browsers find the host, which a domain and `shared` need.
        shared: the one origin of all apps, in the place of names.
    """

    def __init__(
        self,
        key: bytes,
        local_name: str,
        *,
        tls: bool,
        domain: str | None = None,
        public: SplitResult | None = None,
        shared: SplitResult | None = None,
    ) -> None:
        self._key = key
        self._local_name = local_name
        self._tls = tls
        self._domain = domain
        self._public = public
        self._shared = shared
        self._known: dict[str | bytes, Address] = {}  # by what Host said, or by the prefix
        if domain is not None and public is None:
            raise UsageError("--apps-domain needs the host's own address: give --public-url https://NAME.")
        if domain is not None and public is not None and _within(public.hostname or "", domain):
            # Pages of apps may set cookies for the domain that they are in.
            raise UsageError(f"The host can't be at {public.hostname}, where apps are; give these another domain.")
        if shared is not None:
            _check_apart(shared, public)

    @property
    def on_own_machine(self) -> bool:
        """Whether apps have names under localhost: then nobody is to be told by them what the host is called."""
        return self._domain is None and self._shared is None

    @property
    def have_prefixes(self) -> bool:
        """Whether all apps are under one origin."""
        return self._shared is not None

    def owns(self, host: str) -> bool:
        """Whether what `Host` says is the name of an app, or in the place where only those are.

        Of the one origin of all apps that is its name, and where the host has the same one, its port.
        """
        found = _HOST.fullmatch(host.lower())
        name = (found["name"] if found else host.lower()).removesuffix(".")
        if self._shared is not None and self._public is not None:
            port = int((found and found["port"]) or _DEFAULT[self._shared.scheme])
            of_host = _name_in(self._shared) == _name_in(self._public)
            return name == _name_in(self._shared) and (not of_host or port == _on(self._shared))
        if self._domain is not None:
            return _within(name, self._domain)
        return name.endswith(_LOCAL) and _OWN.fullmatch(name.removesuffix(_LOCAL)) is not None

    def read(self, host: str, target: bytes = b"/") -> Address | None:
        """The address that `Host` and the path of a request say, None where that is none."""
        if self._shared is not None:
            return self._under(host, target)
        address = self._known.get(host)
        return self._keep(host, self._read(host)) if address is None else address

    def named(self, key: str) -> Address | None:
        """The address that has this key, None where none has."""
        host, slash, path = key.partition("/")
        address = self.read(host, f"{slash}{path}".encode("ascii", "replace") or b"/")
        return address if address is not None and address.key == key else None

    def _keep(self, said: str | bytes, address: Address | None) -> Address | None:
        if address is not None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[said] = address
        return address

    def _under(self, host: str, target: bytes) -> Address | None:
        """The address that a path under the one origin of all apps begins with."""
        assert self._shared is not None
        words = _OWN_PREFIX.match(target) or _SHORT_PREFIX.match(target)
        if words is None or host.lower() != self._shared.netloc:
            return None
        address = self._known.get(words[0])
        label, port = words["label"].decode(), int(words["port"])
        if address is not None or not is_label(label) or port > 65535:
            return address
        return self._keep(words[0], self._prefixed(label, port, words.groupdict().get("tag", b"").decode()))

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
        if self._shared is not None:
            return self._prefixed(_label(task_id, name), port, self.tag(task_id, port))
        found = _HOST.fullmatch(host.lower())
        if found is None or (self._domain is None and (self._tls or found["name"] != self._local_name)):
            return None
        return self._address(_label(task_id, name), port, self.tag(task_id, port), found["port"])

    def variables(self, task_id: int, name: str | None) -> Mapping[str, str]:
        """What a task is told of where its ports are: a variable, where they are under one origin."""
        if self._shared is None:
            return {}
        return {PREFIX_VARIABLE: f"/{_label(task_id, name)}-{self.tag(task_id, 0)}"}

    def main(self, address: Address) -> str:
        """The origin of the host itself, for a browser that is at an app."""
        if self._public is not None:
            return self._public.geturl()
        return f"http://{authority(self._local_name, address.served_on)}"

    def tag(self, task_id: int, port: int) -> str:
        """The tag of a port; under one origin all ports of a task have one."""
        what = f"app {task_id} {port}" if self._shared is None else f"apps {task_id}"
        digest = hmac.digest(self._key, what.encode(), hashlib.sha256)
        return base64.b32encode(digest).decode()[:_TAG].lower()

    def _address(self, label: str, port: int, tag: str, served_on: str | None) -> Address:
        first = f"{label}-{port}-{tag}" if tag else f"{label}-{port}"
        if self._domain is None or self._public is None:
            return Address(label, port, tag, f"{first}{_LOCAL}", int(served_on or 80), "http")
        return Address(label, port, tag, f"{first}.{self._domain}", _on(self._public), self._public.scheme)

    def _prefixed(self, label: str, port: int, tag: str) -> Address:
        assert self._shared is not None
        prefix = f"/{label}-{tag}/{port}" if tag else f"/{label}/{port}"
        return Address(label, port, tag, _name_in(self._shared), _on(self._shared), self._shared.scheme, prefix)


def _label(task_id: int, name: str | None) -> str:
    """What a task is called in an address."""
    usable = name is not None and is_label(name) and len(name) <= _LONGEST_LABEL and not name.isdigit()
    return name if usable and name is not None else str(task_id)


def _on(url: SplitResult) -> int:
    """The port that a URL leads to."""
    return url.port or _DEFAULT[url.scheme]


def _name_in(url: SplitResult) -> str:
    """The name or address in a URL, as it stands in Host."""
    return url.netloc if url.port is None else url.netloc.removesuffix(f":{url.port}")


def _check_apart(shared: SplitResult, public: SplitResult | None) -> None:
    """Raises UsageError where apps at `shared` would not be apart from the host, which is at `public`."""
    if public is None:
        raise UsageError("--apps-url needs the host's own address: give --public-url https://NAME.")
    if shared.scheme != public.scheme:
        raise UsageError(f"--apps-url must begin with {public.scheme}://, as the host's own address does.")
    if shared.netloc == public.netloc:
        raise UsageError(f"--apps-url must have another name or port than the host's own address, {public.geturl()}.")
    if shared.hostname != public.hostname and _within(public.hostname or "", shared.hostname or ""):
        # Pages of apps may set cookies for all names under their own.
        raise UsageError(
            f"The host can't be at {public.hostname}, which is under that of --apps-url; give another one."
        )


def _within(name: str, domain: str) -> bool:
    return name == domain or name.endswith(f".{domain}")
