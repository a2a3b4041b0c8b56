"""Tasks that are process groups of the runner's own user."""

from __future__ import annotations
