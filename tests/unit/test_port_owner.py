"""Which program has a local port."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kohakuriver.cli.port_owner import owner

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@pytest.mark.parametrize("proto", KINDS)
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_program_that_has_a_port_is_named_with_its_process(
    proto: str, family: socket.AddressFamily, address: str
) -> None:
    with socket.socket(family, KINDS[proto]) as sock:
        sock.bind((address, 0))
        if proto == "tcp":
            sock.listen()
        name = Path("/proc/self/comm").read_text().strip()
        assert owner(sock.getsockname()[1], proto) == f"{name} (process {os.getpid()})"
        other = "udp" if proto == "tcp" else "tcp"
        assert owner(sock.getsockname()[1], other) is None


def test_nobody_has_a_free_port() -> None:
    with socket.socket() as sock:  # bound, so that it stays free
        sock.bind(("127.0.0.1", 0))
        assert owner(sock.getsockname()[1], "tcp") is None
