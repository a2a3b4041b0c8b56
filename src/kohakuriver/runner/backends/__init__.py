"""The ways of running a task."""

from __future__ import annotations
