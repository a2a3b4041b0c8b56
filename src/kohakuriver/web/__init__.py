"""What host and runner share as HTTP programs: the app, its listener, who waits, how large a request may be."""

from __future__ import annotations
