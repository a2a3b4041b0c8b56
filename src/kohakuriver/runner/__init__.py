"""The runner: runs tasks on its node and holds their tunnels."""

from __future__ import annotations

from kohakuriver.runner.server import RunnerOptions, serve

__all__ = ["RunnerOptions", "serve"]
