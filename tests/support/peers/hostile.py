"""Attacks that break the protocol, or use it up: what one peer may send that means no good.

Each is a function that yields once, when all of it is with the other side, and then lets go of what it opened. They run
as tests/support/peers/attack.py says.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import time
from collections.abc import Iterator

from kohakuriver._frame import build_frame
from kohakuriver.tunnel.protocol import CONNECT, DATA, PING
from tests.support.peers.wire import (
    BINARY,
    CONTINUATION,
    PATIENCE,
    WS_PING,
    Attack,
    Target,
    Wire,
    frame,
    handshake,
    raise_file_limit,
    session,
    tunnel,
)


def slowloris(target: Target) -> Iterator[None]:
    """500 handshakes at host and runner each, of which a few bytes come now and then, and never the end."""
    with contextlib.ExitStack() as stack:
        request = handshake(f"/ws/forward/{target.task}/1", None)
        socks = []
        for port in (target.host_port, target.runner_port):
            socks += [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(500)]
        for start in range(0, len(request) - 4, 40):
            for sock in socks:
                with contextlib.suppress(OSError):  # the server may have had enough of it
                    sock.sendall(request[start : start + 40][: len(request) - 4 - start])
        yield


def half_open(target: Target, count: int = 10_000) -> Iterator[None]:
    """Connections to the host that say nothing: 10,000, or as many as this system lets a process have."""
    count = min(count, raise_file_limit() - 1000)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", target.host_port), PATIENCE))
        yield


def _flood(wire: Wire, messages: Iterator[bytes]) -> Iterator[None]:
    """Send them as fast as they are taken."""
    with wire:
        while piece := b"".join(itertools.islice(messages, 20_000)):
            wire.sock.sendall(piece)
        yield


def tiny_frames(target: Target) -> Iterator[None]:
    """1,000,000 empty messages for a stream that does not exist."""
    wire = session(target)
    wire.drain()
    message = build_frame(DATA, 0, 77, 0, b"", 0x01020304)
    yield from _flood(wire, itertools.repeat(message, 1_000_000))


def tiny_fragments(target: Target) -> Iterator[None]:
    """A message in 1,000,000 fragments, all of them empty but the first."""
    wire = session(target)
    wire.drain()
    first = frame(BINARY, bytes([DATA, 0, 0, 0, 0, 77, 0, 0]), fin=False)
    middle = frame(CONTINUATION, fin=False)
    yield from _flood(wire, itertools.chain([first], itertools.repeat(middle, 1_000_000)))


def random_ids(target: Target) -> Iterator[None]:
    """300,000 messages of all types for ids at random, those that open streams among them."""
    wire = session(target)
    wire.drain()
    yield from _flood(wire, _random_messages(1))


def _random_messages(seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(300_000):
        yield build_frame(rng.randrange(16), rng.randrange(2), rng.randrange(1 << 32), 1, b"", 0x01020304)


def ping_flood(target: Target) -> Iterator[None]:
    """1,000,000 WebSocket pings, whose answers are read."""
    wire = session(target)
    wire.drain()
    yield from _flood(wire, itertools.repeat(frame(WS_PING), 1_000_000))


def message_ping_flood(target: Target) -> Iterator[None]:
    """500,000 PING messages of the session, whose answers are read."""
    wire = session(target)
    wire.drain()
    yield from _flood(wire, itertools.repeat(build_frame(PING, 0, 0, 0, b"", 0x01020304), 500_000))


def unread_answers(target: Target) -> Iterator[None]:
    """PING messages and pings with long payloads until the server has enough of it, whose answers are never read."""
    messages = build_frame(PING, 0, 0, 0, bytes(60_000), 0x01020304) + frame(WS_PING, bytes(125)) * 500
    with session(target) as wire, contextlib.suppress(ConnectionError, TimeoutError):
        wire.sock.settimeout(5)
        for _ in range(2000):
            wire.sock.sendall(messages)
    yield


def container_ping_flood(target: Target) -> Iterator[None]:
    """The same from inside a container: 500,000 pings and as many PING messages."""
    wire = tunnel(target)
    wire.drain()
    piece = frame(WS_PING) + build_frame(PING, 0, 0, 0, b"", 0x01020304)
    yield from _flood(wire, itertools.repeat(piece, 500_000))


def container_random_ids(target: Target) -> Iterator[None]:
    """300,000 messages of all types for ids at random, from inside a container."""
    wire = tunnel(target)
    wire.drain()
    yield from _flood(wire, _random_messages(2))


def connect_flood(target: Target) -> Iterator[None]:
    """30,000 streams to the attacker's own service, opened at once and never closed."""
    wire = session(target)
    wire.drain()
    window = (65_536).to_bytes(8, "big")
    yield from _flood(wire, (build_frame(CONNECT, 0, i, 0, window, 0x01020304) for i in range(1, 30_001)))


def _refused(target: Target, wrong: bytes) -> Iterator[None]:
    for _ in range(100):
        for opened in (session(target), tunnel(target)):
            with opened as wire:
                wire.send(wrong)
                code = wire.close_code()
                assert code == 1002, code
    yield


def compressed(target: Target) -> Iterator[None]:
    """Compression is offered and not taken; compressed frames (RSV1) come all the same, 100 times at each."""
    path = f"/ws/forward/{target.task}/{target.service_port}"
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
    with Wire(target.host_port, path, target.token, more=offer) as wire:
        assert wire.status == 101
        assert b"extensions" not in wire.head.lower()
    yield from _refused(target, frame(BINARY, bytes(8) + b"\xca\x48\x05\x00", reserved=4))


def fragmented_control(target: Target) -> Iterator[None]:
    """Pings in fragments, 100 times at host and runner."""
    yield from _refused(target, frame(WS_PING, b"half", fin=False) + frame(CONTINUATION, b"rest"))


def _ssh_packet(payload: bytes) -> bytes:
    """A packet before the first keys (RFC 4253 §6)."""
    padding = 8 - (len(payload) + 5) % 8
    padding += 8 if padding < 4 else 0
    return (1 + len(payload) + padding).to_bytes(4, "big") + bytes([padding]) + payload + bytes(padding)


def _ssh_string(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


# All that a stranger needs for the server to exchange keys and to sign: any 32 bytes are a public key of X25519.
KEY_EXCHANGE = b"".join(
    (
        b"SSH-2.0-attacker\r\n",
        _ssh_packet(
            bytes([20, *bytes(16)])
            + b"".join(
                _ssh_string(names)
                for names in (
                    b"curve25519-sha256",
                    b"ssh-ed25519",
                    *[b"aes128-gcm@openssh.com"] * 2,
                    *[b"hmac-sha2-256-etm@openssh.com"] * 2,
                    *[b"none"] * 2,
                    *[b""] * 2,
                )
            )
            + bytes(5)
        ),
        _ssh_packet(bytes([30]) + _ssh_string(bytes([9] * 32))),
    )
)
KEY_EXCHANGES, KEY_EXCHANGES_A_SECOND = 200, 50


def ssh_key_exchanges(target: Target) -> Iterator[None]:
    """200 key exchanges with the jump host, 50 a second, none of which leads to a login."""
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        for count in range(KEY_EXCHANGES):
            time.sleep(max(0.0, began + count / KEY_EXCHANGES_A_SECOND - time.monotonic()))
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", target.ssh_port), PATIENCE))
            sock.sendall(KEY_EXCHANGE)
        yield


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        slowloris,
        half_open,
        tiny_frames,
        tiny_fragments,
        random_ids,
        ping_flood,
        message_ping_flood,
        unread_answers,
        container_ping_flood,
        container_random_ids,
        connect_flood,
        compressed,
        fragmented_control,
        ssh_key_exchanges,
    )
}
