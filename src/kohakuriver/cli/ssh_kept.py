"""Connections of ssh that go on when the network, the host or the runner went and came back.

The one end of such a connection is a process of ours: behind ssh, which has the other end of a socket pair, or between
its pipes. It ends with ssh, or when the task does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Callable

from kohakuriver.cli.ssh_dial import relay
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError
from kohakuriver.resolve import joined

__all__ = ["between_pipes", "hand_over"]

ANSWER_SECONDS = 30.0
MAX_SAID = 1 << 16


def between_pipes(task: str, settings: Settings) -> None:
    """Connect stdin and stdout. Raises KohakuRiverError."""
    near, far = socket.socketpair()
    failure: list[BaseException] = []

    def carry() -> None:
        try:
            _carry(task, settings, far)
        except BaseException as error:
            failure.append(error)
        far.close()

    carrier = threading.Thread(target=carry, daemon=True)
    carrier.start()
    relay(near)
    near.close()
    joined(carrier)
    if failure:
        raise failure[0]


def hand_over(task: str, settings: Settings, give: Callable[[socket.socket], None]) -> None:
    """Hand a socket to ssh by `give`, with a process behind it that outlives this one. Raises KohakuRiverError."""
    near, far = socket.socketpair()
    told, tells = os.pipe()
    if os.fork() == 0:
        near.close()
        os.close(told)
        _behind(task, settings, far, tells)
    far.close()
    os.close(tells)
    # An SSH server speaks first. What went wrong is told before the socket ends.
    readable, _, _ = select.select([near], [], [], ANSWER_SECONDS)
    if readable and not near.recv(1, socket.MSG_PEEK):
        with os.fdopen(told, "rb") as said:
            raise _told(said.read(MAX_SAID))
    give(near)


def _carry(task: str, settings: Settings, sock: socket.socket) -> None:
    from kohakuriver.client.pipe import Pipe
    from kohakuriver.runtime import run

    async def carry() -> None:
        await Pipe(task, settings, sock).run()

    run(carry())


def _behind(task: str, settings: Settings, sock: socket.socket, tells: int) -> None:
    """What the process behind ssh does. Nothing that ssh's own peers wait for may stay open in it."""
    try:
        os.setsid()  # a terminal that hangs up tells ssh, and ssh's end is this one's
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        _carry(task, settings, sock)
    except KohakuRiverError as error:
        said = {"code": error.code, "status": error.status, "message": error.message}
        with contextlib.suppress(OSError):
            os.write(tells, json.dumps(said).encode()[:MAX_SAID])
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(tells, json.dumps({"message": f"It broke: {error!r}."}).encode())
    finally:
        os._exit(0)


def _told(said: bytes) -> KohakuRiverError:
    from kohakuriver.errors import UnavailableError, from_status

    try:
        why = json.loads(said)
    except ValueError:
        return UnavailableError("The task ended the connection before its SSH server said anything.")
    if why.get("status") is None:
        return UnavailableError(str(why["message"]))
    return from_status(why["status"], why["message"], why["code"])
