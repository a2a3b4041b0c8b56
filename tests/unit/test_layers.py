"""The layers of docs/architecture.md, enforced: a module imports only what its layer may know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src/kohakuriver"

BASE = {
    "asking",
    "backends",
    "binaries",
    "changes",
    "errors",
    "fair_turns",
    "config",
    "descriptors",
    "http_proxy",
    "images",
    "limits",
    "mount_roots",
    "no_connection",
    "otel",
    "proxies",
    "gpus",
    "host_keys",
    "quotas",
    "rates",
    "resolve",
    "runtime",
    "spared",
    "task",
    "text",
    "tls",
    "tracing",
    "unix_sockets",
}
PROTOCOL = BASE | {"_files", "_frame", "tunnel"}

# What each layer may import of our own, beside itself. `__init__` stands for the package's own names.
ALLOWED: dict[str, set[str]] = {
    "_files": set(),
    "_frame": set(),
    "asking": set(),
    "backends": set(),
    "binaries": set(),
    "changes": set(),
    "errors": {"text"},
    "fair_turns": set(),
    "config": {"errors", "resolve"},
    "descriptors": set(),
    "http_proxy": {"errors", "resolve", "tls"},
    "gpus": {"errors"},
    "host_keys": {"config"},
    "images": set(),
    "limits": {"errors"},
    "mount_roots": {"errors"},
    "no_connection": {"errors", "runtime", "tls"},
    "otel": {"errors", "__init__"},
    "proxies": {"errors"},
    "quotas": {"errors", "limits"},
    "rates": set(),
    "resolve": set(),
    "runtime": {"errors", "resolve"},
    "spared": set(),
    "task": {"backends", "gpus", "images", "quotas", "text"},
    "text": set(),
    "tls": {"errors"},
    "tracing": {"errors", "otel"},
    "unix_sockets": {"errors"},
    "tunnel": PROTOCOL,
    "session": PROTOCOL,
    "store": BASE,
    "web": PROTOCOL | {"session", "__init__"},
    "relay": PROTOCOL | {"session"},
    "ssh_proxy": PROTOCOL | {"session", "web"},
    "host": PROTOCOL | {"session", "relay", "store", "web", "ssh_proxy", "gateway", "__init__"},
    "runner": PROTOCOL | {"session", "relay", "web", "__init__"},
    "gateway": PROTOCOL,
    "client": PROTOCOL | {"gateway", "__init__"},
    "cli": PROTOCOL | {"session", "client", "__init__"},
    "__init__": {"errors", "client"},
    "__main__": {"cli", "descriptors", "spared"},
}

# `cli` starts the programs, so the functions of its commands, and only they, may import these two packages' own names.
STARTED_BY_CLI = {"kohakuriver.host", "kohakuriver.runner"}

# Packages that only the named layers may import: what keeps the command line light and the protocol free of policy.
ONLY_IN = {
    "aiodocker": {"runner"},
    "authlib": {"host"},
    "alembic": {"store"},
    "asyncssh": {"ssh_proxy"},
    "cryptography": {"cli", "host_keys", "runner", "tls"},
    "httptools": {"gateway"},
    "prometheus_client": {"web", "host", "runner"},
    "joserfc": {"host"},
    "fastapi": {"web", "host", "runner"},
    "sqlalchemy": {"store"},
    "starlette": {"web", "host", "runner"},
    "typer": {"cli"},
    "psycopg": {"store"},
    "rich": {"cli"},
    "uvicorn": {"web", "host", "runner", "tunnel"},
    "httpx": {"client", "web", "host", "runner", "cli"},
    "websockets": {"tunnel"},
}

IN_C = {"_files", "_frame"}
FORBIDDEN_IN_C = {"asyncio", "socket", "selectors", "ssl", "select"}


def layer_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) < 2:
        return "__init__"
    return "_frame" if parts[1].startswith("_frame_") else parts[1]  # what _frame.pyx includes


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or any(path.with_suffix(suffix).exists() for suffix in (".py", ".pyx"))


def python_imports(source: str) -> Iterator[tuple[str, bool, int]]:
    """(dotted module, whether inside a function, line) of every import, under TYPE_CHECKING too."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, lazy = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which layer is meant"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if is_module(inner) else node.module), lazy, node.lineno
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        pending.extend((child, lazy) for child in ast.iter_child_nodes(node))


def cython_imports(source: str) -> Iterator[tuple[str, bool, int]]:
    for number, line in enumerate(source.splitlines(), 1):
        match = re.match(r"\s*(?:from\s+([\w.]+)\s+c?import|c?import\s+([\w.]+))", line)
        if match:
            yield match[1] or match[2], False, number


def violations(module: str, source: str, *, cython: bool = False) -> list[str]:
    layer, found = layer_of(module), []
    for name, lazy, line in (cython_imports if cython else python_imports)(source):
        top = name.split(".")[0]
        if top == "kohakuriver":
            target = layer_of(name)
            started = layer == "cli" and lazy and name in STARTED_BY_CLI
            if target not in ALLOWED[layer] | {layer} and not started:
                found.append(f"{module}:{line} imports {name}")
        elif (top in ONLY_IN and layer not in ONLY_IN[top]) or (layer in IN_C and top in FORBIDDEN_IN_C):
            found.append(f"{module}:{line} imports {name}")
    return found


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyx"), *PACKAGE.rglob("*.pxi")])


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer_of(module_name(path)) for path in sources()} <= set(ALLOWED)


def test_every_module_imports_only_what_its_layer_may_know() -> None:
    found = [
        line
        for path in sources()
        for line in violations(module_name(path), path.read_text("utf-8"), cython=path.suffix in (".pyx", ".pxi"))
    ]
    assert found == []


def test_only_the_protocol_module_packs_and_unpacks_headers() -> None:
    header = re.compile(r"\b(?:un)?pack_header\b")
    users = {module_name(path) for path in sources() if header.search(path.read_text("utf-8"))}
    assert users <= {"kohakuriver._frame_build", "kohakuriver.tunnel.protocol"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kohakuriver.host.app", "from kohakuriver.runner import app"),
        ("kohakuriver.runner.app", "import kohakuriver.cli.main"),
        ("kohakuriver.tunnel.link", "from kohakuriver.store.models import Task"),
        ("kohakuriver.tunnel.link", "def f():\n    import fastapi"),
        ("kohakuriver.errors", "from kohakuriver import config"),
        ("kohakuriver.cli.main", "from kohakuriver.host import serve"),
        ("kohakuriver.cli.main", "def f():\n    from kohakuriver.host import app"),
        ("kohakuriver.cli.main", "if TYPE_CHECKING:\n    import sqlalchemy"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_a_command_may_start_the_host_and_the_runner() -> None:
    source = (
        "def host():\n    from kohakuriver.host import serve\n\ndef runner():\n    from kohakuriver.runner import serve"
    )
    assert violations("kohakuriver.cli.main", source) == []
