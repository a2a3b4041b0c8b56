"""sbom_crate.py CRATE OUTPUT: write the bill of materials of a crate's binary, as Cargo.lock has it, as CycloneDX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

TARGET = "x86_64-unknown-linux-gnu"


def metadata(crate: Path) -> dict[str, Any]:
    """What cargo knows of the crate and all that it is built of."""
    argv = ["cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={TARGET}"]
    found: dict[str, Any] = json.loads(subprocess.run(argv, cwd=crate, check=True, capture_output=True).stdout)
    return found


def needed(resolved: dict[str, Any]) -> dict[str, list[str]]:
    """What each package of the binary depends on; what only tests and benchmarks need is left out."""
    nodes = {node["id"]: node for node in resolved["nodes"]}
    waiting, found = [resolved["root"]], {}
    while waiting:
        this = waiting.pop()
        if this not in found:
            kinds = [(other["pkg"], {kind["kind"] for kind in other["dep_kinds"]}) for other in nodes[this]["deps"]]
            found[this] = [other for other, kind in kinds if kind != {"dev"}]
            waiting += found[this]
    return found


def component(package: dict[str, Any], kind: ComponentType) -> Component:
    """One package as CycloneDX describes it."""
    url = PackageURL(type="cargo", name=package["name"], version=package["version"])
    licence = (package["license"] or "").replace("/", " OR ")
    return Component(
        name=package["name"],
        version=package["version"],
        type=kind,
        bom_ref=str(url),
        purl=url,
        licenses=[LicenseExpression(licence)] if licence else [],
    )


def main() -> None:
    crate, output = map(Path, sys.argv[1:])
    found = metadata(crate)
    edges = needed(found["resolve"])
    root = found["resolve"]["root"]
    kinds = {root: ComponentType.APPLICATION}
    parts = {
        package["id"]: component(package, kinds.get(package["id"], ComponentType.LIBRARY))
        for package in found["packages"]
        if package["id"] in edges
    }
    bom = Bom(components=[part for name, part in parts.items() if name != root])
    bom.metadata.component = parts[root]
    for name, others in edges.items():
        bom.register_dependency(parts[name], [parts[other] for other in others])
    output.write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
