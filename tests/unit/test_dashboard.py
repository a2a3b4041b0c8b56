"""How the dashboard is served: what runs in it, what browsers may keep, how large it is, what there is without it."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.host import dashboard
from tests.support.browser import Browser
from tests.support.host_only import HostUnderTest

Run = Callable[[Coroutine[Any, Any, None]], None]
Check = Callable[[HostUnderTest], Coroutine[Any, Any, None]]

ROOT = Path(__file__).resolve().parents[2]
MOST_AT_FIRST = 300 * 1024
SCRIPT = b"console.log('x');" * 50


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was built is looked up anew."""
    dashboard.built.cache_clear()
    yield
    dashboard.built.cache_clear()


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dashboard as it is built, of one page and one script."""
    directory = tmp_path / "dashboard"
    (directory / "assets").mkdir(parents=True)
    (directory / "index.html").write_text("<!doctype html><title>built</title>")
    (directory / "assets" / "main-x.js").write_bytes(SCRIPT)
    (directory / "assets" / "main-x.js.gz").write_bytes(gzip.compress(SCRIPT))
    (directory / "assets" / "notes.txt").write_text("no part of it")
    monkeypatch.setattr(dashboard, "DIRECTORY", directory)
    return directory


def test_the_page_runs_only_scripts_of_this_host_no_inline_style_and_in_nobodys_frame(
    on_host: Callable[[Check], None], parts: Path
) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        assert (await browser.open("/")).headers["location"] == "/login"
        await browser.log_in(host.admin_token)
        page = await browser.open("/")
        assert "<title>built" in page.text
        policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in page.headers["content-security-policy"]
        assert page.headers["cache-control"] == "no-store"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "same-origin"

    on_host(check)


def test_its_parts_are_kept_for_good_and_compressed_for_who_takes_that(
    on_host: Callable[[Check], None], parts: Path
) -> None:
    async def check(host: HostUnderTest) -> None:
        for taken in ("gzip, br", "identity"):
            answer = await host.nobody.get("/assets/main-x.js", headers={"Accept-Encoding": taken})
            assert answer.content == SCRIPT
            assert answer.headers.get("content-encoding") == ("gzip" if "gzip" in taken else None)
            assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
            assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert answer.headers["vary"] == "Accept-Encoding"
            assert answer.headers["x-content-type-options"] == "nosniff"

    on_host(check)


@pytest.mark.parametrize(
    "name", ["none.js", "notes.txt", "main-x.js.gz", "..%2findex.html", "%2e%2e%2f%2e%2e%2fhost.db"]
)
def test_nothing_else_is_served_beside_them(on_host: Callable[[Check], None], parts: Path, name: str) -> None:
    async def check(host: HostUnderTest) -> None:
        answer = await host.nobody.get(f"/assets/{name}")
        assert answer.status_code == 404
        assert answer.headers["cache-control"] == "no-store"

    on_host(check)


def test_without_it_and_for_browsers_without_scripts_there_is_a_page_that_needs_none(
    on_host: Callable[[Check], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        assert (await browser.open("/plain")).headers["location"] == "/login?next=%2Fplain"
        await browser.log_in(host.admin_token)
        for path in ("/", "/plain"):
            page = await browser.open(path)
            assert "Logged in as <strong>admin" in page.text
            assert "<script" not in page.text

    monkeypatch.setattr(dashboard, "DIRECTORY", tmp_path / "none")
    on_host(check)


# -- what npm has built ----------------------------------------------------------------------------------------------


@pytest.fixture
def built() -> Path:
    """Where it is."""
    if not (dashboard.DIRECTORY / "index.html").exists():
        ci = os.environ.get("CI", "") not in ("", "0", "false")
        (pytest.fail if ci else pytest.skip)("the dashboard was not built: make install, with npm")
    return dashboard.DIRECTORY


def _needed_at_first(directory: Path) -> set[str]:
    """What the first page makes a browser load, by its path: what the page names, and what that imports at once."""
    page = (directory / "index.html").read_text()
    wanted, found = set(re.findall(r'(?:src|href)="/(assets/[^"]+)"', page)), {"index.html"}
    while wanted - found:
        name = (wanted - found).pop()
        found.add(name)
        if name.endswith(".js"):
            text = (directory / name).read_text()
            wanted |= {f"assets/{other}" for other in re.findall(r'(?:from|import)\s*"\./([^"]+)"', text)}
    return found


def test_the_first_load_is_less_than_300_kb_and_has_neither_terminal_nor_plot(built: Path) -> None:
    first = _needed_at_first(built)
    size = sum((built / f"{name}.gz").stat().st_size for name in first)
    assert 10_000 < size < MOST_AT_FIRST
    text = "".join((built / name).read_text() for name in first)
    assert "xterm-helper" not in text
    assert "u-legend" not in text
    everything = "".join(path.read_text() for path in built.rglob("*.js"))
    assert "xterm-helper" in everything


def test_it_loads_nothing_from_elsewhere_and_has_nothing_inline(built: Path) -> None:
    page = (built / "index.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert "<style" not in page
    assert re.findall(r"<script(?![^>]* src=\"/assets/)", page) == []
    assert " style=" not in page
    for path in built.rglob("*.css"):
        assert "url(" not in path.read_text()
    names = [path.name for path in (built / "assets").iterdir()]
    assert all(re.search(r"-[\w-]{8}\.(js|css|svg)(\.gz)?$", name) for name in names), names


def test_all_that_it_is_built_of_is_locked_by_hash() -> None:
    lock = json.loads((ROOT / "src/kohakuriver-web/package-lock.json").read_text())
    packages = {name: about for name, about in lock["packages"].items() if name}
    assert len(packages) > 10
    for name, about in packages.items():
        assert about["integrity"].startswith("sha512-"), name


@pytest.mark.parametrize(
    ("programs", "reason"),
    [
        ({}, "npm was not found"),
        ({"npm": "exit 1", "node": "echo v18.19.0"}, "it takes Node.js 20.19 or newer, and this is v18.19.0"),
    ],
)
def test_an_installation_without_npm_succeeds_and_says_what_is_missing(
    tmp_path: Path, programs: dict[str, str], reason: str
) -> None:
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    argv = [sys.executable, "setup.py", "-q", "build_dashboard"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KOHAKURIVER_")}
    done = subprocess.run(
        argv, cwd=ROOT, env={**environment, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"installing without the dashboard ({reason}): a host shows browsers a plain page." in done.stderr
