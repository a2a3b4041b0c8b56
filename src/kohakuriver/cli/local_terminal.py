"""The terminal in front of the user: raw while something remote uses it, and as it was before in any event."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from types import TracebackType

__all__ = ["Keeper", "RawTerminal", "clean", "size"]

# Leave the alternate screen, show the cursor, no mouse reports, no bracketed paste, no colours: what a program that
# could not say good-bye may have left. Terminals ignore what they are not in.
CLEAN = b"\x1b[?1047l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[0m\r\n"


def size(fd: int) -> tuple[int, int]:
    """Rows and columns; 24 x 80 where the terminal does not know."""
    with contextlib.suppress(OSError):
        cols, rows = os.get_terminal_size(fd)
        if rows > 0 and cols > 0:
            return rows, cols
    return 24, 80


class Keeper:
    """A process that puts the terminal right again if this one is killed, and only then.

    To be made before there are threads; `with` it around all that may leave the terminal raw.
    """

    def __init__(self, fd: int) -> None:
        self._modes = termios.tcgetattr(fd)
        theirs, self._ours = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._keep(fd, theirs)
        os.close(theirs)

    def _keep(self, fd: int, ours: int) -> None:
        """What the child does; it does not return."""
        try:
            os.setsid()  # what ends a terminal's programs must not end this one
            terminal = os.dup(fd)
            os.close(self._ours)
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            if not os.read(ours, 1):
                termios.tcsetattr(terminal, termios.TCSANOW, self._modes)
                os.write(terminal, CLEAN)
        finally:
            os._exit(0)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.write(self._ours, b".")
        os.close(self._ours)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


class RawTerminal:
    """`with RawTerminal(fd):` every key goes through as it is. `again` after somebody else has changed that."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before = termios.tcgetattr(fd)

    def __enter__(self) -> RawTerminal:
        self.again()
        return self

    def again(self) -> None:
        tty.setraw(self._fd, termios.TCSADRAIN)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(termios.error):  # the terminal may be what has gone
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)


def clean(fd: int) -> None:
    """Undo on the screen what a program that was cut off may have left."""
    with contextlib.suppress(OSError):
        os.write(fd, CLEAN)
