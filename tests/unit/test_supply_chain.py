"""What builds and publishes the package, and what it depends on: named exactly, with no right that it doesn't need."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

# The last version of each that has a published weakness, and what that is.
WEAK = {
    "aiohttp": ("3.14.2", "CVE-2026-69244"),
    "asyncssh": ("2.23.0", "CVE-2026-54590, CVE-2026-54591"),
    "cryptography": ("49.0.0", "CVE-2026-69247, CVE-2026-69248"),
    "h11": ("0.14.0", "CVE-2025-43859"),
    "httptools": ("0.6.1", "CVE-2024-27982"),
    "idna": ("3.14", "CVE-2026-45409"),
    "pygments": ("2.19.2", "CVE-2026-4539"),
    "pyjwt": ("2.12.1", "four advisories that 2.13.0 fixes"),
    "starlette": ("1.3.0", "CVE-2026-48710, CVE-2026-48818, CVE-2026-54282, CVE-2026-54283"),
    "websockets": ("9.0.2", "CVE-2021-33880"),
}


@pytest.mark.parametrize("package", sorted(WEAK))
def test_no_version_with_a_published_weakness_is_admitted(package: str) -> None:
    requirements = {found.name: found for found in map(Requirement, PROJECT["project"]["dependencies"])}
    weak, why = WEAK[package]
    assert not requirements[package].specifier.contains(weak), why


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_the_commit_that_was_looked_at(workflow: Path) -> None:
    for name in re.findall(r"uses: (.*)", workflow.read_text("utf-8")):
        assert name.startswith("./") or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", name), name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_no_job_has_more_rights_than_it_needs_and_no_suite_the_jobs_environment(workflow: Path) -> None:
    text = workflow.read_text("utf-8")
    head, jobs = text.split("\njobs:\n")
    assert head.split("permissions:\n")[1].split("\n\n")[0].strip() == "contents: read"
    assert "sudo -E" not in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    rights = {}
    for job in re.split(r"\n(?=  \w[\w-]*:\n)", jobs):
        granted = re.findall(r"^      ([\w-]+): write$", job, re.MULTILINE)
        if granted:
            rights[job.strip().partition(":")[0].split("\n")[-1].strip()] = set(granted)
            assert "run: make" not in job, "what has a right builds nothing"
    expected = {"attest": {"attestations", "id-token"}, "registry": {"id-token"}, "page": {"contents"}}
    assert rights == (expected if workflow.name == "release.yml" else {})


def locked(file: str) -> dict[str, str]:
    """What a lock holds, by name: the one version that is taken, as `==1.2`. Each has hashes."""
    found = {}
    for line in (ROOT / file).read_text("utf-8").replace("\\\n", "").splitlines():
        if line and not line.startswith("#"):
            pinned, *hashes = line.split("--hash=")
            assert hashes, line
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each.strip()) for each in hashes), line
            requirement = Requirement(pinned)
            found[requirement.name] = str(requirement.specifier)
    assert all(re.fullmatch(r"==[\w.]+", version) for version in found.values())
    return found


EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCKS = {
    "scripts/build-requirements.txt": (*PROJECT["build-system"]["requires"], *EXTRAS["build"]),
    "deploy/debian/requirements.txt": (
        *PROJECT["project"]["dependencies"],
        *EXTRAS["oidc"],
        *EXTRAS["otel"],
        *EXTRAS["postgresql"],
    ),
}


@pytest.mark.parametrize("lock", LOCKS)
def test_what_builds_wheels_and_what_the_debian_package_holds_is_locked_by_version_and_hash(lock: str) -> None:
    versions = locked(lock)
    for requirement in map(Requirement, LOCKS[lock]):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
            assert requirement.specifier.contains(versions[requirement.name].removeprefix("=="))
    for file in ("Makefile", "scripts/build-deb"):
        assert "--require-hashes" in (ROOT / file).read_text("utf-8")
    assert "--require-hashes" in PROJECT["tool"]["cibuildwheel"]["before-build"]
    assert PROJECT["tool"]["cibuildwheel"]["build-frontend"]["args"] == ["--no-isolation"]
