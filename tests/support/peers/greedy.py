"""Attacks on what users share: what one ordinary user may take from everybody else, and what a stranger may.

Each is a function as in hostile.py beside this, and runs in the same way. Nothing here breaks the protocol: each peer
only asks for far more than its part.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from kohakuriver._frame import build_frame
from kohakuriver.tunnel.ports import MAX_PORTS
from kohakuriver.tunnel.protocol import CLIENT_HEADER, CONNECT, CONNECTED, DATA, TERMINAL_V2
from tests.support.peers.wire import PATIENCE, Attack, Counts, Target, Wire, raise_file_limit, session, tunnel

SECONDS = 6.0
"""How long an attack that has no end of its own goes on."""
WINDOW = 90 << 20
KEY = 0x01020304


def unread_sessions(target: Target) -> Iterator[Counts]:
    """12 sessions with a window of 90 MiB each, which a service fills at once and their user never reads."""
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(tunnel(target))
        piece = bytes(1 << 16)
        sent = 0
        for _ in range(12):
            wire = stack.enter_context(session(target, target.own_task))
            wire.send(build_frame(CONNECT, 0, 1, 0, WINDOW.to_bytes(8, "big"), KEY))
            first, payload = inside.receive()
            while first != 0x82 or payload[0] != CONNECT:
                first, payload = inside.receive()
            stream = int.from_bytes(payload[2:6], "big")
            inside.send(build_frame(CONNECTED, 0, stream, 0, (1 << 20).to_bytes(8, "big"), KEY))
            data = build_frame(DATA, 0, stream, 0, piece, KEY)
            for _ in range(WINDOW // len(piece)):
                inside.send(data)
                sent += len(piece)
        yield {"sessions": 12, "MiB": _at_least(1080, sent >> 20)}


def costly_handshakes(target: Target) -> Iterator[Counts]:
    """25 strangers a second at the SSH port, each from elsewhere, who ask for the dearest key exchange that it offers.

    Where the port takes their handshakes, each gets as far as to be refused a login.
    """
    import asyncssh  # which takes longer to load than the other attacks take

    dear = ["rsa2048-sha256", "diffie-hellman-group18-sha512", "ecdh-sha2-nistp521", "curve25519-sha256"]
    ends: Counter[str] = Counter()

    async def one(number: int) -> None:
        options = {"username": "x", "known_hosts": None, "client_keys": None, "kex_algs": dear}
        whence = (f"127.0.1.{number % 250 + 1}", 0)
        try:
            await asyncio.wait_for(
                asyncssh.connect("127.0.0.1", target.ssh_port, local_addr=whence, **options), PATIENCE
            )
        except asyncssh.PermissionDenied:
            ends["exchanged"] += 1
        except (OSError, asyncssh.Error, asyncio.TimeoutError):
            ends["refused"] += 1

    async def flood() -> float:
        loop = asyncio.get_running_loop()
        start, under_way = loop.time(), set()
        for i in range(int(25 * SECONDS)):
            under_way.add(asyncio.ensure_future(one(i)))
            await asyncio.sleep(max(0.0, start + i / 25 - loop.time()))
        took = loop.time() - start
        await asyncio.gather(*under_way)
        return took

    rate = int(25 * SECONDS / asyncio.run(flood()))
    yield {"a second": _at_least(15, rate), "exchanged": _at_least(50, ends["exchanged"]), "refused": ends["refused"]}


def waits(target: Target) -> Iterator[Counts]:
    """4,000 requests that wait for a task which never is ready."""
    count = min(4000, raise_file_limit() - 1000)
    path = f"/api/tasks/{target.silent_task}/wait?timeout=60"
    with contextlib.ExitStack() as stack:
        asked = [stack.enter_context(sock) for _ in range(count) if (sock := _asked(target, "GET", path)) is not None]
        time.sleep(SECONDS)
        answers = Counter(map(_status, asked))
        _at_least(1, answers["open"])
        yield {"asked": _at_least(count, len(asked)), **answers}


def refused_paths(target: Target) -> Iterator[Counts]:
    """Eight strangers who ask for as long a name as a request may have, as often as they can."""
    path = f"/ws/forward/{'A' * 7900}/1"
    ends = time.monotonic() + SECONDS
    answers: Counter[str] = Counter()

    def ask() -> None:
        while time.monotonic() < ends:
            with contextlib.suppress(OSError, EOFError), Wire(target.host_port, path, None) as wire:
                answers[str(wire.status)] += 1

    _together(ask, 8)
    _at_least(300, answers["401"])
    yield answers


def wide_sessions(target: Target) -> Iterator[Counts]:
    """Sessions that name as many ports as a forward may, opened and closed as often as they can be."""
    ports = ",".join(str(port) for port in range(10_001, 10_001 + 2 * MAX_PORTS, 2))
    path = f"/ws/forward/{target.task}/10001?ports={ports}"
    ends = time.monotonic() + SECONDS
    answers: Counter[str] = Counter()

    def open_and_close() -> None:
        while time.monotonic() < ends:
            with contextlib.suppress(OSError, EOFError), Wire(target.host_port, path, target.token) as wire:
                answers[str(wire.status)] += 1
                wire.receive()

    _together(open_and_close, 4)
    _at_least(50, answers["101"])
    yield answers


def connects(target: Target) -> Iterator[Counts]:
    """20 sessions that each open 5,000 streams a second to a port where nothing listens."""
    ends = time.monotonic() + SECONDS
    sent: Counter[str] = Counter()

    def flood() -> None:
        with contextlib.suppress(OSError, EOFError), session(target) as wire:
            sent["sessions"] += 1
            wire.drain()
            ids = itertools.count(1)
            while time.monotonic() < ends:
                window = (65_536).to_bytes(8, "big")
                wire.send(*(build_frame(CONNECT, 0, next(ids), 9, window, KEY) for _ in range(500)))
                sent["connects"] += 500
                time.sleep(0.1)

    _together(flood, 20)
    _at_least(20, sent["sessions"])
    _at_least(int(20 * 5000 * SECONDS / 10), sent["connects"])
    yield sent


def departing_tunnels(target: Target) -> Iterator[Counts]:
    """A tunnel client that goes, again and again, with 8,000 streams open: as many as its user gets in two seconds."""
    ends = time.monotonic() + SECONDS
    gone = opened = 0
    while gone < 2 or time.monotonic() < ends:
        came: Counter[int] = Counter()
        with tunnel(target) as inside, session(target, target.own_task) as wire:
            wire.drain()
            counting = threading.Thread(target=_count_kinds, args=(inside, came))
            counting.start()
            ids = itertools.count(1)
            while came[CONNECT] < 8000:
                window = (65_536).to_bytes(8, "big")
                wire.send(*(build_frame(CONNECT, 0, next(ids), 9, window, KEY) for _ in range(500)))
                time.sleep(0.1)
            inside.sock.shutdown(socket.SHUT_RDWR)
            counting.join()
        gone, opened = gone + 1, opened + came[CONNECT]
    yield {"tunnels": gone, "streams": _at_least(16_000, opened)}


def _count_kinds(wire: Wire, came: Counter[int]) -> None:
    """Count the messages that come, by their kinds, until the end."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            first, payload = wire.receive()
            if first == 0x82:
                came[payload[0]] += 1


def terminals(target: Target) -> Iterator[Counts]:
    """120 terminals of one user, in two tasks, each with a shell, of which no byte is read."""
    offer = f"Sec-WebSocket-Protocol: {TERMINAL_V2}\r\n"
    answers: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for i in range(120):
            path = f"/ws/task/{target.terminal_tasks[i % 2]}/terminal"
            with contextlib.suppress(OSError, EOFError):
                wire = stack.enter_context(Wire(target.host_port, path, target.token, v2=False, more=offer))
                answers[str(wire.status)] += 1
        time.sleep(SECONDS)
        _at_least(100, answers["101"])
        yield answers


def printing_tasks(target: Target) -> Iterator[Counts]:
    """Three tasks of one user that print as much as they can."""
    body = json.dumps({"backend": "process", "command": ["yes", "a" * 1000]}).encode()
    made: list[int] = []
    ends = time.monotonic() + PATIENCE
    while len(made) < 3:
        sock = _asked(target, "POST", "/api/tasks", body)
        assert sock is not None
        with sock:
            head, _, answer = sock.recv(1 << 16).partition(b"\r\n\r\n")
            if b" 429 " in head and time.monotonic() < ends:  # this user has just attacked in other ways
                time.sleep(1)
                continue
            assert b" 201 " in head, (head, answer)
            made.append(json.loads(answer or sock.recv(1 << 16))["task_id"])
    time.sleep(SECONDS)
    yield {"tasks": len(made)}
    for task in made:
        sock = _asked(target, "DELETE", f"/api/tasks/{task}")
        assert sock is not None
        with sock:
            assert b" 200 " in sock.recv(1 << 16)


def unfinished_bodies(target: Target) -> Iterator[Counts]:
    """300 strangers with a request of 1 MiB, of which the last byte never comes."""
    head = b"POST /api/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: 1048576\r\n\r\n" + b" " * 1_048_575
    begun, whole = 0, 0
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", target.host_port), PATIENCE))
            begun += 1
            with contextlib.suppress(OSError):  # it may be refused before all of it is sent
                sock.sendall(request)
                whole += 1
        yield {"bodies": _at_least(300, begun), "sent whole": whole}


def stolen_token(target: Target) -> Iterator[Counts]:
    """Eight thieves who show the token of somebody's tunnel client as often as they can, each time as another client.

    The attack itself fails where one of them is let in.
    """
    path = f"/ws/tunnel/{target.victim}"
    ends = time.monotonic() + SECONDS
    answers: Counter[str] = Counter()
    ids = itertools.count()

    def steal() -> None:
        while time.monotonic() < ends:
            more = f"{CLIENT_HEADER}: thief {next(ids)}\r\n"
            with (
                contextlib.suppress(OSError, EOFError),
                Wire(target.runner_port, path, target.victims_token, more=more) as wire,
            ):
                answers[str(wire.status)] += 1

    _together(steal, 8)
    assert set(answers) == {"403"}, answers
    _at_least(100, answers["403"])
    yield answers


def _at_least(least: int, count: int) -> int:
    """An attack that did not happen says nothing of who stood it."""
    assert count >= least, f"the attack came to {count}, and was to come to {least}"
    return count


def _asked(target: Target, method: str, path: str, body: bytes = b"") -> socket.socket | None:
    """A connection to the host with a request of the attacker's on it; None where there can't be one."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    more = f"Content-Type: application/json\r\nAuthorization: Bearer {target.token}\r\n\r\n"
    try:
        sock = socket.create_connection(("127.0.0.1", target.host_port), PATIENCE)
        sock.sendall((head + more).encode() + body)
    except OSError:
        return None
    return sock


def _status(sock: socket.socket) -> str:
    """Of the answer that has come; "open" where none has, "gone" where none will."""
    sock.setblocking(False)
    try:
        answer = sock.recv(100)
    except BlockingIOError:
        return "open"
    except OSError:
        return "gone"
    return answer.split()[1].decode() if answer else "gone"


def _together(run: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


GREEDY: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        unread_sessions,
        costly_handshakes,
        waits,
        refused_paths,
        wide_sessions,
        connects,
        departing_tunnels,
        terminals,
        printing_tasks,
        unfinished_bodies,
        stolen_token,
    )
}
