"""The classes of the backends that backends.py of the package declares."""

from __future__ import annotations

from collections.abc import Sequence

from kohakuriver.errors import UsageError
from kohakuriver.runner.backends.address import AddressBackend
from kohakuriver.runner.backends.base import Backend, Surroundings
from kohakuriver.runner.backends.docker.tasks import DockerBackend
from kohakuriver.runner.backends.process.tasks import ProcessBackend
from kohakuriver.runner.backends.slurm.tasks import SlurmBackend

__all__ = ["CLASSES", "made"]

CLASSES: dict[str, type[Backend]] = {
    cls.name: cls for cls in (DockerBackend, ProcessBackend, SlurmBackend, AddressBackend)
}


def made(wanted: Sequence[str], around: Surroundings) -> dict[str, Backend]:
    """The backends of a runner that offers `wanted`; address is always among them. Raises UsageError."""
    names = list(dict.fromkeys([AddressBackend.name, *wanted]))
    if unknown := [name for name in names if name not in CLASSES]:
        raise UsageError(f"{unknown[0]!r} is no backend; there are {', '.join(CLASSES)}.")
    return {name: CLASSES[name].made(around) for name in names}
