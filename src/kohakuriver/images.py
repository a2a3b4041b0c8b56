"""Names of container images: what they may look like, and which registries a node fetches them from.

The engine sends requests to whatever registry a name gives it, from its node and with its node's rights. So a name is
taken apart here before an engine sees it, and a node asks only the registries that its administrator trusts.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["DEFAULT_REGISTRY", "EVERY_REGISTRY", "ImageName", "Registries"]

DEFAULT_REGISTRY = "docker.io"
"""Where an engine looks for a name without a registry."""
EVERY_REGISTRY = "*"

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REST = re.compile(
    rf"(?P<path>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(?:@(?P<digest>[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,128}))?"
)
_ENGINE_ID = re.compile(r"sha256:[0-9a-f]{64}")
_LONGEST = 255
_ALIASES = {"index.docker.io": DEFAULT_REGISTRY, "registry-1.docker.io": DEFAULT_REGISTRY}


@dataclass(frozen=True)
class ImageName:
    """A name as `docker pull` takes it: ``[registry[:port]/]path[:tag][@digest]``, or an image's id, ``sha256:…``.

    Source: the grammar of the distribution project (`reference` package), which Docker and OCI registries follow.
    An id has no registry: it names what the engine has.
    """

    registry: str | None
    path: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Raises ValueError, with what a name looks like, where ``text`` is none."""
        if _ENGINE_ID.fullmatch(text):
            return cls(None, "", digest=text)
        registry, rest = _registry_of(text)
        match = _REST.fullmatch(rest)
        if match is None or _REGISTRY.fullmatch(registry) is None or len(f"{registry}/{match['path']}") > _LONGEST:
            raise ValueError(
                f"{text[:80]!r} is no name of an image; write it as docker does, like debian:12 or ghcr.io/lab/torch:2"
            )
        return cls(_ALIASES.get(registry.lower(), registry.lower()), match["path"], match["tag"], match["digest"])


def _registry_of(text: str) -> tuple[str, str]:
    """The registry and what follows it: the first part is one only where it can't be a part of a path."""
    first, slash, rest = text.partition("/")
    if slash and (first == "localhost" or first != first.lower() or any(mark in first for mark in ".:[")):
        return first, rest
    return DEFAULT_REGISTRY, text


class Registries:
    """The registries that a node may fetch from: ``names`` with their ports, or EVERY_REGISTRY.

    EVERY_REGISTRY leaves out those on the node itself or on its own link: such an address is meant only where an
    administrator has written it down.
    """

    def __init__(self, names: Iterable[str] = (DEFAULT_REGISTRY,)) -> None:
        """Raises ValueError for what can't be a registry's name."""
        self.names = frozenset(_ALIASES.get(name.lower(), name.lower()) for name in names)
        for name in self.names - {EVERY_REGISTRY}:
            if _REGISTRY.fullmatch(name) is None:
                raise ValueError(f"{name!r} is no registry; write its name, and a port if it has one, like ghcr.io")

    def allow(self, registry: str) -> bool:
        """Whether images of ``registry`` may be fetched."""
        return registry in self.names or (EVERY_REGISTRY in self.names and not _is_near(registry))


def _is_near(registry: str) -> bool:
    """Whether this is an address of the node itself or of its own link, whatever port."""
    host = re.sub(r":[0-9]*$", "", registry).strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return bool(re.fullmatch(r"(?:0x[0-9a-f]+|[0-9]+)(?:\.(?:0x[0-9a-f]+|[0-9]+))*", host))  # inet_aton's spellings
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_link_local or mapped.is_unspecified)
