"""What the documentation says about the program is true: commands, options, links, code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from kohakuriver.cli.main import app
from kohakuriver.tunnel import settings
from kohakuriver.tunnel.user_endpoint import UserEndpoint

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]

# On every command that talks to the host, and described once for all of them.
COMMON = {"--help", "-h", "--host", "--token", "--ca-file", "--json"}

pages = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)


@lru_cache
def commands() -> dict[tuple[str, ...], Any]:
    """Every command that does something, by its words: `("vps", "create")`."""
    found: dict[tuple[str, ...], Any] = {}

    def walk(words: tuple[str, ...], command: Any) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk((*words, name), inner)
        elif not command.hidden:
            found[words] = command

    walk((), typer.main.get_command(app))
    return found


def options(command: Any) -> set[str]:
    """The options that `--help` shows; arguments don't begin with a dash, and some options are hidden on purpose."""
    return {
        name
        for param in command.params
        if not getattr(param, "hidden", False)
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("-")
    }


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> Iterator[str]:
    """Whole command lines from the page's shell blocks and unit files that run `kohakuriver`."""
    for block in blocks(page, "sh"):
        yield from (line for line in block.splitlines() if line.startswith("kohakuriver "))
    for block in blocks(page, "ini"):
        yield from re.findall(r"^ExecStart=\S*/(kohakuriver .*)$", block, re.MULTILINE)


def words_of(line: str) -> list[str]:
    """The line's words up to a comment, pipe or redirection, without the program's name."""
    words = []
    for word in shlex.split(line, comments=True)[1:]:
        if word in ("|", ">", "&", "&&"):
            break
        words.append(word)
    return words


def split_command(words: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The command that `words` begin with, and the rest. ValueError when there is no such command."""
    for length in (2, 1):
        if tuple(words[:length]) in commands():
            return tuple(words[:length]), words[length:]
    raise ValueError(f"there is no command {' '.join(words)!r}")


def sections() -> dict[tuple[str, ...], str]:
    """The sections of docs/cli.md, by the command that each is about."""
    found = {}
    text = (ROOT / "docs/cli.md").read_text("utf-8")
    for heading, body in re.findall(r"^### `kohakuriver ([^`]*)`\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL):
        found[split_command(heading.split())[0]] = body
    return found


def test_every_command_has_a_section_in_the_command_line_page() -> None:
    assert set(sections()) == set(commands())


def test_a_usage_line_is_written_as_in_the_command_line_page() -> None:
    text = (ROOT / "docs/cli.md").read_text("utf-8")
    for heading in re.findall(r"^### `kohakuriver ([^`]*)`$", text, re.MULTILINE):
        words, arguments = split_command(heading.split())
        command = commands()[words]
        context = command.make_context(words[-1], [], resilient_parsing=True)
        assert command.collect_usage_pieces(context) == [
            "[OPTIONS]",
            *re.findall(r"\[.*?\]+(?=\s|$)|\S+", " ".join(arguments)),
        ]


@pytest.mark.parametrize("words", sorted(commands()), ids=" ".join)
def test_a_command_is_documented_with_exactly_the_options_that_it_has(words: tuple[str, ...]) -> None:
    documented = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", " ".join(re.findall(r"`([^`]*)`", sections()[words]))))
    assert documented - COMMON - {"--"} == options(commands()[words]) - COMMON


@pages
def test_command_lines_in_code_blocks_are_understood_by_the_program(page: Path) -> None:
    for line in shell_lines(page):
        words, arguments = split_command(words_of(line))
        commands()[words].make_context(" ".join(words), arguments)


@pages
def test_commands_and_options_mentioned_in_the_text_exist(page: Path) -> None:
    for mention in re.findall(r"`kohakuriver ([^`]+)`", page.read_text("utf-8")):
        if mention.startswith("-"):
            continue
        words, rest = split_command([word for word in re.split(r"[\s…|]+", mention) if word])
        flags = {word for word in " ".join(rest).split(" -- ")[0].split() if word.startswith("--")} - {"--"}
        assert flags <= options(commands()[words]), mention


@pages
def test_python_examples_are_valid(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get where it is rendered."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_make_targets_in_the_documentation_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))
    mentioned = {name for page in PAGES for name in re.findall(r"`make ([a-z][a-z0-9-]*)", page.read_text("utf-8"))}
    mentioned |= {name for page in PAGES for block in blocks(page, "sh") for name in re.findall(r"^make (\S+)", block)}
    assert mentioned <= targets


def test_sources_cite_pages_and_sections_of_the_documentation_that_exist() -> None:
    for source in [*ROOT.glob("src/kohakuriver/**/*.py*"), *ROOT.glob("src/kohakuriver-tunnel/src/*.rs")]:
        if source.suffix in (".pyc", ".pyd"):
            continue
        for name, section in re.findall(r"(docs/[\w/-]+\.md)(?: §(\d+))?", source.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{source}: {name}"
            assert not section or f"\n## {section}. " in (ROOT / name).read_text("utf-8"), (
                f"{source}: {name} §{section}"
            )


def test_the_tuning_page_has_every_setting_with_its_default() -> None:
    rows = re.findall(
        r"^\| `KOHAKURIVER_(\w+)` \| `(\w+)` \| ([\d.]+) \|", (ROOT / "docs/guide/tuning.md").read_text("utf-8"), re.M
    )
    assert [name.lower() for name, _, _ in rows] == [name for _, name, _ in rows] == list(settings.NAMES)
    documented = {name: value for _, name, value in rows}
    by_default = settings.endpoint_config(lambda name: None)
    by_default.v1_linger = UserEndpoint.linger  # the page says what it is at the other end
    assert settings.endpoint_config(documented.__getitem__) == by_default


def test_no_file_speaks_of_a_machine_an_unfinished_thought_or_a_promise_that_no_test_keeps() -> None:
    forbidden = re.compile(r"/work/|/tmp/kr|\b[Ii]ssue #?\d|\b(?:TODO|FIXME|XXX)\b|[Bb]lazing|[Ss]eamless|cutting-edge")
    suffixes = {".md", ".py", ".pyx", ".pyi", ".pxd", ".pxi", ".rs", ".toml", ".yml", ".json", ".in", ""}
    for folder in (
        "src",
        "tests",
        "bench",
        "docs",
        "scripts",
        ".ci",
        ".github",
        ".",
    ):
        for path in (ROOT / folder).glob("*" if folder == "." else "**/*"):
            built = {"target", "bin", "results", "__pycache__", ".git", "node_modules", "dashboard"}.intersection(
                path.parts
            )
            if path.is_file() and path.suffix in suffixes and not built and path != Path(__file__):
                found = forbidden.search(path.read_text("utf-8", errors="replace"))
                assert found is None, f"{path}: {found[0]}"


def test_versions_agree() -> None:
    version = re.compile(r'^(?:__)?version(?:__)? = "([^"]+)"', re.MULTILINE)
    files = (
        "pyproject.toml",
        "src/kohakuriver/__init__.py",
        "src/kohakuriver-tunnel/Cargo.toml",
        "src/kohakuriver-sshd/Cargo.toml",
    )
    found = {version.findall((ROOT / name).read_text("utf-8"))[0] for name in files}
    assert len(found) == 1
