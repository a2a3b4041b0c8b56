"""Becomes a process task, or a command beside one: with the user, and the terminal or the pipes, that it is given.

It runs as a program of its own (standard library only, so that it starts fast), because only the new process itself
can make a terminal its controlling one, and take on another user: `python -I -S terminal_child.py TTY|- USER|- FD|-
PROGRAM ARGUMENT…`. USER is UID:GID, and the other groups behind that. FD is closed when PROGRAM runs.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["NOT_EXECUTABLE", "NOT_FOUND", "main"]

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells say it


def main() -> None:
    """Does not return: the process becomes PROGRAM, or says why not on its stderr."""
    tty, user, starting, *command = sys.argv[1:]
    if starting != "-":
        os.set_inheritable(int(starting), False)
    # A program inherits what is ignored: by Python the first two, the others by a runner that was started with nohup.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if tty != "-":
        terminal = os.open(tty, os.O_RDWR)  # the first one that a new session opens is its controlling terminal
        for descriptor in (0, 1, 2):
            os.dup2(terminal, descriptor)
        os.close(terminal)
    if user != "-":
        _take_on(*map(int, user.split(":")))
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        sys.stderr.write(f"{command[0]}: command not found\n")
        sys.exit(NOT_FOUND)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.exit(NOT_EXECUTABLE)


def _take_on(uid: int, gid: int, *groups: int) -> None:
    """This process is that user's from here on, for good."""
    os.get_exec_path()  # loads what execvp needs: that user may not be able to read Python's library
    os.setgroups([gid, *groups])
    os.setgid(gid)
    os.setuid(uid)


if __name__ == "__main__":
    main()
