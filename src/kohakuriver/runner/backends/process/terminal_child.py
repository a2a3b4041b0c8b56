"""Becomes a command that runs beside a process task, with a terminal of its own or with the pipes that it was given.

It runs as a program of its own (standard library only, so that it starts fast), because only the new process itself
can make a terminal its controlling one: `python -I -S terminal_child.py TTY|- PROGRAM ARGUMENT…`.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["NOT_EXECUTABLE", "NOT_FOUND", "main"]

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells say it


def main() -> None:
    """Does not return: the process becomes PROGRAM, or says why not on its stderr."""
    tty, command = sys.argv[1], sys.argv[2:]
    # A program inherits what is ignored: by Python the first two, the others by a runner that was started with nohup.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if tty != "-":
        terminal = os.open(tty, os.O_RDWR)  # the first one that a new session opens is its controlling terminal
        for descriptor in (0, 1, 2):
            os.dup2(terminal, descriptor)
        os.close(terminal)
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        sys.stderr.write(f"{command[0]}: command not found\n")
        sys.exit(NOT_FOUND)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.exit(NOT_EXECUTABLE)


if __name__ == "__main__":
    main()
