"""Networks that are slow, long or broken."""

from __future__ import annotations
