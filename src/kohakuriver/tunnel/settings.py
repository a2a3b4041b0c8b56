"""What of an endpoint can be set, by which name, and within which bounds (docs/guide/tuning.md).

The same names in the environment (``KOHAKURIVER_WINDOW_MAX``), in ``config.toml`` (``window_max``) and in the static
tunnel client.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kohakuriver.errors import UsageError
from kohakuriver.tunnel.windows import FIRST_WINDOW, MAX_WINDOW, MIN_WINDOW, SESSION_BUDGET

__all__ = ["NAMES", "RESUME_FOR", "EndpointConfig", "endpoint_config", "from_environment", "resume_for", "variables"]

LONGEST = 86_400.0
MOST_PEERS = 65_536
RESUME_FOR = 3600

# Hops hold no more than SESSION_BUDGET for one session, so nothing larger can be given out.
_BYTES = {"window_first": "first_window", "window_max": "max_window", "window_budget": "budget"}
_SECONDS = {"linger": "v1_linger", "udp_idle": "udp_idle"}
_COUNTS = {"udp_peers": "udp_peers"}

NAMES = (*_BYTES, *_SECONDS, *_COUNTS)
# What the tunnel client in a container alone has (docs/guide/tuning.md).
CONTAINERS = ("keep_budget", "detached_budget", "detached_streams", "terminals")


@dataclass
class EndpointConfig:
    """What an endpoint may hold and how long it waits. Sizes in bytes, times in seconds."""

    first_window: int = FIRST_WINDOW
    max_window: int = MAX_WINDOW
    budget: int = SESSION_BUDGET
    v1_hold: int = 1 << 20
    v1_linger: float | None = None  # None: as long as the end at hand lingers
    dial_timeout: float = 10.0
    reattach_wait: float = 15.0
    outage: float = 60.0
    udp_idle: float = 60.0
    udp_peers: int = 1024
    udp_queue: int = 1 << 20


def endpoint_config(get: Callable[[str], object]) -> EndpointConfig:
    """The configuration that ``get`` gives by name; None and an empty text stand for the default.

    A budget below a window makes that smaller too. Raises UsageError with the setting's name.
    """
    config = EndpointConfig()
    for name, field in _BYTES.items():
        setattr(config, field, _whole(name, get(name), MIN_WINDOW, SESSION_BUDGET, getattr(config, field)))
    for name, field in _COUNTS.items():
        setattr(config, field, _whole(name, get(name), 1, MOST_PEERS, getattr(config, field)))
    for name, field in _SECONDS.items():
        setattr(config, field, _seconds(name, get(name), getattr(config, field)))
    config.max_window = min(config.max_window, config.budget)
    config.first_window = min(config.first_window, config.max_window)
    return config


def resume_for(value: object) -> int:
    """For how many seconds connections wait for a link that is lost; None and an empty text are RESUME_FOR.

    Raises UsageError.
    """
    return _whole("resume_for", value, 1, int(LONGEST), RESUME_FOR)


def _whole(name: str, value: object, least: int, most: int, default: int) -> int:
    if value is None or value == "":
        return default
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if not least <= number <= most:
        raise UsageError(f"The setting {name!r} must be a whole number from {least} to {most}, not {str(value)!r}.")
    return number


def _seconds(name: str, value: object, default: float | None) -> float | None:
    if value is None or value == "":
        return default
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    if not 0 < number <= LONGEST:
        raise UsageError(f"The setting {name!r} must be seconds, at most {LONGEST:g}, not {str(value)!r}.")
    return number


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of our variables that are set: what a runner hands on to the tunnel clients of its tasks."""
    names = [f"KOHAKURIVER_{name.upper()}" for name in (*NAMES, *CONTAINERS)]
    return {name: environ[name] for name in names if environ.get(name)}


def from_environment(environ: Mapping[str, str] = os.environ) -> EndpointConfig:
    """The configuration that the environment gives. Raises UsageError."""
    return endpoint_config(lambda name: environ.get(f"KOHAKURIVER_{name.upper()}"))
