"""`kohakuriver connect` on a pseudo-terminal, as a person has it."""

from __future__ import annotations

import re
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pexpect

from tests.support.forked import PROGRAM
from tests.support.up import TIMEOUT, Commands

__all__ = ["Terminal", "a_terminal"]


class Terminal:
    """`kohakuriver connect` on a pseudo-terminal."""

    def __init__(
        self, commands: Commands, *arguments: str, rows: int = 24, cols: int = 80, ignores_hangup: bool = False
    ) -> None:
        self.child = pexpect.spawn(
            PROGRAM[0],
            [*PROGRAM[1:], "connect", *arguments],
            env={**commands.environment, "TERM": "xterm"},
            dimensions=(rows, cols),
            timeout=TIMEOUT,
            echo=True,
            ignore_sighup=ignores_hangup,
        )
        self.child.delaybeforesend = None
        self.before = self.modes()

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.child.child_fd)

    def line(self, text: str) -> None:
        self.child.send(text.encode() + b"\r")

    def expect(self, pattern: str) -> re.Match[bytes]:
        """Wait for output that matches."""
        self.child.expect(pattern.encode())
        match: re.Match[bytes] = self.child.match
        return match

    def ready(self) -> None:
        """Wait until the shell obeys; what is typed is told from what comes by an expansion."""
        self.line("echo rea$((1))dy")
        self.expect("rea1dy")

    def ended(self) -> int:
        """Wait for the end; the exit code."""
        self.child.expect(pexpect.EOF)
        self.child.wait()
        return int(self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus)

    def close_window(self) -> int:
        """Have the terminal go away; the exit code."""
        self.child.ptyproc.fileobj.close()
        return int(self.child.ptyproc.wait())

    def said(self) -> str:
        """What came before the end."""
        return str(self.child.before.decode())


@contextmanager
def a_terminal(commands: Commands, *arguments: str, **options: Any) -> Iterator[Terminal]:
    terminal = Terminal(commands, *arguments, **options)
    try:
        yield terminal
    finally:
        terminal.child.close(force=True)
