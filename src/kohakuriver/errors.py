"""One tree of exceptions that says whose fault it is.

Each class stands for one exit code of the command line and one family of HTTP statuses, so that a failure keeps
its meaning from the runner through the host to the user's shell or Python code. The message is always one sentence
that a user can act on. Sources: docs/cli.md "Exit codes", docs/protocol.md §4.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from kohakuriver.text import json_of

__all__ = [
    "NOT_OUR_ANSWER",
    "HostUnreachableError",
    "KohakuRiverError",
    "LocalAddressError",
    "NotAllowedError",
    "NotFoundError",
    "UnauthenticatedError",
    "UnavailableError",
    "UsageError",
    "from_answer",
    "from_status",
    "no_text",
    "system_words",
]


class KohakuRiverError(Exception):
    """Anything that failed for a reason that has no class of its own.

    `message` is one sentence for a person, `code` a symbol for programs, `status` the HTTP status that carries it,
    `exit_code` what a command ends with. `request_id` is by what the logs of host and runner know the request,
    where one of them told the error and has to see to it, else "".
    """

    exit_code: int = 1
    code: str = "failed"
    status: int = 500
    request_id: str = ""

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
    """The request is invalid: an unknown option, a bad port, a malformed request."""

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
    """The local address is in use or may not be bound.

    `taken` is the address, port and protocol, as `("127.0.0.1", 8888, "tcp")`, where another program has it.
    """

    exit_code = 6
    code = "local_address"

    def __init__(self, message: str, *, code: str | None = None, taken: tuple[str, int, str] | None = None) -> None:
        super().__init__(message, code=code)
        self.taken = taken


class HostUnreachableError(KohakuRiverError):
    """The host can't be reached.

    `url` is that of the program that can't be reached, None where the error does not say. `reason` is the message's
    part that says why, as a clause, or "".
    """

    exit_code = 7
    code = "host_unreachable"
    status = 502

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        url: str | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message, code=code, status=status)
        self.url = url
        self.reason = reason


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

# Some errors have a status for the sake of HTTP; to the caller they mean something else.
_OF_THE_TASK = ("runner_refused", "runner_timeout", "runner_unreachable", "timed_out", "tunnel_not_connected")
_BY_CODE: dict[str, type[KohakuRiverError]] = {
    "access_denied": NotAllowedError,
    "expired_token": UnauthenticatedError,
    "name_taken": UsageError,
    "node_has_tasks": KohakuRiverError,
    "node_online": KohakuRiverError,
    **dict.fromkeys(("upgrade_required", "no_such_path", "method_not_allowed"), HostUnreachableError),
    **dict.fromkeys(_OF_THE_TASK, UnavailableError),
}

NOT_OUR_ANSWER = "not_our_answer"
"""The code of an error that no program of ours told."""

_REDIRECTS = (301, 302, 303, 307, 308)
_OF_PROXIES = (502, 503, 504)


def no_text(word: str, what: str = "arguments") -> UsageError:
    """The error for bytes of a command line that are no text; JSON, URLs and files of ours have no way to say them."""
    return UsageError(f"{os.fsencode(word)!r} is not UTF-8; {what} must be.")


def system_words(error: BaseException) -> str:
    """What the system says of an error of its own, else what the error says itself."""
    # asyncio puts the address where the system's words would be.
    if isinstance(error, ConnectionError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(getattr(error, "strerror", None) or error)


def from_status(status: int, message: str, code: str | None = None) -> KohakuRiverError:
    """The error that a host or a runner told: by its code where that says enough, else by its HTTP status."""
    cls = _BY_CODE.get(code or "") or _BY_STATUS.get(status, KohakuRiverError)
    return cls(message, code=code, status=status)


def from_answer(where: str, status: int, body: bytes, *, location: str = "", upgrade: bool = False) -> KohakuRiverError:
    """The exception for an HTTP answer that isn't the one hoped for.

    A refusal of ours has the body `{"error": code, "message": sentence}`, and is the error that it says. Anything else
    comes from something between or from another program, whatever its status: HostUnreachableError.

    Args:
        where: who was asked, as an address of scheme, name and port.
        location: where a redirect leads.
        upgrade: whether a WebSocket was asked for.

    Source: docs/protocol.md §4.
    """
    try:
        answer = json_of(body)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and isinstance(answer.get("error"), str) and isinstance(answer.get("message"), str):
        told = from_status(status, answer["message"], answer["error"])
        told.request_id = str(answer.get("request_id", ""))
        return told
    message = _foreign_message(where, status, location, upgrade)
    return HostUnreachableError(message, code=NOT_OUR_ANSWER, status=status if status in _OF_PROXIES else None)


def _foreign_message(where: str, status: int, location: str, upgrade: bool) -> str:
    if status in _REDIRECTS and location:
        return f"What answers at {where} redirects to {location!r}; {_address_to_give(where, location)}."
    if status in _OF_PROXIES:
        return f"What answers at {where} can't reach the host behind it (HTTP status {status}); see to that proxy."
    if status == 407:
        return f"A proxy on the way to {where} wants a name and a password (HTTP status 407)."
    if upgrade:
        return (
            f"What answers at {where} passes no WebSocket upgrades on, or is no KohakuRiver host (HTTP status "
            f"{status}); a proxy in front of a host must pass on the headers Upgrade and Connection."
        )
    return f"What answers at {where} is no KohakuRiver host (HTTP status {status}); check the host's URL."


def _address_to_give(where: str, location: str) -> str:
    """What to do about a redirect, as a clause."""
    try:
        parts = urlsplit(location)
    except ValueError:
        parts = urlsplit("")
    target = f"{parts.scheme}://{parts.netloc}"
    if parts.netloc and parts.scheme in ("http", "https") and target != where:
        return f"if the host is there, its URL is {target}"
    return "check the host's URL"
