"""Directories of a node that its administrator lets users mount."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.errors import NotAllowedError, UsageError
from kohakuriver.mount_roots import MountRoot, MountRoots
from kohakuriver.quotas import Offer
from tests.support.host_only import a_host

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.mark.parametrize(
    "text",
    ["data", "/", "//", "/data/", "/a/../b", "/data:wo", "/data:", "/x{user}", "/{group}", "/a\n", "", "/a:ro:ro"],
)
def test_what_is_no_directory_that_users_could_mount_is_refused_with_what_is_wanted(text: str) -> None:
    with pytest.raises(ValueError, match="/data:ro"):
        MountRoot.parse(text)


@pytest.mark.parametrize(
    ("mount", "may"),
    [
        ("/data:/data:ro", True),
        ("/data/:/data:ro", True),
        ("/data/sets/one:/data:ro", True),
        ("/data:/data", False),  # it may be read only
        ("/database:/data:ro", False),
        ("/data/../etc:/data:ro", False),
        ("/data/./x:/data:ro", False),
        ("/home/ann:/home", True),
        ("/home/ann:/home:ro", True),
        ("/home/ann/project:/home", False),  # one that can be written is mounted as a whole
        ("/home/ann/project:/home:ro", False),
        ("/home/bob:/home", False),
        ("/home/{user}:/home", False),
        ("/home:/home", False),
        ("/:/data:ro", False),
        ("volume:/data", False),
    ],
)
def test_a_user_may_mount_the_roots_and_what_is_below_those_that_are_only_read(mount: str, may: bool) -> None:
    assert MountRoots(["/data:ro", "/home/{user}"]).allow([mount], "ann") is may


def test_no_symlink_leads_out_of_a_root(tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret"
    for directory in (data / "v2", secret):
        directory.mkdir(parents=True)
    (data / "now").symlink_to("v2")
    (data / "out").symlink_to(secret)
    (tmp_path / "alias").symlink_to(data)
    roots = MountRoots([f"{data}:ro", f"{tmp_path}/alias:ro"])
    assert roots.resolved([f"{data}/now:/x:ro"], "ann") == [f"{data}/v2:/x:ro"]  # and that place is what is mounted
    assert roots.resolved([f"{tmp_path}/alias/v2:/x:ro"], "ann") == [f"{data}/v2:/x:ro"]
    with pytest.raises(NotAllowedError, match=f"{data}/out leads out of {data}"):
        roots.resolved([f"{data}/out:/x:ro"], "ann")
    with pytest.raises(UsageError, match="not there"):
        roots.resolved([f"{data}/none:/x:ro"], "ann")
    assert roots.resolved([f"{secret}:/x"], None) == [f"{secret}:/x"]  # an admin's is as it was given


def test_a_user_mounts_the_roots_of_a_node_and_is_told_them_where_not(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("bare")
            roots = await host.runner("n2", offer=Offer(mount_roots=["/data:ro", "/home/{user}"]))
            ann, _ = await host.person("ann")
            good = ["/data/sets:/data:ro", "/home/ann:/work"]
            made = await ann.post("/api/tasks", json={"image": "x", "mounts": good})
            assert (made.status_code, made.json()["node"], made.json()["mounts"]) == (201, "n2", good)
            assert roots.asked[-1][2]["mounts_for"] == "ann"
            for node in ({}, {"node": "n2"}):
                bad = {"image": "x", "mounts": ["/data:/data:ro", "/etc:/x"], **node}
                answer = await ann.post("/api/tasks", json=bad)
                assert (answer.status_code, answer.json()["error"]) == (403, "mount_not_allowed")
                assert "may not mount /etc:/x;" in answer.json()["message"]
                assert "/data:ro and what is below it, /home/ann as a whole" in answer.json()["message"]
            answer = await ann.post("/api/tasks", json={"image": "x", "mounts": good, "node": "bare"})
            assert answer.json()["error"] == "not_admin"
            await host.user.post("/api/tasks", json={"image": "x", "mounts": ["/etc:/x"], "node": "n2"})
            assert "mounts_for" not in roots.asked[-1][2]  # an admin's mounts are not bound

    run(check())
