"""Golden vectors that every implementation of the wire is checked against; docs/protocol.md is what they pin."""

from __future__ import annotations
