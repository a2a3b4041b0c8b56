"""`python -m kohakuriver` is the `kohakuriver` command."""

from __future__ import annotations

from kohakuriver.cli.main import main

if __name__ == "__main__":
    main()
