"""Images that the engine has not got yet: from which registries a node fetches them, and what users hear of that.

The engine sends requests to whatever registry an image's name says, from its node. So it is asked to for those alone
that the node's administrator trusts, and what a registry has to say goes into the runner's log and to no user.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote

import aiodocker
import structlog
from aiodocker.exceptions import DockerError

from kohakuriver.errors import KohakuRiverError, NotFoundError, UsageError
from kohakuriver.images import ImageName, Registries
from kohakuriver.runner.backends.docker.engine import own_connection
from kohakuriver.runner.services.fair_queue import FairQueue

__all__ = ["Images"]

PULLS, PULLS_OF_A_USER = 8, 2

log = structlog.get_logger("kohakuriver.runner")

_NOT_THERE = ("not found", "unknown", "denied", "unauthorized", "no such")
"""The engine tells of a registry's answer in the middle of a pull, where it has no status for it, only words.

They choose between two sentences for the user and their codes, and nothing else: other words mean "can't be asked"."""


class Images:
    """The engine's images on a node, and how more come.

    Args:
        docker: gives the engine's client, or raises UnavailableError.
        seconds: without any progress, after which a pull is given up; 0 is never.
    """

    def __init__(
        self, docker: Callable[[], aiodocker.Docker], node: str, registries: Registries, *, seconds: float
    ) -> None:
        self._docker = docker
        self._node = node
        self._registries = registries
        self._seconds = seconds
        self._pulls = FairQueue(PULLS, PULLS_OF_A_USER)

    async def need(self, image: str, on_pull: Callable[[str], None]) -> dict[str, Any]:
        """See to it that the engine has an image; its configuration. `on_pull` is told when that takes a pull.

        Raises UsageError for what is no image's name, KohakuRiverError "registry_not_allowed" (409), and what
        `missing` gives.
        """
        try:
            name = ImageName.parse(image)
        except ValueError as error:
            raise UsageError(f"{error}.") from None
        if (there := await self._configuration(image)) is not None:
            return there
        if name.registry is None:
            raise self.missing(image)
        if not self._registries.allow(name.registry):
            raise KohakuRiverError(
                f"The image {image!r} is not on node {self._node}, which fetches none from {name.registry}; load it "
                f"there, or start its runner with --registry {name.registry}.",
                code="registry_not_allowed",
                status=409,
            )
        on_pull(f"waiting for other images, then pulling {image}")
        async with self._pulls.place():
            on_pull(f"pulling the image {image}")
            await self._pull(image)
        if (pulled := await self._configuration(image)) is None:
            raise self.missing(image)
        return pulled

    async def _configuration(self, image: str) -> dict[str, Any] | None:
        """What an image says of the containers that are made of it; None where the engine has no such image."""
        try:
            shown = await self._docker().images.inspect(quote(image, safe="/:@"))
        except DockerError as error:
            if error.status != 404:
                raise
            return None
        return dict(shown.get("Config") or {})

    async def _pull(self, image: str) -> None:
        own = own_connection(self._docker())
        try:
            progress: AsyncIterator[Any] = own.images.pull(image, stream=True)
            while await asyncio.wait_for(anext(progress, None), self._seconds or None) is not None:
                pass
        except asyncio.TimeoutError:
            log.warning("an image's pull is given up: its registry is too slow", image=image, seconds=self._seconds)
            why = f"nothing has come from its registry for {self._seconds:g} s"
            raise self.missing(image, why, code="image_pull_stalled") from None
        except DockerError as error:
            # Registries say what they like, and how an address that is none answers is nothing for users to find out.
            log.warning("an image could not be pulled", image=image, reason=str(error.message))
            if error.status == 404 or any(words in str(error.message).lower() for words in _NOT_THERE):
                raise self.missing(image, "its registry does not give it to this node") from None
            why = "its registry can't be asked, and the runner's log says why"
            raise self.missing(image, why, code="image_pull_failed") from None
        finally:
            await own.close()

    def missing(self, image: str, why: str = "", *, code: str = "image_not_found") -> NotFoundError:
        """The error for an image that is not there, nor comes."""
        reason = f" ({why})" if why else ""
        return NotFoundError(
            f"The image {image!r} is not on node {self._node} and can't be pulled{reason}; check its name or load it "
            "there.",
            code=code,
        )
