"""The two compiled parts of KohakuRiver: the C hot path (Cython) and the tunnel client (Rust).

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from Cython.Build import cythonize
from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
CRATE = ROOT / "kohakuriver-tunnel"
BINARY = Path("kohakuriver", "bin", "tunnel-client")

WITHOUT_CLIENT = (
    "kohakuriver: installing without the tunnel client ({reason}): process tasks will use the slower Python client, "
    "and Docker tasks will not be possible on this machine."
)


def why_no_cargo_build() -> str | None:
    """The reason not to build the tunnel client here, or None when it is to be built."""
    if os.environ.get("KOHAKURIVER_SKIP_CARGO", "0") not in ("", "0"):
        return "KOHAKURIVER_SKIP_CARGO is set"
    if sys.platform != "linux":
        return "it runs in Linux containers and is built on Linux only"
    if shutil.which("cargo") is None:
        return "cargo was not found"
    return None


def cargo_build() -> Path:
    """Build the crate's release binary; return where cargo put it. Raises ExecError when cargo fails."""
    argv = ["cargo", "build", "--release", "--locked", "--bin", "tunnel-client"]
    result = subprocess.run(
        [*argv, "--message-format=json-render-diagnostics"], cwd=CRATE, stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        raise ExecError(
            f"`{' '.join(argv)}` failed in {CRATE.name}/; set KOHAKURIVER_SKIP_CARGO=1 to install without it"
        )
    # Asking cargo is the only way to know: build.target and CARGO_TARGET_DIR both move the result.
    for line in result.stdout.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message.get("executable"):
            return Path(message["executable"])
    raise ExecError("cargo built no tunnel-client")


class BuildTunnelClient(Command):
    """`cargo build --release` of the tunnel client, put into the package as kohakuriver/bin/tunnel-client."""

    description = "build the tunnel client (Rust) into the package"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("inplace", "i", "put the binary into the source tree"),
    ]
    boolean_options: ClassVar[list[str]] = ["inplace"]

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        reason = why_no_cargo_build()
        if reason:
            print(WITHOUT_CLIENT.format(reason=reason), file=sys.stderr, flush=True)
            return
        target = self._target()
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file under a new name, then a rename: tasks that still run the old binary keep it.
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(cargo_build(), fresh)
        fresh.chmod(0o755)
        fresh.replace(target)

    def _target(self) -> Path:
        if self.inplace or self.editable_mode:
            return ROOT / BINARY
        assert self.build_lib is not None
        return Path(self.build_lib) / BINARY

    def get_source_files(self) -> list[str]:
        wanted = ("Cargo.toml", "Cargo.lock", ".cargo/*", "src/**/*.rs", "build.rs")
        return [str(path.relative_to(ROOT)) for pattern in wanted for path in CRATE.glob(pattern)]

    def get_outputs(self) -> list[str]:
        return [] if why_no_cargo_build() else [str(self._target())]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_tunnel_client", None)]


extension = Extension(
    "kohakuriver._frame",
    ["kohakuriver/_frame.pyx"],
    extra_compile_args=["/O2"] if sys.platform == "win32" else ["-O3"],
)

setup(
    cmdclass={"build": Build, "build_tunnel_client": BuildTunnelClient},
    ext_modules=cythonize([extension], language_level=3),  # type: ignore[no-untyped-call]
)
