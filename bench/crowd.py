"""A service for thousands of connections: `python -m bench.crowd` prints its port, then serves until it is ended.

Each connection gets one byte at once, to show that it is open. A byte from the other side makes it send zeros for ever.
"""

from __future__ import annotations

import selectors
import socket

ZEROS = bytes(64 * 1024)
# What a thousand sockets may hold by default is more than the kernel gives to all of TCP: it then drops packets, of
# whatever connection.
SEND_BUFFER = 128 * 1024


def pump(connection: socket.socket) -> bool:
    """Send what fits; False once the other side is gone."""
    try:
        connection.send(ZEROS)
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


def begin(connection: socket.socket, selector: selectors.BaseSelector) -> bool:
    """The other side has sent something, or hung up."""
    try:
        wanted = connection.recv(16)
    except OSError:
        return False
    if wanted:
        selector.modify(connection, selectors.EVENT_WRITE)
    return bool(wanted)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        print(listener.getsockname()[1], flush=True)
        while True:
            for key, events in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                    connection.send(b".")
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                alive = pump(key.fileobj) if events & selectors.EVENT_WRITE else begin(key.fileobj, selector)
                if not alive:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


if __name__ == "__main__":
    main()
