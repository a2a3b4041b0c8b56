"""What the host does; `host.app` and `host.server` put it behind HTTP and WebSockets."""

from __future__ import annotations
