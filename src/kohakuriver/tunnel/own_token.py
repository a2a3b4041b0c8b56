"""A tunnel client's credentials: its container's token, and proof that it is the client that it was before.

Source: docs/protocol.md §5.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from pathlib import Path

from kohakuriver.errors import UsageError

__all__ = ["OwnToken"]

log = logging.getLogger("tunnel-client")


class OwnToken:
    """The token that lies in a file, and this client's own id, made at random when it starts.

    Args:
        file: where the token is; None for a client of a runner that wants none.
        take: remove the file once it is read, so that nobody else reads it; the token is kept in memory. Another file
            in its place has a newer token.
    """

    def __init__(self, file: Path | None, *, take: bool = False) -> None:
        self.client = secrets.token_hex(16)
        self._file = file
        self._take = take
        self._held: str | None = None

    @classmethod
    def of(cls, token: str | None) -> OwnToken:
        """One that has this token already."""
        own = cls(None)
        own._held = token
        return own

    def now(self) -> str | None:
        """The token, None where there is none to show. Raises UsageError where the file has none."""
        if self._file is None:
            return self._held
        try:
            token = self._file.read_text("ascii").strip()
        except (OSError, ValueError) as error:
            if self._held is None:
                reason = error.strerror if isinstance(error, OSError) else "it holds no token"
                raise UsageError(f"The token can't be read from {self._file}: {reason}.") from error
            return self._held
        if not token:
            raise UsageError(f"There is no token in {self._file}.")
        if self._take:
            self._remove(self._file)
        self._held = token
        return token

    @property
    def is_there(self) -> bool:
        """Whether there is one to be taken."""
        return self._take and self._file is not None and self._file.exists()

    def new_one_is_there(self) -> None:
        """The runner says so: take it while it is good, for the next tunnel."""
        if self._take:
            with contextlib.suppress(UsageError):
                self.now()

    def _remove(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the token can't be removed from %s: %s", file, error.strerror)
