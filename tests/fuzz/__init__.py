"""Fuzzing of what reads bytes from a peer."""

from __future__ import annotations
