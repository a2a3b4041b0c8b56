"""Wherever a name is resolved, one that can't be a name is an error with a sentence, and no crash."""

from __future__ import annotations

import socket

import pytest

from kohakuriver.cli import ssh_dial
from kohakuriver.errors import HostUnreachableError, LocalAddressError
from kohakuriver.resolve import resolving
from kohakuriver.tunnel.udp import connected_datagram_socket
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from kohakuriver.web.app import bind
from tests.unit.test_dial import Run

NAMES = pytest.mark.parametrize("name", ["a..b", "a" * 70 + ".test"])


@NAMES
def test_it_fails_as_other_names_do(name: str) -> None:
    with pytest.raises(socket.gaierror), resolving():
        socket.getaddrinfo(name, 1)


@NAMES
def test_a_server_can_not_listen_on_it(name: str) -> None:
    with pytest.raises(LocalAddressError, match=r"is no address that this machine can listen on"):
        bind(name, 0)


@NAMES
def test_a_forward_can_not_listen_on_it(run: Run, name: str) -> None:
    async def main() -> None:
        endpoint = UserEndpoint(on_detach=lambda reason: None)
        with pytest.raises(LocalAddressError, match=r"is not an address of this machine"):
            await endpoint.listen_tcp(name, 0, 80)

    run(main())


@NAMES
def test_datagrams_can_not_be_sent_to_it(name: str) -> None:
    with pytest.raises(socket.gaierror):
        connected_datagram_socket(name, 80)


@NAMES
def test_ssh_is_told_that_its_proxy_can_not_be_reached(name: str) -> None:
    with pytest.raises(HostUnreachableError, match=r"The SSH proxy at .* can't be reached: "):
        ssh_dial.dial(f"{name}:22", "7", None)
    with pytest.raises(HostUnreachableError, match=r"can't be reached: this can't be the name of a machine\."):
        ssh_dial.to_show(f"https://{name}", "7", "token", None)
