"""Plain implementations of what the project has in C: the oracles of the conformance suite."""

from __future__ import annotations
