"""sbom_web.py DIRECTORY OUTPUT: write the bill of materials of the dashboard, by package-lock.json, as CycloneDX."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

BELOW = "node_modules/"


def component(name: str, about: dict[str, Any], kind: ComponentType) -> Component:
    """One package as CycloneDX describes it."""
    space, _, short = name.rpartition("/")
    version = about.get("version", "")
    url = PackageURL(type="npm", namespace=space or None, name=short, version=version or None)
    sha512 = base64.b64decode(about.get("integrity", "").removeprefix("sha512-")).hex()
    return Component(
        name=name,
        version=version,
        type=kind,
        bom_ref=str(url),
        purl=url,
        hashes=[HashType(alg=HashAlgorithm.SHA_512, content=sha512)] if sha512 else [],
        licenses=[LicenseExpression(about["license"])] if "license" in about else [],
    )


def main() -> None:
    directory, output = map(Path, sys.argv[1:])
    lock: dict[str, Any] = json.loads((directory / "package-lock.json").read_text("utf-8"))
    packages = lock["packages"]
    parts = {
        path.rpartition(BELOW)[2]: component(path.rpartition(BELOW)[2], about, ComponentType.LIBRARY)
        for path, about in packages.items()
        if path and not about.get("dev")  # what only builds and tests need is not in what is built
    }
    root = component(lock["name"], packages[""], ComponentType.APPLICATION)
    bom = Bom(components=parts.values())
    bom.metadata.component = root
    bom.register_dependency(root, [parts[name] for name in packages[""]["dependencies"]])
    for name, part in parts.items():
        needed = packages[BELOW + name].get("dependencies", {})
        bom.register_dependency(part, [parts[other] for other in needed])
    output.write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
