"""The host: the HTTP API, and the middle of every forward session."""

from __future__ import annotations

from kohakuriver.host.server import HostOptions, serve

__all__ = ["HostOptions", "serve"]
