"""The protocol: constants and messages, the opening handshake, links, streams and windows, endpoints."""

from __future__ import annotations
