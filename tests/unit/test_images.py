"""kohakuriver.images: names of images by their grammar, and which registries they may come from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver.images import EVERY_REGISTRY, ImageName, Registries

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("debian", ImageName("docker.io", "debian")),
        ("debian:12", ImageName("docker.io", "debian", "12")),
        ("library/debian", ImageName("docker.io", "library/debian")),
        ("index.docker.io/library/debian", ImageName("docker.io", "library/debian")),
        ("ghcr.io/lab/torch:2.9-cuda", ImageName("ghcr.io", "lab/torch", "2.9-cuda")),
        ("GHCR.io/lab/torch", ImageName("ghcr.io", "lab/torch")),
        ("localhost/mine", ImageName("localhost", "mine")),
        ("registry:5000/a/b__c/d-e", ImageName("registry:5000", "a/b__c/d-e")),
        ("[::1]:5000/a", ImageName("[::1]:5000", "a")),
        (f"debian@{DIGEST}", ImageName("docker.io", "debian", None, DIGEST)),
        (f"debian:12@{DIGEST}", ImageName("docker.io", "debian", "12", DIGEST)),
        (DIGEST, ImageName(None, "", None, DIGEST)),
    ],
)
def test_a_name_is_taken_apart_as_engines_do(text: str, name: ImageName) -> None:
    assert ImageName.parse(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a//b",
        "../containers/web",
        "a/../b",
        "debian?fromSrc=http://10.0.0.1/",
        "debian#x",
        "debian%2f",
        "debian 12",
        "debian\n",
        "Debian",
        "-debian",
        "debian:",
        "debian:.x",
        "debian:" + "t" * 129,
        "debian@sha256:12",
        "http://registry/a",
        "user@registry/a",
        "registry:port/a",
        "registry:5000:1/a",
        "-.io/a",
        "a" * 256,
        "débian",
    ],
)
def test_what_no_engine_calls_an_image_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="is no name of an image"):
        ImageName.parse(text)


@given(st.text(max_size=60))
def test_a_name_never_carries_what_would_change_a_url(text: str) -> None:
    try:
        ImageName.parse(text)
    except ValueError:
        return
    assert not set(text) & set("?#%\\ \r\n\t\"'<>&")
    assert ".." not in text
    assert "//" not in text


@pytest.mark.parametrize(
    ("allowed", "registry", "verdict"),
    [
        (["docker.io"], "docker.io", True),
        (["index.docker.io"], "docker.io", True),
        (["docker.io"], "ghcr.io", False),
        (["ghcr.io"], "ghcr.io:444", False),
        (["GHCR.io"], "ghcr.io", True),
        (["localhost:5000"], "localhost:5000", True),
        ([], "docker.io", False),
        ([EVERY_REGISTRY], "ghcr.io", True),
        ([EVERY_REGISTRY], "10.0.0.5:5000", True),
        ([EVERY_REGISTRY], "localhost:5000", False),
        ([EVERY_REGISTRY], "x.localhost", False),
        ([EVERY_REGISTRY], "127.0.0.1:5000", False),
        ([EVERY_REGISTRY], "127.1", False),
        ([EVERY_REGISTRY], "2130706433:80", False),
        ([EVERY_REGISTRY], "0x7f.1", False),
        ([EVERY_REGISTRY], "0.0.0.0", False),
        ([EVERY_REGISTRY], "169.254.169.254", False),
        ([EVERY_REGISTRY], "[::1]:5000", False),
        ([EVERY_REGISTRY], "[fe80::1]", False),
        ([EVERY_REGISTRY], "[::ffff:127.0.0.1]", False),
        ([EVERY_REGISTRY, "127.0.0.1:5000"], "127.0.0.1:5000", True),
    ],
)
def test_a_node_asks_only_registries_that_its_administrator_trusts(
    allowed: list[str], registry: str, *, verdict: bool
) -> None:
    assert Registries(allowed).allow(registry) is verdict


@pytest.mark.parametrize("name", ["", "ghcr.io/lab", "http://ghcr.io", "a b"])
def test_what_is_no_registry_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no registry"):
        Registries([name])
