"""What a runner does; `runner.app` and `runner.server` put it behind HTTP and WebSockets."""

from __future__ import annotations
