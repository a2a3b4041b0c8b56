"""Small services that tests start inside tasks. Each prints the port that it got, and echoes what it gets.

They share their output with a tunnel client: a line is one write, which print() of an unbuffered Python is not.
"""

from __future__ import annotations

import sys

# One thread for all connections: a thread for each takes all processors once an attack has made hundreds.
ECHO_SOURCE = """
import asyncio, socket, sys
class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.transport.write(data)
    def pause_writing(self):
        self.transport.pause_reading()
    def resume_writing(self):
        self.transport.resume_reading()
async def main():
    server = await asyncio.get_running_loop().create_server(Echo, sock=socket.create_server((sys.argv[1], 0)))
    sys.stdout.write(f"port {server.sockets[0].getsockname()[1]}\\n")
    sys.stdout.flush()
    await server.serve_forever()
asyncio.run(main())
"""


def echo(host: str = "127.0.0.1") -> list[str]:
    """The command of a service that echoes, on a free port of `host`, which it prints."""
    return [sys.executable, "-c", ECHO_SOURCE, host]


def port_in(log: str) -> int | None:
    """The port that a service printed last."""
    ports = [int(line.split()[1]) for line in log.splitlines() if line.startswith("port ")]
    return ports[-1] if ports else None
