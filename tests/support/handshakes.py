"""A TLS handshake without a network."""

from __future__ import annotations

import contextlib
import ssl


def shaken(serving: ssl.SSLContext, trusting: ssl.SSLContext, name: str) -> ssl.SSLObject:
    """The client's end of a connection to the server `name`. Raises what the client has against it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = serving.wrap_bio(to_server, to_client, server_side=True)
    client = trusting.wrap_bio(to_client, to_server, server_hostname=name)
    for side in (client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client
