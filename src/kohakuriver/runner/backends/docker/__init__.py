"""Tasks that are containers of a Docker engine."""

from __future__ import annotations
