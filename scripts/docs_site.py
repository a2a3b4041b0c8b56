"""What the documentation's site is made of beside docs/: README and changelog as pages, and links that lead out of it.

The pages are written to be read where the source is; a hook of MkDocs (mkdocs.yml) fits them to the site.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]

PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that stand outside of docs/, and where."""

_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def slug(text: str, separator: str) -> str:
    """A heading's anchor as the links in docs/ name it: as on the site that the source is on."""
    kept = "".join(each for each in unicodedata.normalize("NFC", text).lower() if each.isalnum() or each in " -_")
    return kept.strip().replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    from mkdocs.structure.files import File

    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A page's text, with links as the site has them."""
    return fitted(markdown, page.file.src_uri)


def fitted(markdown: str, uri: str) -> str:
    """The text of the page `uri`, whose links lead to pages of the site. What is only in the source is named."""
    place = Path(PAGES[uri]).parent if uri in PAGES else (Path("docs") / uri).parent
    pages = {source: name for name, source in PAGES.items()}

    def moved(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return found[0]
        there = _plain(place / path)
        to = pages.get(there) or (there.removeprefix("docs/") if there.startswith("docs/") else None)
        if to is None:
            return text
        here = Path(uri).parent
        return f"[{text}]({'../' * len(here.parts)}{to}{hash_}{anchor})"

    return _LINK.sub(moved, markdown)


def _plain(path: Path) -> str:
    """A path without `..`, as text."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)
