"""Whether the machine at an address answers: asked when somebody wants to know, and never by itself."""

from __future__ import annotations

import asyncio
import os
import socket

from kohakuriver.errors import UnavailableError

__all__ = ["KNOCK_SECONDS", "PORTS", "Knocker", "knock"]

KNOCK_SECONDS = 2.0

PORTS = (22, 80, 443, 3389)
"""Where machines most often listen. One that refuses has answered too."""


class Knocker:
    """Knocks at an address once at a time, for everybody who asks meanwhile, and at a few addresses at once."""

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._knocking: dict[str, asyncio.Task[str | None]] = {}

    async def why_silent(self, address: str) -> str | None:
        """Why the machine does not answer, without a full stop; None where it does. Raises UnavailableError."""
        knocking = self._knocking.get(address)
        if knocking is None:
            if len(self._knocking) >= self._most:
                raise UnavailableError("The node looks at other addresses just now; ask again.", code="busy")
            knocking = self._knocking[address] = asyncio.get_running_loop().create_task(knock(address))
            knocking.add_done_callback(lambda _: self._knocking.pop(address, None))
        return await asyncio.shield(knocking)


async def knock(address: str, ports: tuple[int, ...] = PORTS, *, seconds: float = KNOCK_SECONDS) -> str | None:
    """Open connections to an IP address, and close them; why it does not answer, None where it does.

    Args:
        address: IPv4 or IPv6.
        ports: TCP ports that are tried at once; one that is refused is an answer.
        seconds: how long is waited for the first answer.
    """
    dials = {asyncio.ensure_future(_dial(address, port)) for port in ports}
    try:
        reason = f"no answer on TCP ports {', '.join(map(str, ports))} within {seconds:g} s"
        for dial in asyncio.as_completed(dials, timeout=seconds):
            try:
                refused = await dial
            except asyncio.TimeoutError:
                return reason
            if refused is None:
                return None
            reason = refused
        return reason
    finally:
        for open_dial in dials:
            open_dial.cancel()
        await asyncio.gather(*dials, return_exceptions=True)


async def _dial(address: str, port: int) -> str | None:
    """Why nothing came back, None for any answer."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
        except (ConnectionRefusedError, ConnectionResetError):
            return None
        except OSError as error:
            return os.strerror(error.errno) if error.errno else str(error)
    return None
