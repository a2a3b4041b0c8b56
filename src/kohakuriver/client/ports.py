"""Which ports a forward is of, and where it listens, as its user says it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from kohakuriver.errors import UsageError

__all__ = [
    "LOOPBACK",
    "LOOPBACKS",
    "SOCKS",
    "UNIX",
    "PortForward",
    "PortSpec",
    "check_distinct",
    "exposes",
    "is_udp",
    "parse_port",
]

# Both loopback addresses: a program that is told `localhost` may take either.
LOOPBACK = "localhost"
LOOPBACKS = ("127.0.0.1", "::1")

PortSpec = int | str
UNIX = "unix:"
"""What a local side begins with that is the path of a Unix socket."""
SOCKS = "socks5"
"""What a local port speaks on which programs say themselves where they want to go."""


@dataclass(frozen=True)
class PortForward:
    """One local port that leads to a port of the task. `local` 0 is any free port; `proto` is `tcp` or `udp`.

    With `path`, a Unix socket there is in the place of the local port, for TCP. With SOCKS for `proto` who connects
    says which port it is, and `remote` is 0.
    """

    local: int
    remote: int
    proto: str = "tcp"
    path: str | None = None


def is_udp(port: PortForward) -> bool:
    """Whether its local port is one of UDP's; all others are TCP's."""
    return port.proto == "udp"


def parse_port(spec: PortSpec, *, proto: str = "tcp", local: int | None = None) -> PortForward:
    """`REMOTE`, `LOCAL:REMOTE` or `unix:PATH:REMOTE`, each with `/tcp` or `/udp`, as a PortForward.

    `proto` and `local` stand where the text names none; a `local` of None is the remote port's number.
    Raises UsageError for ports outside 1..65535 (0 only as LOCAL) and unknown protocols.
    """
    text = str(spec)
    if text.startswith(UNIX):
        return _unix(text, proto)
    ports, slash, suffix = text.partition("/")
    left, colon, right = ports.rpartition(":")
    remote = _port_number(right, text)
    given = _port_number(left, text, least=0) if colon else local
    if given is not None and not 0 <= given <= 65535:
        raise UsageError(f"The local port must be between 0 (any free one) and 65535, not {given}.")
    kind = suffix if slash else proto
    if kind not in ("tcp", "udp"):
        raise UsageError(f"The protocol must be tcp or udp, not {kind!r}.")
    return PortForward(remote if given is None else given, remote, kind)


def _unix(text: str, proto: str) -> PortForward:
    path, _, port = text.removeprefix(UNIX).rpartition(":")
    remote, slash, suffix = port.partition("/")
    if not path or "\0" in path:
        raise UsageError(
            f"{text!r} lacks the path or the port: a Unix socket here is unix:PATH:REMOTE, in the task LOCAL:unix:PATH."
        )
    if (suffix if slash else proto) != "tcp":
        raise UsageError(f"{text!r} can't be had: a Unix socket leads to a TCP port.")
    return PortForward(0, _port_number(remote, text), "tcp", path)


def _port_number(text: str, whole: str, *, least: int = 1) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{whole!r} is not a port: give REMOTE or LOCAL:REMOTE, as in 8888 or 9999:8888.")
    number = int(text) if len(text) <= 6 else 1_000_000
    if not least <= number <= 65535:
        place = "a local port must be between 0 (any free one) and 65535" if least == 0 else "must be 1 to 65535"
        raise UsageError(f"Port {text} is out of range: {place}.")
    return number


def exposes(local_host: str) -> bool:
    """Whether listening on `local_host` lets other machines in."""
    if local_host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(local_host).is_loopback
    except ValueError:
        return True


def check_distinct(ports: Sequence[PortForward], *, any_port: bool = False) -> None:
    """Raises UsageError where two want the same local port, or there are none and `any_port` brings none."""
    if not ports and not any_port:
        raise UsageError("Give at least one remote port.")
    taken = [(port.local, "udp" if is_udp(port) else "tcp") for port in ports if port.local]
    for local, proto in taken:
        if taken.count((local, proto)) > 1:
            raise UsageError(f"The local port {local} ({proto}) is given more than once.")
    paths = [port.path for port in ports if port.path is not None]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"The Unix socket {path} is given more than once.")
