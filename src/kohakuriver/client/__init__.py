"""The side of the user: a client of the host's HTTP API, and the forward of the Python API and the command line."""

from __future__ import annotations
