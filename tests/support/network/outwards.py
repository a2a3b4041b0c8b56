"""A network namespace from which one can only go out: what comes from outside is refused. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.network.triangle import missing

__all__ = ["Inside", "missing", "only_outwards"]


@dataclass(frozen=True)
class Inside:
    """`outside` is this machine's address as seen from there, `address` the namespace's own."""

    name: str
    outside: str
    address: str

    @property
    def under(self) -> tuple[str, ...]:
        """What a command begins with that runs there."""
        return ("ip", "netns", "exec", self.name)


@contextlib.contextmanager
def only_outwards() -> Iterator[Inside]:
    """One, with a wire to this machine. Its firewall lets nothing in but answers."""
    number = os.getpid()
    net = f"10.{78 + number % 100}.{number // 100 % 250}"
    made = Inside(f"kr{number}-inside", f"{net}.1", f"{net}.2")
    with contextlib.ExitStack() as stack:
        _run("ip", "netns", "add", made.name)
        stack.callback(_run, "ip", "netns", "del", made.name)
        wire, far = f"kr{number}o", f"kr{number}i"
        _run("ip", "link", "add", wire, "type", "veth", "peer", "name", far, "netns", made.name)
        _run("ip", "address", "add", f"{made.outside}/30", "dev", wire)
        _run("ip", "link", "set", wire, "up")
        _run(*made.under, "ip", "address", "add", f"{made.address}/30", "dev", far)
        for device in ("lo", far):
            _run(*made.under, "ip", "link", "set", device, "up")
        firewall = (*made.under, "iptables", "-w", "-A", "INPUT")
        _run(*firewall, "-i", "lo", "-j", "ACCEPT")
        _run(*firewall, "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
        _run(*firewall, "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
        _run(*firewall, "-j", "DROP")
        yield made


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
