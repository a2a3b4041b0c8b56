"""The GPUs of this node, and how an engine gives them to a container."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohakuriver.errors import UnavailableError, UsageError

__all__ = ["Gpu", "Grant", "found", "granted"]

_NVIDIA = re.compile(r"nvidia([0-9]{1,3})")
_BESIDE_NVIDIA = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
_CDI = "nvidia.com/gpu"


@dataclass(frozen=True)
class Gpu:
    """One of them. `number` is what users call it; `uuid` is NVIDIA's own name for it, "" where none is told."""

    number: str
    path: str
    uuid: str = ""

    @property
    def nvidia(self) -> list[str]:
        """What NVIDIA's tools know it by, the surest first, whatever users call it; empty where they don't."""
        named = _NVIDIA.fullmatch(Path(self.path).name) if Path(self.path).parent.name == "dev" else None
        return [name for name in (self.uuid, named[1]) if name] if named is not None else []


@dataclass(frozen=True)
class Grant:
    """What gives a container its GPUs, in the engine's words."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    devices: list[dict[str, str]] = field(default_factory=list)


def found(
    paths: Sequence[str] = (), *, dev: Path = Path("/dev"), proc: Path = Path("/proc/driver/nvidia/gpus")
) -> list[Gpu]:
    """The node's GPUs: those at `paths`, or where none are named NVIDIA's. Raises UsageError for what is no device."""
    for path in paths:
        try:
            is_device = stat.S_ISCHR(Path(path).stat().st_mode)
        except OSError:
            is_device = False
        if not is_device:
            raise UsageError(f"--gpu {path}: there is no such device on this machine.")
    uuids = _uuids(proc)
    if paths:
        named = [_NVIDIA.fullmatch(Path(path).name) for path in paths]
        return [
            Gpu(str(number), path, uuids.get(match[1], "") if match is not None else "")
            for number, (path, match) in enumerate(zip(paths, named, strict=True))
        ]
    numbers = sorted(int(match[1]) for path in dev.glob("nvidia*") if (match := _NVIDIA.fullmatch(path.name)))
    return [Gpu(str(number), str(dev / f"nvidia{number}"), uuids.get(str(number), "")) for number in numbers]


def _uuids(proc: Path) -> dict[str, str]:
    """NVIDIA's names of GPUs by the numbers of their devices, as the driver tells them."""
    known: dict[str, str] = {}
    for file in proc.glob("*/information"):
        facts = dict(line.split(":", 1) for line in file.read_text("utf-8", "replace").splitlines() if ":" in line)
        known[facts.get("Device Minor", "").strip()] = facts.get("GPU UUID", "").strip()
    return known


def granted(numbers: Sequence[str], gpus: Sequence[Gpu], engine: Mapping[str, Any], node: str) -> Grant:
    """How an engine, of which `engine` is what it says of itself, gives a container these GPUs.

    With NVIDIA's runtime or its CDI devices the container gets the driver's libraries, too; else the devices alone.
    Raises UnavailableError "no_gpus" where one is gone.
    """
    known = {gpu.number: gpu for gpu in gpus}
    if lacking := [number for number in numbers if number not in known]:
        raise UnavailableError(f"Node {node} has no GPU {lacking[0]} any more; make a new task.", code="no_gpus")
    mine = [known[number] for number in numbers]
    theirs = [gpu.nvidia for gpu in mine]
    if not all(theirs) or not mine:
        return Grant(devices=[_device(gpu.path) for gpu in mine])
    if "nvidia" in (engine.get("Runtimes") or {}):
        return Grant(requests=[{"Driver": "", "DeviceIDs": [names[0] for names in theirs], "Capabilities": [["gpu"]]}])
    cdi = {device.get("ID") for device in engine.get("DiscoveredDevices") or ()}
    named = [[f"{_CDI}={name}" for name in names if f"{_CDI}={name}" in cdi] for names in theirs]
    if all(named):
        return Grant(requests=[{"Driver": "cdi", "DeviceIDs": [each[0] for each in named]}])
    beside = [str(path) for name in _BESIDE_NVIDIA if (path := Path(mine[0].path).with_name(name)).exists()]
    return Grant(devices=[_device(path) for path in (*(gpu.path for gpu in mine), *beside)])


def _device(path: str) -> dict[str, str]:
    return {"PathOnHost": path, "PathInContainer": path, "CgroupPermissions": "rwm"}
