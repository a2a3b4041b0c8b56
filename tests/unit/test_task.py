"""A task, on its way from the command line to a node's state file: nothing of what was asked for is lost."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import TypeAdapter, ValidationError

from kohakuriver.host.schemas import CreateRequest, NewGroup
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.store import Task
from kohakuriver.task import NewTask, TaskOrder, TaskReport, TaskSpec, asked_for, part_of, taken_from

EVERYTHING: Final = NewTask(
    name="web",
    node="n1",
    backend="docker",
    image="python:3.12",
    command=["serve", "--port", "80"],
    env={"A": "b=c"},
    mounts=["/data:/data:ro"],
    volumes=["data:/kept"],
    ssh_keys=["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHb/pvVoEGsO+OgH9RvI3c6hTn5ZnQmXSRZ8ZQjyCcQB me"],
    memory=8 << 30,
    cpus=1.5,
    pids=512,
    shm_size=1 << 30,
    ttl=8 * 3600,
    idle_stop=1800,
    entrypoint=[],
    workdir="/work",
    run_as="me:staff",
    pull="never",
    devices=["/dev/null:/dev/nothing:r"],
    labels=["team=vision"],
    restart="on-failure:3",
    gpus="device=0,1",
    network="none",
    time_limit=4 * 3600,
    partition="gpu",
    account="lab",
    qos="high",
    preserve_host=True,
    keep_prefix=True,
)


def an_order(**more: Any) -> TaskOrder:
    identity = {"task_id": 7, "container": "kohakuriver-vps-7", "backend": "docker"}
    return taken_from({**identity, **more}, TaskOrder)


def through_the_database(order: TaskOrder) -> TaskOrder:
    row = Task.ordered(order, node="n1", owner="ann", now=1.0)
    json.dumps(row.spec)
    return row.order()


def test_what_is_asked_for_here_is_everything() -> None:
    assert asked_for(EVERYTHING).keys() == {f.name for f in fields(NewTask)}


def test_everything_that_was_asked_for_reaches_the_nodes_own_record(tmp_path: Path) -> None:
    sent = json.loads(json.dumps(asked_for(EVERYTHING)))
    request = TypeAdapter(CreateRequest).validate_python(sent)
    order = an_order(**{**vars(request), "backend": "docker"})
    ordered = json.loads(json.dumps(asked_for(through_the_database(order))))
    record = TaskRecord(**vars(TypeAdapter(TaskOrder).validate_python(ordered)))
    State(tmp_path).save_tasks([record])
    (kept,) = State(tmp_path).load_tasks()
    assert kept == record
    assert part_of(kept, TaskSpec) == part_of(EVERYTHING, TaskSpec)
    assert (kept.name, kept.task_id, kept.adopted) == ("web", 7, False)


def test_an_adopted_container_is_ordered_by_its_own_name_again_and_a_made_one_is_made() -> None:
    for adopted, expected in ((True, "theirs"), (False, None)):
        row = Task.ordered(an_order(name="web", adopted=adopted), node="n1", owner="ann", now=1.0)
        row.engine_name = "theirs"  # as the node reported it
        assert (row.order().engine_name, row.order().adopted) == (expected, adopted)


def test_a_report_changes_what_is_the_tasks_own() -> None:
    report = TaskRecord(**asdict(an_order(name="web"))).report()
    assert TypeAdapter(TaskReport).validate_python(report | {"traffic": {"streams": 1}, "newer": 1}).changes() == {
        name: value for name, value in report.items() if name not in ("task_id", "container")
    }


@pytest.mark.parametrize(
    "wrong", [{"status": "asleep"}, {"revision": -1}, {"ssh_port": 0}, {"ssh_host_key": "x"}, {"task_id": 2**63}]
)
def test_a_report_of_what_no_task_can_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TaskReport).validate_python({"task_id": 1, "status": "running", **wrong})


MUCH_WRONG: Final[dict[str, dict[str, Any]]] = {
    "variables": {"env": {f"A{n}": "" for n in range(60_000)}},
    "words that are none": {"command": [1] * 7_000},
    "words": {"command": [""] * 300_000},
    "a long word": {"entrypoint": ["x" * 70_000]},
    "a long directory": {"workdir": "/" + "x" * 70_000},
    "mounts": {"mounts": ["/a:/b"] * 100_000},
    "keys": {"ssh_keys": ["x"] * 10_000},
    "fields": {f"k{n}": 1 for n in range(80_000)},
}


@pytest.mark.parametrize("asked", MUCH_WRONG.values(), ids=MUCH_WRONG)
def test_an_order_is_looked_at_no_further_than_to_what_nobody_needs(asked: dict[str, Any]) -> None:
    """A fault costs some microseconds, a body has room for half a million, and whoever else is served waits."""
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(CreateRequest).validate_python({"image": "x", **asked})
    assert refused.value.error_count() == 1


def test_an_order_may_have_a_script_and_many_variables() -> None:
    asked = {"image": "x", "command": ["sh", "-c", "x" * 50_000], "env": {f"A{n}": "b" for n in range(600)}}
    made = TypeAdapter(CreateRequest).validate_python(asked)
    assert (made.command, made.env) == (asked["command"], asked["env"])


@pytest.mark.parametrize("members", [[1] * 100_000, {str(n): 1 for n in range(100_000)}], ids=["list", "names"])
def test_another_request_is_looked_at_no_further_either(members: object) -> None:
    with pytest.raises(ValidationError) as refused:
        NewGroup.model_validate({"name": "g", "members": members})
    assert refused.value.error_count() == 1
