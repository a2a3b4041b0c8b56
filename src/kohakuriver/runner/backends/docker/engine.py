"""The Docker engine: how it is found, what its errors mean, and what its client library has no public call for."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import aiodocker
import aiohttp
from aiodocker.exceptions import DockerError

from kohakuriver.errors import KohakuRiverError, UnavailableError

__all__ = [
    "ENGINE_SECONDS",
    "TROUBLE",
    "has",
    "limit",
    "new_client",
    "own_connection",
    "sentences",
    "transport_of",
    "why",
]

ENGINE_SECONDS = 60.0
"""How long the engine may take to answer."""

TROUBLE = (DockerError, aiohttp.ClientError, OSError, asyncio.TimeoutError)
"""What calls of the engine raise."""


def limit(more: float = 0) -> aiohttp.ClientTimeout:
    """The time limit of a call in which the engine itself waits for `more` seconds.

    The client has it for every call but those that can last: each of these is given it.
    """
    return aiohttp.ClientTimeout(total=ENGINE_SECONDS + more)


def new_client(api_version: str = "auto") -> aiodocker.Docker:
    """A client of the engine that the environment names, or of this machine's. Raises OSError without one."""
    try:
        return aiodocker.Docker(timeout=limit(), api_version=api_version)
    except (AssertionError, ValueError) as error:
        raise OSError("there is no engine's socket") from error


def own_connection(docker: aiodocker.Docker) -> aiodocker.Docker:
    """One more client of the engine, for what holds a connection for long: a client has 100, and then all wait."""
    return new_client(docker.api_version)


def why(error: BaseException) -> str:
    """Why there is no engine, where the program that asked knows it: may not, or none runs."""
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        system: Any = getattr(cause, "os_error", cause)
        if isinstance(system, OSError) and system.errno:
            return os.strerror(system.errno)
        cause = cause.__cause__ or cause.__context__
    return text or "it did not answer in time"


@contextlib.contextmanager
def sentences(what: str) -> Iterator[None]:
    """Turn the engine's errors into sentences that say what could not be done."""
    try:
        yield
    except DockerError as error:
        reason = str(error.message).strip().rstrip(".")
        raise KohakuRiverError(f"Docker could not {what}: {reason}.", code="docker", status=409) from error
    except asyncio.TimeoutError as error:
        raise UnavailableError(
            f"Docker could not {what}: the engine of this node took too long; try again.", code="engine_timeout"
        ) from error
    except (aiohttp.ClientError, OSError) as error:
        raise UnavailableError(
            f"Docker could not {what}: the engine does not answer ({error}).", code="no_engine"
        ) from error


async def has(docker: aiodocker.Docker, container: str, path: str) -> bool:
    """Whether a container has a file of that path; nothing of it is read."""
    try:
        async with docker._query(f"containers/{container}/archive", method="HEAD", params={"path": path}):
            return True
    except DockerError as error:
        if error.status != 404:
            raise
        return False
    except ValueError:  # what the engine has to say is in a body, which an answer to HEAD has not
        return False


def transport_of(stream: Any) -> asyncio.Transport | None:
    """What carries an exec's streams, None once it has gone: only the transport itself can be half-closed."""
    response = stream._resp
    connection = response.connection if response is not None else None
    return connection.transport if connection is not None else None
