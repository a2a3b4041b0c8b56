"""What our programs do without: modules that libraries load where they find them, for uses that we have none of.

None in `sys.modules` makes an import fail as if the module were not installed (The Python Language Reference, section
5.3.1), and the libraries named here go on without it then.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["spare", "without"]

# httpx's own command line, which loads Rich and Click; and FastAPI's look whether a model is one of Pydantic 1.
_NEVER_USED = ("httpx._main", "pydantic.v1")


def spare() -> None:
    """For a program of ours, at its start: none of that is loaded in this process any more."""
    for name in _NEVER_USED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """What is imported here gets no module `name`, unless that is loaded already; it can be imported afterwards."""
    spared = name not in sys.modules
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if spared:
            del sys.modules[name]
