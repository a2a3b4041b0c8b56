"""Where a forward listens, and what it does where it can't."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.client import local_side
from kohakuriver.client.local_side import LocalSide
from kohakuriver.client.ports import PortForward
from kohakuriver.errors import LocalAddressError
from kohakuriver.tunnel.user_endpoint import UserEndpoint

Run = Callable[[Coroutine[Any, Any, None]], None]


def consecutive(count: int) -> list[socket.socket]:
    """Listeners on ports of 127.0.0.1 that follow each other, and behind which one more is free."""
    while True:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))]
            port = socks[0].getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                behind = (("127.0.0.1", port + number) for number in range(1, count + 1))
                socks.extend(stack.enter_context(socket.create_server(address)) for address in behind)
                stack.pop_all()
                socks.pop().close()
                return socks


def test_the_next_free_port_is_one_that_no_other_port_of_the_forward_wants(run: Run) -> None:
    async def listen() -> None:
        endpoint = UserEndpoint()
        taken, wanted = consecutive(2)
        first, second = taken.getsockname()[1], wanted.getsockname()[1]
        wanted.close()
        try:
            side = LocalSide(endpoint, "127.0.0.1", lambda host, port: None, fallback=True)
            listening = await side.listen([PortForward(first, 80), PortForward(second, 81), PortForward(0, 82)])
            assert [(each.port, each.instead_of) for each in listening[:2]] == [(second + 1, first), (second, None)]
            assert listening[2].instead_of is None
        finally:
            taken.close()
            await endpoint.close()

    run(listen())


def test_localhost_falls_back_to_a_port_that_both_its_addresses_have(run: Run) -> None:
    async def listen() -> None:
        endpoint = UserEndpoint()
        told: list[int] = []
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
            port = taken.getsockname()[1]
            side = LocalSide(endpoint, "localhost", lambda host, port: told.append(port), fallback=True)
            first, second = await side.listen([PortForward(port, 80)])
        assert (first.host, second.host) == ("127.0.0.1", "::1")
        assert first.port == second.port != port
        assert (first.instead_of, second.instead_of) == (port, port)
        assert told == []
        await endpoint.close()

    run(listen())


def test_where_none_of_the_next_ports_is_free_that_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def listen() -> None:
        monkeypatch.setattr(local_side, "NEXT_PORT_TRIES", 2)
        endpoint = UserEndpoint()
        socks = consecutive(2)
        port = socks[0].getsockname()[1]
        side = LocalSide(endpoint, "127.0.0.1", lambda host, port: None, fallback=True)
        with pytest.raises(LocalAddressError, match=f"None of the ports {port} to {port + 1} is free on 127"):
            await side.listen([PortForward(port, 80)])
        for each in socks:
            each.close()
        await endpoint.close()

    run(listen())


def test_where_both_loopback_addresses_are_asked_for_one_that_another_program_has_is_an_error(run: Run) -> None:
    async def listen() -> None:
        endpoint = UserEndpoint()
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
            port = taken.getsockname()[1]
            side = LocalSide(endpoint, "localhost", lambda host, port: None, both=True)
            with pytest.raises(LocalAddressError) as refused:
                await side.listen([PortForward(port, 80)])
        assert refused.value.taken is not None
        assert refused.value.taken[1:] == (port, "tcp")  # of ::1; of both where yet another program has the first
        assert endpoint.listening == []
        await endpoint.close()

    run(listen())


@pytest.mark.parametrize("taken", [("::1", 1, "tcp"), None])
def test_one_loopback_address_is_enough_only_where_the_machine_has_no_other(
    run: Run, monkeypatch: pytest.MonkeyPatch, taken: tuple[str, int, str] | None
) -> None:
    async def listen() -> None:
        endpoint = UserEndpoint()
        listen_tcp = endpoint.listen_tcp

        async def without_the_second(host: str, *args: Any) -> Any:
            if host == "::1":
                raise LocalAddressError("It can't be had.", taken=taken)
            return await listen_tcp(host, *args)

        monkeypatch.setattr(endpoint, "listen_tcp", without_the_second)
        side = LocalSide(endpoint, "localhost", lambda host, port: None, both=True)
        if taken is None:
            (only,) = await side.listen([PortForward(0, 80)])
            assert only.host == "127.0.0.1"
        else:
            with pytest.raises(LocalAddressError, match=r"free on both 127\.0\.0\.1 and ::1"):
                await side.listen([PortForward(0, 80)])
            assert endpoint.listening == []
        await endpoint.close()

    run(listen())
