"""What an ERROR says of a socket that failed; the tunnel client says the same (tests/vectors/errors.json)."""

from __future__ import annotations

import asyncio
import errno
import os

from kohakuriver.tunnel.protocol import ErrorText

__all__ = ["LACKING", "NOT_SENT", "WINDOW_PASSED", "nobody_takes_datagrams", "service_error", "user_error"]

_SENTENCES = {
    errno.ECONNREFUSED: "nothing listens on port {port} {where}",
    errno.ETIMEDOUT: "port {port} {where} did not answer",
    errno.ECONNRESET: "the service reset the connection",
    errno.EPIPE: "the service closed the connection",
    errno.EMFILE: "this end of the tunnel has too many open files",
    errno.ENFILE: "the node has too many open files",
    errno.EHOSTUNREACH: "there is no route to port {port} {where}",
    errno.ENETUNREACH: "there is no network to reach port {port} {where}",
    errno.EADDRNOTAVAIL: "no local port is free to reach port {port} {where} from",
    errno.EPROTO: "more was sent than the window allows",
    errno.EPROTONOSUPPORT: "only TCP and UDP are carried",
    errno.ENOBUFS: "the node is out of memory",
}
_SAME = {errno.ENOMEM: errno.ENOBUFS}
LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What the end that dials lacks itself: says nothing of whom it dials."""

WINDOW_PASSED = ErrorText("EPROTO", _SENTENCES[errno.EPROTO])
NOT_SENT = ErrorText("EPROTO", "what was acknowledged, or ended, is not what was sent")


def service_error(exc: BaseException, port: int, where: str) -> ErrorText:
    """Why `port` can't be reached `where` ("in the task"), or why its connection broke."""
    number = _number(exc)
    number = _SAME.get(number, number)
    sentence = _SENTENCES.get(number)
    if sentence is not None:
        return ErrorText(errno.errorcode[number], sentence.format(port=port, where=where))
    return ErrorText("EIO", f"port {port} {where} can't be reached: {_reason(exc)}")


def nobody_takes_datagrams(port: int, where: str) -> ErrorText:
    """Why datagrams for `port` come to nothing."""
    return service_error(OSError(errno.ECONNREFUSED, ""), port, f"(udp) {where}")


def user_error(exc: BaseException) -> ErrorText:
    """Why the connection at the user's end broke."""
    return ErrorText(errno.errorcode.get(_number(exc), "EIO"), f"the user's connection broke: {_reason(exc)}")


def _number(exc: BaseException) -> int:
    if isinstance(exc, asyncio.TimeoutError | TimeoutError):
        return errno.ETIMEDOUT
    return (exc.errno or 0) if isinstance(exc, OSError) else 0


def _reason(exc: BaseException) -> str:
    number = _number(exc)
    return os.strerror(number) if number else str(exc) or type(exc).__name__
