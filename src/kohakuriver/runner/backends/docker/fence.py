"""What containers on the tasks' network may reach on their node: the runner's listener for tunnels, and name servers.

It is done by rules of the kernel's packet filter, in one chain that is the same for all runners of a node. What listens
at the node's address on that network alone is there for its containers, as runners' listeners are; what listens on all
addresses of the node is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import structlog

__all__ = ["Fence", "bridge_of", "found", "name_servers", "rules"]

log = structlog.get_logger("kohakuriver.runner")

_CHAIN = "KOHAKURIVER"
_RESOLVERS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
_RUN_SECONDS = 20.0
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_WAIT = ("-w", "5")  # for another program that changes rules
# Before the engine turns a published port into one of its container, and after connections are known.
_TABLE, _HOOK = "mangle", "PREROUTING"


def rules(gateway: str | None, servers: Iterable[str]) -> str:
    """The chain as `iptables-restore` takes it, or with no `gateway` as `ip6tables-restore` does.

    Link-local addresses are those of RFC 3927 and RFC 4291 section 2.5.6; a cloud's own services are there, and at
    fd00:ec2::/32.
    """
    icmp, near = ("icmp", ["169.254.0.0/16"]) if gateway else ("ipv6-icmp", ["fe80::/10", "fd00:ec2::/32"])
    lines = ["-m conntrack --ctstate ESTABLISHED,RELATED -j RETURN", f"-p {icmp} -j RETURN"]
    lines += [f"-p {proto} -d {server} --dport 53 -j RETURN" for server in servers for proto in ("udp", "tcp")]
    lines += [f"-d {addresses} -j DROP" for addresses in near]
    if gateway:
        lines.append(f"-p tcp -d {gateway} -m socket -j RETURN")  # a socket that is bound to just this address
    lines.append("-m addrtype ! --dst-type UNICAST -j DROP")  # the node's own, broadcast, multicast
    body = "".join(f"-A {_CHAIN} {line}\n" for line in lines)
    return f"*{_TABLE}\n:{_CHAIN} - [0:0]\n{body}COMMIT\n"


def name_servers(files: Iterable[Path] = _RESOLVERS) -> list[str]:
    """Where this node, and with it its containers, asks for names: addresses."""
    found = []
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for line in file.read_text("utf-8").splitlines():
                words = line.split()
                if words[:1] == ["nameserver"] and len(words) > 1:
                    with contextlib.suppress(ValueError):
                        found.append(str(ip_address(words[1].partition("%")[0])))
    return list(dict.fromkeys(found))


def bridge_of(show: dict[str, Any]) -> str:
    """The node's interface of a bridge network, as the engine describes that."""
    return str((show.get("Options") or {}).get("com.docker.network.bridge.name") or f"br-{show['Id'][:12]}")


class Fence:
    """The rules for one network; says once where there can be none."""

    def __init__(self) -> None:
        self._said = False
        self._lock = asyncio.Lock()

    async def put_up(self, show: dict[str, Any], gateway: str) -> None:
        """See that the rules are there for the network that the engine describes so."""
        async with self._lock:
            try:
                await asyncio.get_running_loop().run_in_executor(
                    None, _put_up, bridge_of(show), gateway, bool(show.get("EnableIPv6"))
                )
            except OSError as error:
                if not self._said:
                    log.warning(
                        "CONTAINERS CAN REACH THE NODE'S OWN SERVICES AND ITS LINK-LOCAL ADDRESSES: only root on the "
                        "engine's own machine, with iptables, keeps them from it",
                        reason=str(error),
                    )
                self._said = True


def found(program: str) -> str:
    """Where one of the packet filter's programs is: often not on the path of whoever starts a runner.

    Raises OSError.
    """
    where = shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", os.defpath), _SBIN)))
    if where is None:
        raise OSError(f"this machine has no {program}; install iptables")
    return where


def _put_up(bridge: str, gateway: str, with_v6: bool) -> None:
    """Raises OSError. Blocks for a moment."""
    if not Path(f"/sys/class/net/{bridge}").exists():
        raise OSError(f"this machine has no interface {bridge}")
    servers = [ip_address(server) for server in name_servers()]
    _chain("iptables", bridge, rules(gateway, [str(s) for s in servers if isinstance(s, IPv4Address)]))
    try:
        _chain("ip6tables", bridge, rules(None, [str(s) for s in servers if not isinstance(s, IPv4Address)]))
    except OSError:
        if with_v6:
            raise


def _chain(program: str, bridge: str, text: str) -> None:
    _run(f"{program}-restore", "--noflush", *_WAIT, stdin=text)
    jump = ("-i", bridge, "-j", _CHAIN)
    there = [line.split() for line in _run(program, *_WAIT, "-t", _TABLE, "-S", _HOOK).splitlines()]
    for words in there:
        if words[0] == "-A" and words[-2:] == ["-j", _CHAIN] and tuple(words[2:]) != jump:  # of a network that has gone
            with contextlib.suppress(OSError):  # another runner was faster
                _run(program, *_WAIT, "-t", _TABLE, "-D", *words[1:])
    if not any(tuple(words[2:]) == jump for words in there):
        _run(program, *_WAIT, "-t", _TABLE, "-I", _HOOK, "1", *jump)


def _run(*command: str, stdin: str = "") -> str:
    """What a command prints. Raises OSError, with what it says where it fails."""
    program = found(command[0])
    try:
        done = subprocess.run(
            [program, *command[1:]], input=stdin, capture_output=True, text=True, timeout=_RUN_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]}: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} did not end") from error
    return done.stdout
