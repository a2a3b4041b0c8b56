"""What integration tests share that need a Docker engine."""

from __future__ import annotations

import pytest

from tests.support import docker_images


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine that answers; tests that ask for it are skipped without one, and fail in CI."""
    docker_images.require_engine()


@pytest.fixture(scope="session")
def busybox(engine: None) -> str:
    """The name of an image with busybox, and `sh` among its names."""
    return docker_images.busybox_image()
