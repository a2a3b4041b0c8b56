"""The same promises, asked of every implementation of the wire."""

from __future__ import annotations
