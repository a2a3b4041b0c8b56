"""What a process in the background keeps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kohakuriver.cli import background


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before, handlers = logging.raiseExceptions, logging.root.handlers[:]
    yield
    logging.raiseExceptions = before
    for handler in logging.root.handlers:
        if handler not in handlers:
            handler.close()


def test_a_log_never_grows_beyond_two_files_of_its_size(tmp_path: Path) -> None:
    logger = background.log_to(tmp_path / "it.log")
    for number in range(20_000):
        logger.info("%d: something that happens again and again", number)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"it.log", "it.log.1"}
    assert max(sizes.values()) <= background.LOG_BYTES
    assert "19999: something" in (tmp_path / "it.log").read_text()


def test_what_libraries_complain_of_is_in_the_log_too(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(logging.root, "handlers", [])  # a report of the test with half a character in it can't be sent
        background.log_to(tmp_path / "it.log")
        logging.getLogger("asyncio").error("it broke\udcff")
        logging.root.handlers[0].close()
    assert "it broke" in (tmp_path / "it.log").read_text()
