"""What the tests start and talk to: hops in this process, whole programs, peers, networks with faults."""

from __future__ import annotations
