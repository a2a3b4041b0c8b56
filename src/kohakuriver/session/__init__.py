"""What host and runner decide about a session: who may open it, how fast it goes, when it ends."""

from __future__ import annotations
