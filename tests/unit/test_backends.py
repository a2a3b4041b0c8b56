"""What is declared of the ways of running a task, and what is there."""

from __future__ import annotations

import pytest

from kohakuriver.backends import BACKENDS, adopting, by_default, kind_of, known, making, making_images
from kohakuriver.runner.backends.registry import CLASSES


def test_every_backend_that_is_declared_can_be_run_and_no_other() -> None:
    assert CLASSES.keys() == {name for name, kind in BACKENDS.items() if not kind.dials_in}


def test_tasks_of_different_backends_have_different_ids_on_the_tunnel() -> None:
    assert len({kind.container.format(7) for kind in BACKENDS.values()}) == len(BACKENDS)


def test_a_task_goes_to_a_backend_that_can_make_it() -> None:
    assert (making(), making_images()) == (["docker", "process", "slurm"], ["docker"])
    assert (adopting("container"), adopting("address"), adopting("job")) == (["docker"], ["address"], ["slurm"])
    assert by_default() == ["docker", "address"]


def test_a_backend_that_is_none_is_refused_but_a_newer_ones_task_can_be_shown() -> None:
    with pytest.raises(ValueError, match="there are docker, process, slurm, address"):
        kind_of("torque")
    assert known("torque").dialled is False
