"""A laptop, a host and a node, each in a network namespace of its own, with a wire from each to each. Needs root.

The node has one address for both others. What the laptop sends it by their own wire can be blocked, silently, and so
can what node and host send each other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Triangle", "missing", "triangle"]

PLACES = ("laptop", "host", "node")
HOST, NODE = "10.77.1.2", "10.77.9.9"


def missing() -> str:
    """What is missing for this, "" where nothing is."""
    if os.geteuid() != 0:
        return "root"
    return next((name for name in ("ip", "iptables") if shutil.which(name) is None), "")


@dataclass(frozen=True)
class Triangle:
    """`prefix` is what the names of its namespaces begin with."""

    prefix: str
    host: str = HOST
    node: str = NODE

    def under(self, place: str) -> tuple[str, ...]:
        """What a command begins with that runs there."""
        return ("ip", "netns", "exec", f"{self.prefix}{place}")

    def run(self, place: str, *command: str) -> None:
        subprocess.run([*self.under(place), *command], check=True, capture_output=True)

    @contextlib.contextmanager
    def blocked(self, peer: str) -> Iterator[None]:
        """Meanwhile nothing passes between the node and `peer`, and nobody is told."""
        address = {"laptop": "10.77.3.1", "host": "10.77.2.1"}[peer]
        rules = [("INPUT", "-s", address), ("OUTPUT", "-d", address)]
        for chain, *rule in rules:
            self.run("node", "iptables", "-w", "-A", chain, *rule, "-j", "DROP")
        try:
            yield
        finally:
            for chain, *rule in rules:
                self.run("node", "iptables", "-w", "-D", chain, *rule, "-j", "DROP")


@contextlib.contextmanager
def triangle() -> Iterator[Triangle]:
    """The three, wired."""
    made = Triangle(f"kr{os.getpid()}-")
    with contextlib.ExitStack() as stack:
        for place in PLACES:
            _ip("netns", "add", made.prefix + place)
            stack.callback(_ip, "netns", "del", made.prefix + place)
            made.run(place, "ip", "link", "set", "lo", "up")
        for net, (near, far) in enumerate((("laptop", "host"), ("host", "node"), ("laptop", "node")), 1):
            wire = [f"to-{far}", "netns", made.prefix + near, "type", "veth"]
            _ip("link", "add", *wire, "peer", "name", f"to-{near}", "netns", made.prefix + far)
            for place, other, number in ((near, far, 1), (far, near, 2)):
                made.run(place, "ip", "address", "add", f"10.77.{net}.{number}/30", "dev", f"to-{other}")
                made.run(place, "ip", "link", "set", f"to-{other}", "up")
        made.run("node", "ip", "address", "add", f"{NODE}/32", "dev", "lo")
        made.run("host", "ip", "route", "add", NODE, "via", "10.77.2.2")
        made.run("laptop", "ip", "route", "add", NODE, "via", "10.77.3.2")
        made.run("node", "ip", "route", "add", HOST, "via", "10.77.2.1")
        yield made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
