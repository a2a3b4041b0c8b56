"""What a process in the background keeps."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kohakuriver.cli import background
from kohakuriver.cli.background import Log


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = logging.raiseExceptions
    yield
    logging.raiseExceptions = before


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Without what pytest logs with: a report of the test with half a character in it can't be sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])
        yield


def test_a_log_never_grows_beyond_two_files_of_its_size(tmp_path: Path) -> None:
    log = Log(tmp_path / "it.log")
    for number in range(20_000):
        log.logger.info("%d: something that happens again and again", number)
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"it.log", "it.log.1"}
    assert max(sizes.values()) <= background.LOG_BYTES
    assert "19999: something" in (tmp_path / "it.log").read_text()


def test_what_libraries_complain_of_is_in_the_log_of_what_it_is_about_else_in_all(tmp_path: Path) -> None:
    async def work(name: str) -> None:
        log = Log(tmp_path / name)
        log.begin()
        logging.getLogger("asyncio").error("%s broke\udcff", name)
        if len(list(tmp_path.iterdir())) == 2:
            both.set()
        await both.wait()
        await over.wait()
        log.close()
        logging.getLogger("asyncio").error("too late")

    async def main() -> None:
        working = [asyncio.ensure_future(work(name)) for name in ("one", "other")]
        await both.wait()
        logging.getLogger("asyncio").error("who knows")
        over.set()
        await asyncio.gather(*working)

    both, over = asyncio.Event(), asyncio.Event()
    with alone():
        asyncio.run(main())
    told = {path.name: [line.split(" ", 2)[2] for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    assert told == {name: [f"{name} broke\\udcff", "who knows"] for name in ("one", "other")}


def test_a_log_that_was_closed_is_kept_by_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path / "it.log")
    with alone():
        asyncio.run(_begun(log))
    log.close()
    loggers = len(logging.root.manager.loggerDict)
    del log
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, Log)]
    assert len(logging.root.manager.loggerDict) == loggers


async def _begun(log: Log) -> None:
    log.begin()
