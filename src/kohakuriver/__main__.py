"""`python -m kohakuriver` is the `kohakuriver` command, and where that begins."""

from __future__ import annotations

from typing import NoReturn

from kohakuriver import descriptors, spared

__all__ = ["main"]


def main() -> NoReturn:
    """Run one command and exit with its code (docs/cli.md "Exit codes")."""
    descriptors.die_by_interrupt()
    descriptors.prepare()
    spared.spare()
    from kohakuriver.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
