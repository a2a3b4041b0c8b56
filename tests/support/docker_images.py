"""Images made here, of nothing but static binaries: `docker import` of a tar, no registry."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.support.hops import binary

PREFIX = "kohakuriver-test"


def docker(*arguments: str, content: bytes | None = None) -> str:
    """What `docker ARGUMENTS` prints."""
    done = subprocess.run(["docker", *arguments], input=content, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def require_engine() -> None:
    """Skip where there is no Docker engine; in CI there must be one."""
    if os.environ.get("CI") == "true":
        return
    if shutil.which("docker") is None or subprocess.run(["docker", "version"], capture_output=True).returncode:
        pytest.skip("no Docker engine answers")


def make_image(name: str, files: dict[str, bytes], *changes: str) -> str:
    """An image of these executables and nothing else; one that is there already is used again."""
    digest = hashlib.sha256(repr((sorted(files.items()), changes)).encode()).hexdigest()[:12]
    image = f"{PREFIX}-{name}:{digest}"
    if not subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode:
        return image
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    options = [part for change in changes for part in ("--change", change)]
    docker("import", *options, "-", image, content=out.getvalue())
    return image


def built(image: str, *lines: str) -> str:
    """An image made of another by the `lines` of a Dockerfile, which may say more than an import; its id."""
    recipe = "\n".join([f"FROM {image}", *lines]).encode()
    # The builder that needs no plugin.
    env = {**os.environ, "DOCKER_BUILDKIT": "0"}
    done = subprocess.run(["docker", "build", "-q", "-"], input=recipe, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def busybox_image() -> str:
    """busybox, with `sh` among its names."""
    return make_image("busybox", busybox_files())


def busybox_files() -> dict[str, bytes]:
    """What it is made of."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    return {"bin/busybox": busybox, "bin/sh": busybox}


def single_binary_image() -> str:
    """One static binary: no shell, no libc, no /etc."""
    return make_image("single", {"only": binary().read_bytes()})


def unprivileged_image() -> str:
    """busybox, run by a user without a name."""
    return make_image("unprivileged", busybox_files(), "USER 12345:12345")


def debian_image(directory: Path) -> str:
    """A minimal Debian tree: of this machine's packages, or made by debootstrap where it is no Debian.

    Skips where none can be made, but not in CI.
    """
    image = f"{PREFIX}-debian:minbase"
    if not subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode:
        return image
    if shutil.which("dpkg-query"):
        whence, names = Path("/"), _essential_files()
    else:
        whence, names = _made_tree(directory / "debian"), ["."]
    recursion = "--recursion" if names == ["."] else "--no-recursion"  # which holds for what comes after it
    pack = ["tar", "-C", str(whence), recursion, "--ignore-failed-read", "--null", "-c", "-T", "-"]
    packed = subprocess.run(pack, input="\0".join(names).encode(), capture_output=True, check=True).stdout
    docker("import", "-", image, content=packed)
    return image


def _essential_files() -> list[str]:
    """What belongs to the packages that every Debian has, and to what those need; names relative to /."""

    def ask(*arguments: str) -> str:
        return subprocess.run(["dpkg-query", *arguments], capture_output=True, check=True).stdout.decode()

    form = r"${Package}\t${Essential}\t${db:Status-Status}\t${Pre-Depends}, ${Depends}\n"
    rows = [line.split("\t") for line in ask("-W", "-f", form).splitlines()]
    needs = {
        row[0]: re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9+.-]+)", row[3]) for row in rows if row[2] == "installed"
    }
    left, wanted = [row[0] for row in rows if row[1] == "yes"], set()
    while left:
        name = left.pop()
        if name in needs and name not in wanted:
            wanted.add(name)
            left += needs[name]
    unread = ("/usr/share/doc", "/usr/share/locale", "/usr/share/man")
    listed = {Path(path) for path in ask("-L", *wanted).splitlines() if path[:1] == "/" and not path.startswith(unread)}
    # Where they really are: a directory is a link to another by now, as /bin is.
    found = {path.parent.resolve() / path.name for path in listed if path.name and os.path.lexists(path)}
    return sorted(str(path.relative_to("/")) for path in found)


def _made_tree(tree: Path) -> Path:
    if os.environ.get("CI") != "true" and (shutil.which("debootstrap") is None or os.geteuid() != 0):
        pytest.skip("a Debian tree is made by debootstrap, as root")
    made = subprocess.run(["debootstrap", "--variant=minbase", "stable", str(tree)], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return tree
