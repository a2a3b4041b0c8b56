"""Tasks that are process groups of the runner's own user, or of another."""

from __future__ import annotations
