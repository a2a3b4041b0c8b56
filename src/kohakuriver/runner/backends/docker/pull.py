"""Images that the engine has not got yet: from which registries a node fetches them, and what users hear of that.

The engine sends requests to whatever registry an image's name says, from its node. So it is asked to for those alone
that the node's administrator trusts, and what a registry has to say goes into the runner's log and to no user.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import quote

import aiodocker
import structlog
from aiodocker.exceptions import DockerError

from kohakuriver.errors import KohakuRiverError, NotFoundError, UsageError
from kohakuriver.images import DEFAULT_REGISTRY, ImageName, Registries
from kohakuriver.quotas import in_words
from kohakuriver.runner.backends.docker.engine import own_connection
from kohakuriver.runner.services.fair_queue import FairQueue
from kohakuriver.task import Pull

__all__ = ["Fetched", "Images"]

PULLS, PULLS_OF_A_USER = 8, 2

TOLD_SECONDS = 2.0
"""How often is told how far a pull is."""

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

    async def need(self, image: str, on_pull: Callable[[str], None], when: Pull = "missing") -> dict[str, Any]:
        """See to it that the engine has an image; its configuration. `on_pull` is told when that takes a pull.

        Raises UsageError for what is no image's name, KohakuRiverError "registry_not_allowed" or "image_is_local"
        (409), and what `missing` gives.
        """
        try:
            name = ImageName.parse(image)
        except ValueError as error:
            raise UsageError(f"{error}.") from None
        there = await self._shown(image)
        if there is None or (when == "always" and name.registry is not None):
            self._check(image, name, there, when)
            on_pull(f"waiting for other images, then pulling {image}")
            async with self._pulls.place():
                on_pull(f"pulling the image {image}")
                await self._pull(image, on_pull, anew=there is not None)
            there = await self._shown(image)
        if there is None:
            raise self.missing(image)
        return dict(there.get("Config") or {})

    def _check(self, image: str, name: ImageName, there: dict[str, Any] | None, when: Pull) -> None:
        """Raises what is against a pull; `there` is what the engine has under that name."""
        if when == "never":
            raise NotFoundError(
                f"The image {image!r} is not on node {self._node}, and `--pull never` fetches none; load it there, or "
                "leave that out.",
                code="image_not_found",
            )
        if name.registry is None:
            raise self.missing(image)
        if not self._registries.allow(name.registry):
            raise KohakuRiverError(
                f"The image {image!r} is not on node {self._node}, which fetches none from {name.registry}; load it "
                f"there, or start its runner with --registry {name.registry}."
                if there is None
                else f"Node {self._node} fetches no images from {name.registry}; leave `--pull always` out, or start "
                f"its runner with --registry {name.registry}.",
                code="registry_not_allowed",
                status=409,
            )
        if there is not None and not any(_same(name, digest) for digest in there.get("RepoDigests") or ()):
            # Others on this node mean their own by this name: nobody's registry takes its place.
            raise KohakuRiverError(
                f"The image {image!r} was made on node {self._node} or loaded there, and `--pull always` would put "
                "another one in its place; leave that out.",
                code="image_is_local",
                status=409,
            )

    async def _shown(self, image: str) -> dict[str, Any] | None:
        """What the engine says of an image; None where it has no such image."""
        try:
            return dict(await self._docker().images.inspect(quote(image, safe="/:@")))
        except DockerError as error:
            if error.status == 400:  # engines before 23 know no addresses of IPv6
                raise UsageError(f"The engine of node {self._node} takes {image!r} for no name of an image.") from None
            if error.status != 404:
                raise
            return None

    async def _pull(self, image: str, on_pull: Callable[[str], None], *, anew: bool) -> None:
        own = own_connection(self._docker())
        try:
            progress: AsyncIterator[Any] = own.images.pull(image, stream=True)
            fetched, told = Fetched(), time.monotonic()
            while (event := await asyncio.wait_for(anext(progress, None), self._seconds or None)) is not None:
                fetched.take(event)
                if time.monotonic() - told >= TOLD_SECONDS and fetched.words:
                    told = time.monotonic()
                    on_pull(f"pulling the image {image}: {fetched.words}")
        except asyncio.TimeoutError:
            log.warning("an image's pull is given up: its registry is too slow", image=image, seconds=self._seconds)
            why = f"nothing has come from its registry for {self._seconds:g} s"
            raise self.missing(image, why, code="image_pull_stalled", anew=anew) from None
        except DockerError as error:
            # Registries say what they like, and how an address that is none answers is nothing for users to find out.
            log.warning("an image could not be pulled", image=image, reason=str(error.message))
            if error.status == 404 or any(words in str(error.message).lower() for words in _NOT_THERE):
                raise self.missing(image, "its registry does not give it to this node", anew=anew) from None
            why = "its registry can't be asked, and the runner's log says why"
            raise self.missing(image, why, code="image_pull_failed", anew=anew) from None
        finally:
            await own.close()

    def missing(self, image: str, why: str = "", *, code: str = "image_not_found", anew: bool = False) -> NotFoundError:
        """The error for an image that is not there, nor comes; `anew`: one is there, and no newer one comes."""
        reason = f" ({why})" if why else ""
        if anew:
            return NotFoundError(
                f"The image {image!r} can't be pulled again to node {self._node}{reason}; leave `--pull always` out to "
                "use the one that is there.",
                code=code,
            )
        return NotFoundError(
            f"The image {image!r} is not on node {self._node} and can't be pulled{reason}; check its name or load it "
            "there.",
            code=code,
        )


class Fetched:
    """How much of an image is there, by what its engine tells of its layers."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """One event of a pull, in the engine's words."""
        layer, status, detail = str(event.get("id", "")), event.get("status"), event.get("progressDetail") or {}
        if status == "Downloading" and detail.get("total", 0) > 0:
            self._layers[layer] = (int(detail.get("current", 0)), int(detail["total"]))
        elif status in ("Download complete", "Pull complete") and layer in self._layers:
            self._layers[layer] = (self._layers[layer][1],) * 2

    @property
    def words(self) -> str:
        """For people; "" where nothing is known yet. The whole is that of the layers whose size is known."""
        there, whole = (sum(column) for column in zip(*self._layers.values(), strict=True)) if self._layers else (0, 0)
        return f"{in_words('memory', there)} of {in_words('memory', whole)}" if whole else ""


def _same(name: ImageName, digest: str) -> bool:
    """Whether this digest, as an engine tells it, is of an image from where `name` leads."""
    try:
        known = ImageName.parse(digest)
    except ValueError:
        return False
    return (known.registry, _short(known)) == (name.registry, _short(name))


def _short(name: ImageName) -> str:
    return name.path.removeprefix("library/") if name.registry == DEFAULT_REGISTRY else name.path
