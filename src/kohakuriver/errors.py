"""One tree of exceptions that says whose fault it is.

Each class stands for one exit code of the command line and one family of HTTP statuses, so that a failure keeps
its meaning from the runner through the host to the user's shell or Python code. The message is always one sentence
that a user can act on. Sources: docs/cli.md "Exit codes", docs/protocol.md §4.
"""

from __future__ import annotations

import json

__all__ = [
    "HostUnreachableError",
    "KohakuRiverError",
    "LocalAddressError",
    "NotAllowedError",
    "NotFoundError",
    "UnauthenticatedError",
    "UnavailableError",
    "UsageError",
    "from_status",
]


class KohakuRiverError(Exception):
    """Anything that failed for a reason that has no class of its own.

    `message` is one sentence for a person, `code` a symbol for programs, `status` the HTTP status that carries it,
    `exit_code` what a command ends with.
    """

    exit_code: int = 1
    code: str = "failed"
    status: int = 500

    def __init__(self, message: str, *, code: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status

    def __str__(self) -> str:
        return self.message

    def to_json(self) -> dict[str, str]:
        """The body of an HTTP error answer: `{"error": code, "message": sentence}`."""
        return {"error": self.code, "message": self.message}


class UsageError(KohakuRiverError):
    """What was asked for makes no sense: an unknown option, a bad port, a malformed request."""

    exit_code = 2
    code = "bad_request"
    status = 400


class NotFoundError(KohakuRiverError):
    """There is no such task, node or session."""

    exit_code = 3
    code = "not_found"
    status = 404


class UnavailableError(KohakuRiverError):
    """It exists but can't be reached: not running, node offline, tunnel not connected."""

    exit_code = 4
    code = "unavailable"
    status = 409


class NotAllowedError(KohakuRiverError):
    """The caller is known, and may not do this."""

    exit_code = 5
    code = "not_allowed"
    status = 403


class UnauthenticatedError(NotAllowedError):
    """The caller showed no credential, or one that is not valid."""

    code = "not_authenticated"
    status = 401


class LocalAddressError(KohakuRiverError):
    """The local address is in use or may not be bound."""

    exit_code = 6
    code = "local_address"


class HostUnreachableError(KohakuRiverError):
    """The host can't be reached, or the host can't reach the runner."""

    exit_code = 7
    code = "host_unreachable"
    status = 502


_BY_STATUS: dict[int, type[KohakuRiverError]] = {
    400: UsageError,
    401: UnauthenticatedError,
    403: NotAllowedError,
    404: NotFoundError,
    409: UnavailableError,
    422: UsageError,
    429: UnavailableError,
    502: HostUnreachableError,
    503: HostUnreachableError,
    504: HostUnreachableError,
}

# Some errors have a status for the sake of HTTP; to whoever asked they mean another thing.
_BY_CODE: dict[str, type[KohakuRiverError]] = {"name_taken": UsageError}

_LONGEST_FOREIGN_BODY = 200


def from_status(status: int, body: bytes) -> KohakuRiverError:
    """The exception for an HTTP error answer.

    `status` is the HTTP status, `body` the raw answer, normally `{"error": code, "message": sentence}`. Anything else
    (a proxy's HTML page, nothing at all) still gives the class that fits the status. Source: docs/protocol.md §4.
    """
    cls = _BY_STATUS.get(status, KohakuRiverError)
    code: str | None = None
    message: str | None = None
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        code = answer["error"] if isinstance(answer.get("error"), str) else None
        message = answer["message"] if isinstance(answer.get("message"), str) else None
        cls = _BY_CODE.get(code or "", cls)
    return cls(message or _foreign_message(status, body), code=code, status=status)


def _foreign_message(status: int, body: bytes) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    if not text or text.startswith("<"):
        return f"The host answered with HTTP status {status} and no explanation."
    return f"The host answered with HTTP status {status}: {text[:_LONGEST_FOREIGN_BODY]}"
