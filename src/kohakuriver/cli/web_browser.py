"""The browser of whoever runs a command, where they have one."""

from __future__ import annotations

import os
import sys

__all__ = ["open_window"]


def _has_screen() -> bool:
    """Whether a browser would open in a window, rather than in this terminal."""
    shown = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform in ("win32", "darwin") or any(os.environ.get(name) for name in shown)


def open_window(url: str) -> bool:
    """Open a browser there, and say whether there was one. Some return only when they are closed.

    None is started that would take this terminal: those for text have no scripts, and would use a link up that is good
    once.
    """
    import webbrowser

    try:
        return _has_screen() and webbrowser.open(url)
    except (OSError, webbrowser.Error):
        return False
