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

__all__ = ["has", "new_client", "sentences", "transport_of", "why"]


def new_client() -> aiodocker.Docker:
    """A client of the engine that the environment names, or of this machine's. Raises OSError without one."""
    try:
        return aiodocker.Docker()
    except (AssertionError, ValueError) as error:
        raise OSError("there is no engine's socket") from error


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
