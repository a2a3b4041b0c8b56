"""Peers that are not ours: version 1, attackers, transports without a socket."""

from __future__ import annotations
