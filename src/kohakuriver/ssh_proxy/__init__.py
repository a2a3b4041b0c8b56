"""The SSH proxy: one TCP port of the host that leads to the SSH servers of its tasks (docs/protocol.md §7).

It has two programs' parts: `jump_process` runs by itself, and what it imports makes its start slow; so nothing is here.
"""
