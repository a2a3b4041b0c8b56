"""Names that can't be resolved at all: Python raises UnicodeError for them, where for others it raises OSError."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

__all__ = ["resolving"]


@contextlib.contextmanager
def resolving() -> Iterator[None]:
    """Stands around whatever resolves a name. Raises `socket.gaierror`, an OSError, for one that can't be a name.

    Such a name has an empty label (`a..b`), or one of more than 63 characters (RFC 1035 section 2.3.4).
    """
    try:
        yield
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, "this can't be the name of a machine") from error
