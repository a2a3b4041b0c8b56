"""Why a connection could not be made, in words: the other side's fault, the way's, or a lack of this program's own."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

from kohakuriver import tls
from kohakuriver.errors import system_words
from kohakuriver.runtime import out_of_descriptors

__all__ = ["own_lack", "reason"]

_LACKS = {
    errno.EMFILE: "has too many open files",
    errno.ENFILE: "is on a machine with too many open files",
    errno.ENOBUFS: "is on a machine out of memory",
    errno.ENOMEM: "is on a machine out of memory",
    errno.EADDRNOTAVAIL: "has no local address or port left for that",
}


def own_lack(error: BaseException) -> str | None:
    """What the program that dialled lacks, as what follows its name; None where `error` is about something else."""
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror):  # a resolver that can open no file says that there is no such name
            return _LACKS[errno.EMFILE] if out_of_descriptors() else None
        if isinstance(cause, OSError) and cause.errno in _LACKS:
            return _LACKS[cause.errno]
    return None


def reason(error: BaseException) -> str:
    """Why it could not be made, as a clause, without the wrapping of the libraries between."""
    if distrust := tls.reason(error):
        return distrust
    if lack := own_lack(error):
        return f"this program {lack}"
    *_, innermost = _causes(error)
    return (system_words(innermost) or type(innermost).__name__).strip().rstrip(".")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it comes from; what a resolver says comes from nothing that anybody could use."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = None if isinstance(cause, socket.gaierror) else cause.__cause__ or cause.__context__
