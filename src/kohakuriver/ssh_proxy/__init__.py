"""The SSH proxy: one TCP port of the host that leads to the SSH servers of its tasks (docs/protocol.md §7)."""

from __future__ import annotations

from kohakuriver.ssh_proxy.server import SshProxy

__all__ = ["SshProxy"]
