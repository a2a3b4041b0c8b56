"""The pages of the documentation as the site has them: every link leads to a page of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts/docs_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[SSH](docs/guide/ssh.md)", "[SSH](guide/ssh.md)"),
        ("guide/ssh.md", "[x](../security.md#a)", "[x](../security.md#a)"),
        ("guide/ssh.md", "[x](limits.md)", "[x](../guide/limits.md)"),
        ("protocol.md", "[`tests/vectors/`](../tests/vectors/)", "`tests/vectors/`"),
        (
            "cli.md",
            "[here](#settings) [there](https://example.org/a)",
            "[here](#settings) [there](https://example.org/a)",
        ),
        ("changelog.md", "[a](README.md)", "[a](index.md)"),
    ],
)
def test_a_link_leads_to_the_sites_own_page_or_is_plain_text(
    site: ModuleType, page: str, text: str, expected: str
) -> None:
    assert site.fitted(text, page) == expected


def test_anchors_are_those_that_the_pages_link_to(site: ModuleType) -> None:
    assert site.slug("`kohakuriver forward [TASK] [REMOTE_PORT...] [-- CMD...]`", "-") == (
        "kohakuriver-forward-task-remote_port----cmd"
    )
    assert site.slug("What isn't there yet", "-") == "what-isnt-there-yet"


def test_every_page_of_the_documentation_is_in_the_sites_contents() -> None:
    named = (ROOT / "mkdocs.yml").read_text("utf-8")
    missing = [page.name for page in (ROOT / "docs").rglob("*.md") if str(page.relative_to(ROOT / "docs")) not in named]
    assert missing == []
