"""The terminal protocol's messages (docs/protocol.md §6): built and read here for command line and runner alike."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import posixpath
import re
import struct
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kohakuriver.errors import KohakuRiverError, NotAllowedError, UsageError, from_status
from kohakuriver.text import json_of
from kohakuriver.tunnel.protocol import TERMINAL_V2, CloseCode

if TYPE_CHECKING:  # what serves is not what a command line should have to load
    from kohakuriver.tunnel.accept import UpgradeRequest

__all__ = [
    "LIST_SESSIONS",
    "SESSION_NAME",
    "Start",
    "asked_for",
    "beyond",
    "beyond_in",
    "close_code",
    "control",
    "end",
    "exited",
    "failed",
    "failure",
    "is_utf8",
    "read_control",
    "refuse",
    "resize",
    "size_of",
    "stream",
]

MAX_SIDE: Final = 0xFFFF
MAX_READ: Final = 64 << 10
MAX_TEXT: Final = 512 << 10
"""Characters of a message in JSON. To read one takes up to 20 ns for each, and everybody else waits."""

_SIZED: Final = struct.Struct(">BHH")
_ON_TERMINAL: Final = 1
_NAMED: Final = 2
_LIST: Final = 4
_FILES: Final = 8
_BEYOND: Final = 16
_LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True)
class Start:
    """What to run: `command` and its arguments, or the best shell; on a terminal of `rows` x `cols`, or on pipes.

    As whom and where, if not as the task runs itself: `user` is NAME or UID, with `:GROUP` or not, `workdir` absolute.
    A terminal with a `session` stays when its stream has ended, and is found again by that name.
    """

    command: list[str] = field(default_factory=list)
    tty: bool = True
    rows: int = 24
    cols: int = 80
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""
    session: str = ""

    def to_message(self) -> str:
        """What begins a WebSocket of a terminal, which has no sessions with names."""
        fields = {**asdict(self), "command": [_carried(part) for part in self.command]}
        del fields["session"]
        return control("start", **fields)

    def to_bytes(self) -> bytes:
        """What CONNECT of a terminal has behind its mark."""
        env = [f"{name}={value}" for name, value in self.env.items()]
        texts = [_text(self.user), _text(self.workdir), _texts(self.command), _texts(env)]
        if self.session:
            texts.append(_text(self.session))
        flags = (_ON_TERMINAL if self.tty else 0) | (_NAMED if self.session else 0)
        return _SIZED.pack(flags, self.rows, self.cols) + b"".join(texts)

    def for_files(self) -> bytes:
        """What CONNECT has where files are read or written, and the command says which (§6, "Files")."""
        return bytes([_FILES]) + self.to_bytes()[1:]

    @staticmethod
    def is_named(start: bytes) -> bool:
        """Whether such bytes ask for a session with a name, which stays when its stream has ended."""
        return bool(start and start[0] & _NAMED)

    @staticmethod
    def command_in(start: bytes) -> list[str]:
        """The command in such bytes, for people to read; none where that is the shell, or makes no sense.

        Where files are copied it is `cp`, `from` or `to`, and the path, with the folder that it begins in. What leads
        beyond the task's ports is `forward`, and `to` with a host and a port, `at` with a path, or `on` with a port or
        a path.
        """
        if len(start) > MAX_READ:
            return [f"({len(start)} bytes)"]
        try:
            workdir, at = _take(start, _take(start, _SIZED.size)[1])
            (count,) = _LENGTH.unpack_from(start, at)
            at += _LENGTH.size
            command = []
            for _ in range(count):
                part, at = _take(start, at)
                command.append(part.decode("utf-8", "replace"))
        except struct.error:
            return []
        if start[0] & _FILES:
            return ["cp", *command[:1], *(_begun_in(workdir, path) for path in command[1:2]), *command[2:]]
        return ["forward", *command] if start[0] & _BEYOND else command

    @staticmethod
    def from_message(message: dict[str, Any]) -> Start:
        """Raises UsageError."""
        command, env = message.get("command", []), message.get("env", {})
        if not isinstance(command, list):
            raise UsageError("the command of a start must be a list")
        if not isinstance(env, dict) or not all(_is_text(part) for pair in env.items() for part in pair):
            raise UsageError("the env of a start must give texts by their names")
        rows, cols = size_of({"rows": 24, "cols": 80, **message})
        user, workdir = message.get("user", ""), message.get("workdir", "")
        if not _is_text(user) or not _is_text(workdir) or workdir[:1] not in ("", "/"):
            raise UsageError("the user of a start must be a text, and its workdir an absolute path")
        tty = bool(message.get("tty", True))
        return Start([_part(part) for part in command], tty, rows, cols, env, user, workdir)


def beyond(*words: str) -> bytes:
    """What CONNECT has behind its mark for a connection that leads beyond the task (§6, "Beyond the task").

    `words` are "to", a host and a port; "at" and the path of a Unix socket in the task; or "on" and a port, or such a
    path, there.
    """
    return bytes([_BEYOND]) + Start(list(words)).to_bytes()[1:]


def beyond_in(start: bytes) -> str:
    """Which way such a connection leads, "to", "at" or "on"; "" where such bytes are for something else."""
    if not start or not start[0] & _BEYOND:
        return ""
    return (Start.command_in(start)[1:] or ["?"])[0]


LIST_SESSIONS: Final = _SIZED.pack(_LIST, 1, 1) + bytes(4 * _LENGTH.size)
"""What CONNECT has behind its mark to be told which sessions the user has: lines of name, state and age in seconds."""

SESSION_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _text(text: str) -> bytes:
    data = os.fsencode(text)
    return _LENGTH.pack(len(data)) + data


def _texts(texts: list[str]) -> bytes:
    return _LENGTH.pack(len(texts)) + b"".join(map(_text, texts))


def _take(start: bytes, at: int) -> tuple[bytes, int]:
    """The text at a place, and where the next one is. Raises struct.error."""
    (length,) = _LENGTH.unpack_from(start, at)
    at += _LENGTH.size
    return start[at : at + length], at + length


def _begun_in(workdir: bytes, path: str) -> str:
    """A path of the container's, as the tunnel client takes it."""
    if path.partition("/")[0] == "~":
        return path
    return posixpath.join(workdir.decode("utf-8", "replace"), path or ".")


def asked_for(message: str | bytes) -> list[str]:
    """The command that a session's first message starts; none where that is the shell, or makes no sense.

    One of more than `MAX_READ` characters is not read: that would hold up everybody else.
    """
    if len(message) > MAX_READ:
        return [f"({len(message)} characters)"]
    if isinstance(message, str):
        with contextlib.suppress(UsageError):
            asked = read_control(message)
            return Start.from_message(asked).command if asked["type"] == "start" else []
    return []


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and is_utf8(value)


def is_utf8(text: str) -> bool:
    """Whether an argument or a variable of this process is text, and not bytes that happen to be none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _carried(part: str) -> str | dict[str, str]:
    """A part of a command as it goes over the wire: text, or the bytes that it is where it is none."""
    return part if is_utf8(part) else {"base64": base64.b64encode(os.fsencode(part)).decode()}


def _part(carried: object) -> str:
    """The reverse; bytes that are no UTF-8 are surrogates, as everywhere in Python. Raises UsageError."""
    if isinstance(carried, dict):
        try:
            data = base64.b64decode(str(carried.get("base64")), validate=True)
        except ValueError:
            data = b"\0"
        if b"\0" not in data:
            return data.decode("utf-8", "surrogateescape")
    elif _is_text(carried):
        return str(carried)
    raise UsageError('a part of a command is a text, or {"base64": "…"} for bytes, without NUL')


def size_of(message: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns, each from 1 to 65535. Raises UsageError."""
    rows, cols = message.get("rows"), message.get("cols")
    if not isinstance(rows, int) or not isinstance(cols, int) or not (1 <= rows <= MAX_SIDE and 1 <= cols <= MAX_SIDE):
        raise UsageError("a terminal's size is rows and cols, each from 1 to 65535")
    return rows, cols


def control(kind: str, **fields: Any) -> str:
    """A message that is JSON in every version."""
    return json.dumps({"type": kind, **fields})


def read_control(text: str) -> dict[str, Any]:
    """A JSON message with a type. Raises UsageError."""
    if len(text) > MAX_TEXT:
        raise UsageError(f"a text message of a terminal has at most {MAX_TEXT} characters")
    try:
        message = json_of(text)
    except ValueError:
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise UsageError("a text message of a terminal must be a JSON object with a type")
    return message


def resize(rows: int, cols: int) -> str:
    return control("resize", rows=rows, cols=cols)


def end() -> str:
    """No more input."""
    return control("eof")


def stream(name: str) -> str:
    """The binary messages that follow are of "stdout" or "stderr"."""
    return control("stream", name=name)


def exited(code: int) -> str:
    return control("exit", code=code)


def failed(error: KohakuRiverError) -> str:
    """Why there is no terminal, or none any more."""
    return control("error", data=error.message, error=error.code, status=error.status)


def failure(message: dict[str, Any]) -> KohakuRiverError:
    """The error that such a message stands for; a v1 peer gives none but the sentence."""
    status = message.get("status")
    code = message.get("error")
    sentence = str(message.get("data") or "") or "The terminal could not be opened, and its host does not say why."
    return from_status(status if isinstance(status, int) else 409, sentence, code if isinstance(code, str) else None)


def close_code(error: KohakuRiverError) -> CloseCode:
    """1008 for what the user can see to, 1011 for what is out of reach just now, as in docs/protocol.md §4."""
    return CloseCode.INTERNAL_ERROR if error.status >= 500 else CloseCode.POLICY


async def refuse(request: UpgradeRequest, error: KohakuRiverError) -> None:
    """Say why there is no terminal: an HTTP status, or on v1 an error message and a close.

    Missing or wrong credentials are HTTP statuses in either version.
    """
    if TERMINAL_V2 in request.subprotocols or isinstance(error, NotAllowedError):
        request.reject(error.status, error.code, error.message)
        return
    link = request.accept_messages()
    await link.send(failed(error))
    await link.close(close_code(error), error.message)
