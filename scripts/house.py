"""Count what keeps the house in order: `python scripts/house.py [--verbose]`. Exits 1 when a bound is broken.

It reads the source as text and runs none of it. The bounds are those of CONTRIBUTING.md, "What we ask of a change":
no import circles (an import under TYPE_CHECKING counts), no class over 25 methods or 300 lines unless its docstring
says "Large because", short functions, no six lines of code that stand twice in the product, and unit tests named
after their module, or with a docstring that says what they promise.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
CRATES = ("kohakuriver-tunnel", "kohakuriver-sshd")

MOST_METHODS, MOST_LINES, RUN = 25, 300, 6
# Lines of a function: at most this at the median, and at the 90th percentile.
LENGTHS = {"Python": (6, 16), "Rust": (8, 25)}
REASON = "Large because"


class Count(NamedTuple):
    """One row of the table: what is counted, what was found, and whether that is within the bound."""

    name: str
    found: str
    good: bool
    where: list[str]


def python_files() -> list[Path]:
    return sorted((SOURCE / "kohakuriver").rglob("*.py"))


def rust_files() -> list[Path]:
    return sorted(path for crate in CRATES for path in (SOURCE / crate / "src").rglob("*.rs"))


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Modules of ours that `tree` imports when it is imported, or for its type checker; not those inside functions."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in inner)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other: strongly connected components of more than one node."""
    reached = {name: _reach(graph, name) for name in graph}
    found = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return [list(group) for group in sorted(found) if len(group) > 1]


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = list(graph[start])
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending.extend(graph.get(name, ()))
    return seen


def python_circles(trees: dict[Path, ast.Module]) -> list[list[str]]:
    modules = {module_of(path) for path in trees}
    graph = {module_of(path): set(imports(tree, modules)) - {module_of(path)} for path, tree in trees.items()}
    return circles(graph)


def rust_circles() -> list[list[str]]:
    found = []
    for crate in CRATES:
        base = SOURCE / crate / "src"
        files = {_rust_module(path, base): path for path in sorted(base.rglob("*.rs"))}
        graph = {name: set(_uses(path, files)) - {name} for name, path in files.items()}
        found += [[f"{crate}::{name}" for name in group] for group in circles(graph)]
    return found


def _rust_module(path: Path, base: Path) -> str:
    parts = list(path.relative_to(base).with_suffix("").parts)
    return "::".join(parts[:-1] if parts[-1] == "mod" and len(parts) > 1 else parts)


def _uses(path: Path, files: dict[str, Path]) -> Iterator[str]:
    text = re.sub(r"//.*", "", _without_tests(path.read_text("utf-8")))  # a link in a comment is no import
    for match in re.finditer(r"\bcrate::((?:\w+::)*\w+|\{[^;]*\})", text):
        names = re.findall(r"(?:^|[{,])\s*([\w:]+)", match[1]) if match[1].startswith("{") else [match[1]]
        for name in names:
            parts = name.strip(":").split("::")
            yield from (
                module for cut in range(len(parts), 0, -1) if (module := "::".join(parts[:cut])) in files and module
            )


def _without_tests(text: str) -> str:
    return re.split(r"^#\[cfg\(test\)\]\nmod ", text, maxsplit=1, flags=re.MULTILINE)[0]


def large_classes(trees: dict[Path, ast.Module]) -> tuple[int, list[str]]:
    """How many classes there are, and those over a bound with no reason given."""
    total, found = 0, []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                total += 1
                methods = sum(isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) for child in node.body)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                over = methods > MOST_METHODS or lines > MOST_LINES
                if over and REASON not in (ast.get_docstring(node) or ""):
                    found.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {methods} methods, {lines} lines"
                    )
    return total, found


def python_lengths(trees: dict[Path, ast.Module]) -> list[tuple[int, str]]:
    """The length of each function, in lines of its body without its docstring, and where it is."""
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 1
                found.append((lines, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return found


def rust_lengths() -> list[tuple[int, str]]:
    """The same for Rust: `fn` to the brace at its own indentation, as rustfmt lays it out."""
    found = []
    for path in rust_files():
        lines = _without_tests(path.read_text("utf-8")).splitlines()
        for start, line in enumerate(lines):
            match = re.match(r"(\s*)(?:pub(?:\([^)]*\))? )?(?:const )?(?:async )?(?:unsafe )?fn (\w+)", line)
            if match:
                opening = next(
                    (at for at in range(start, len(lines)) if lines[at].rstrip().endswith(("{", ";", "}"))), start
                )
                end = start
                if lines[opening].rstrip().endswith("{"):
                    end = next((at for at in range(opening, len(lines)) if lines[at] == f"{match[1]}}}"), opening)
                found.append((max(1, end - opening - 1), f"{path.relative_to(ROOT)}:{start + 1} {match[2]}"))
    return found


def repeated(paths: list[Path], comment: str) -> list[str]:
    """Places whose next RUN lines of code stand elsewhere too; imports, comments and blank lines do not count."""
    seen: dict[tuple[str, ...], str] = {}
    found: list[str] = []
    for path in paths:
        code = _code(path, comment)
        skip = 0
        for at in range(len(code) - RUN + 1):
            window = tuple(text for _, text in code[at : at + RUN])
            place = f"{path.relative_to(ROOT)}:{code[at][0]}"
            first = seen.setdefault(window, place)
            if first != place and at >= skip and sum(map(len, window)) > 20 * RUN:
                found.append(f"{place} as {first}")
                skip = at + RUN
    return found


def _code(path: Path, comment: str) -> list[tuple[int, str]]:
    text = _without_tests(path.read_text("utf-8"))
    skip = (comment, "import ", "from ", "use ", "mod ", "pub mod ", '"""')
    lines = enumerate((line.strip() for line in text.splitlines()), 1)
    return [(number, line) for number, line in lines if line and not line.startswith(skip)]


def unnamed_tests(trees: dict[Path, ast.Module]) -> list[str]:
    """Unit tests that are neither named after a module nor say in a docstring what they promise."""
    names = defaultdict(list)
    for path in [*trees, *(SOURCE / "kohakuriver").glob("*.pyx")]:
        parts = module_of(path).split(".")[1:]
        for cut in range(len(parts)):
            names["_".join(parts[cut:]).strip("_")].append(path)
    unnamed = []
    for test in sorted((ROOT / "tests/unit").glob("test_*.py")):
        named = test.stem.removeprefix("test_") in names
        if not named and not ast.get_docstring(ast.parse(test.read_text("utf-8"))):
            unnamed.append(str(test.relative_to(ROOT)))
    return unnamed


def length_count(language: str, lengths: list[tuple[int, str]]) -> Count:
    values = sorted(length for length, _ in lengths)
    median, p90 = statistics.median(values), values[int(len(values) * 0.9)]
    longest = [f"{lines} {place}" for lines, place in sorted(lengths, reverse=True)[:10]]
    most_median, most_p90 = LENGTHS[language]
    found = f"{len(values)}, median {median:.0f}, p90 {p90}, longest {values[-1]}"
    return Count(f"functions in {language}, lines", found, median <= most_median and p90 <= most_p90, longest)


def counts() -> list[Count]:
    trees = {path: ast.parse(path.read_text("utf-8")) for path in python_files()}
    rings = [" ⇄ ".join(group) for group in python_circles(trees) + rust_circles()]
    classes, large = large_classes(trees)
    twice = repeated(python_files(), "#") + repeated(rust_files(), "//")
    unnamed = unnamed_tests(trees)
    return [
        Count("import circles", str(len(rings)), not rings, rings),
        Count("classes too large, no reason given", f"{len(large)} of {classes}", not large, large),
        length_count("Python", python_lengths(trees)),
        length_count("Rust", rust_lengths()),
        Count(f"runs of {RUN} lines that stand twice", str(len(twice)), not twice, twice),
        Count("unit tests with neither module nor promise", str(len(unnamed)), not unnamed, unnamed),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="show the longest functions too")
    verbose = parser.parse_args().verbose
    table = counts()
    for count in table:
        print(f"{'ok ' if count.good else 'BAD'}  {count.name}: {count.found}")
        for place in count.where if verbose or not count.good else ():
            print(f"       {place}")
    return 0 if all(count.good for count in table) else 1


if __name__ == "__main__":
    sys.exit(main())
