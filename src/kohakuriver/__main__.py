"""`python -m kohakuriver` is the `kohakuriver` command, and where that begins."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import NoReturn

from kohakuriver import descriptors, spared

__all__ = ["main"]


def main() -> NoReturn:
    """Run one command and exit with its code (docs/cli.md "Exit codes")."""
    descriptors.die_by_interrupt()
    descriptors.prepare()
    spared.spare()
    from kohakuriver.cli.main import main as run

    try:
        run()
    except SystemExit as end:
        _leave(end.code)


def _leave(code: object) -> NoReturn:
    """End, without taking the interpreter apart first.

    It would look once more at each object and every page of memory, which takes as long as a short command in all.
    """
    main_thread = threading.main_thread()
    if isinstance(code, int) and all(each.daemon or each is main_thread for each in threading.enumerate()):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be no stderr
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)  # type: ignore[arg-type]  # whatever it was


if __name__ == "__main__":
    main()
