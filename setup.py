"""The built parts of KohakuRiver: the C hot path (Cython), tunnel client and SSH server (Rust), dashboard (TypeScript).

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from Cython.Build import cythonize
from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "src"
BIN = Path("kohakuriver", "bin")
DASHBOARD = Path("kohakuriver", "dashboard")


class Program(NamedTuple):
    """A static binary that is put into tasks: its name, its crate, and what is missed without it."""

    name: str
    crate: str
    without: str


PROGRAMS = (
    Program(
        "tunnel-client",
        "src/kohakuriver-tunnel",
        "process tasks will use the slower Python client, and Docker tasks will not be possible on this machine",
    ),
    Program(
        "tunnel-sshd",
        "src/kohakuriver-sshd",
        "--ssh will only be possible for Docker tasks whose image has an sshd",
    ),
)


def why_no_cargo_build() -> str | None:
    """The reason not to build the programs here, or None when they are to be built."""
    if os.environ.get("KOHAKURIVER_SKIP_CARGO", "0") not in ("", "0"):
        return "KOHAKURIVER_SKIP_CARGO is set"
    if sys.platform != "linux":
        return "they run in Linux containers and are built on Linux only"
    if shutil.which("cargo") is None:
        return "cargo was not found"
    return None


def cargo_build(program: Program) -> Path:
    """Build a program's release binary; return where cargo put it. Raises ExecError when cargo fails."""
    argv = ["cargo", "build", "--release", "--locked", "--bin", program.name]
    result = subprocess.run(
        [*argv, "--message-format=json-render-diagnostics"],
        cwd=ROOT / program.crate,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode:
        raise ExecError(
            f"`{' '.join(argv)}` failed in {program.crate}/; set KOHAKURIVER_SKIP_CARGO=1 to install without it"
        )
    # Asking cargo is the only way to know: build.target and CARGO_TARGET_DIR both move the result.
    for line in result.stdout.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message.get("executable"):
            return Path(message["executable"])
    raise ExecError(f"cargo built no {program.name}")


class BuildPrograms(Command):
    """`cargo build --release` of the programs, put into the package as kohakuriver/bin/…."""

    description = "build the programs for tasks (Rust) into the package"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("inplace", "i", "put the binaries into the source tree"),
        ("only=", None, "build just the program of this name"),
    ]
    boolean_options: ClassVar[list[str]] = ["inplace"]

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False
        self.only: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        reason = why_no_cargo_build()
        for program in self._programs():
            if reason:
                note = f"kohakuriver: installing without {program.name} ({reason}): {program.without}."
                print(note, file=sys.stderr, flush=True)
            else:
                self._build(program)

    def _programs(self) -> Iterator[Program]:
        return (program for program in PROGRAMS if self.only in (None, program.name))

    def _build(self, program: Program) -> None:
        target = self._target(program)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file under a new name, then a rename: tasks that still run the old binary keep it.
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(cargo_build(program), fresh)
        fresh.chmod(0o755)
        fresh.replace(target)

    def _target(self, program: Program) -> Path:
        if self.inplace or self.editable_mode:
            return SOURCE / BIN / program.name
        assert self.build_lib is not None
        return Path(self.build_lib) / BIN / program.name

    def get_source_files(self) -> list[str]:
        wanted = ("Cargo.toml", "Cargo.lock", ".cargo/*", "src/**/*.rs", "build.rs")
        crates = [ROOT / program.crate for program in PROGRAMS]
        return [str(path.relative_to(ROOT)) for crate in crates for pattern in wanted for path in crate.glob(pattern)]

    def get_outputs(self) -> list[str]:
        return [] if why_no_cargo_build() else [str(self._target(program)) for program in self._programs()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


WEB = "src/kohakuriver-web"
OLDEST_NODE = (20, 19)
"""Of Node.js, as package.json says it."""


def why_no_npm_build() -> str | None:
    """The reason not to build the dashboard here, or None when it is to be built."""
    if os.environ.get("KOHAKURIVER_SKIP_NPM", "0") not in ("", "0"):
        return "KOHAKURIVER_SKIP_NPM is set"
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        return "npm was not found"
    said = subprocess.run([node, "--version"], stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
    version = tuple(int(part) for part in said.lstrip("v").split(".")[:2] if part.isdigit())
    if version < OLDEST_NODE:
        return f"it takes Node.js {'.'.join(map(str, OLDEST_NODE))} or newer, and this is {said or 'none'}"
    return None


def npm(*args: str, **environment: str) -> None:
    """Run npm where the dashboard's source is. Raises ExecError when it fails."""
    program = shutil.which("npm")
    assert program is not None
    argv = [program, *args]
    result = subprocess.run(
        argv, cwd=ROOT / WEB, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=False
    )
    if result.returncode:
        raise ExecError(
            f"`npm {' '.join(args)}` failed in {WEB}/; set KOHAKURIVER_SKIP_NPM=1 to install without the dashboard"
        )


class BuildDashboard(Command):
    """`npm run build` of the dashboard, put into the package as kohakuriver/dashboard/."""

    description = "build the dashboard (TypeScript) into the package"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [("inplace", "i", "put it into the source tree")]
    boolean_options: ClassVar[list[str]] = ["inplace"]

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        if reason := why_no_npm_build():
            note = f"kohakuriver: installing without the dashboard ({reason}): a host shows browsers a plain page."
            print(note, file=sys.stderr, flush=True)
            return
        target = self._target()
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        npm("ci", "--no-audit", "--no-fund", "--ignore-scripts")
        npm("run", "build", KOHAKURIVER_DASHBOARD=str(fresh.resolve()))
        shutil.rmtree(target, ignore_errors=True)
        fresh.replace(target)

    def _target(self) -> Path:
        if self.inplace or self.editable_mode:
            return SOURCE / DASHBOARD
        assert self.build_lib is not None
        return Path(self.build_lib) / DASHBOARD

    def get_source_files(self) -> list[str]:
        wanted = ("package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", "index.html", "src/**/*.*")
        return [str(path.relative_to(ROOT)) for pattern in wanted for path in (ROOT / WEB).glob(pattern)]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._target().rglob("*") if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_programs", None), ("build_dashboard", None)]


extensions = [
    Extension(
        f"kohakuriver.{name}",
        [f"src/kohakuriver/{name}.pyx"],
        extra_compile_args=["/O2"] if sys.platform == "win32" else ["-O3"],
    )
    for name in ("_frame", "_files")
]

setup(
    cmdclass={"build": Build, "build_programs": BuildPrograms, "build_dashboard": BuildDashboard},
    ext_modules=cythonize(extensions, language_level=3),  # type: ignore[no-untyped-call]
)
