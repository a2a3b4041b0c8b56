"""Tasks that are stopped by themselves: by their time to live, and when nobody is connected."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from kohakuriver.errors import KohakuRiverError, UnavailableError, UsageError
from kohakuriver.quotas import LONGEST_TIME, seconds_in, time_in_words
from kohakuriver.runner.services.lifetimes import AGAIN_SECONDS, BootClock, Deadline
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runtime import cancel_all
from kohakuriver.task import Moment
from tests.support.host_only import a_host
from tests.unit.test_runner_tasks import Bench, a_task

MOMENT: TypeAdapter[float] = TypeAdapter(Moment)

Run = Callable[[Coroutine[Any, Any, None]], None]
HOUR = 3600


class HandClock(BootClock):
    """A clock that the test moves."""

    boot = "this start of the machine"

    def __init__(self) -> None:
        self.at = 1000.0
        self.on_the_wall = 1_800_000_000.0

    def ticks(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.on_the_wall

    def go_on(self, seconds: float) -> None:
        self.at += seconds
        self.on_the_wall += seconds


class Timed:
    """A bench whose tasks are stopped by a clock that the test moves."""

    def __init__(self, directory: Path, clock: HandClock) -> None:
        self.bench = Bench(directory)
        self.clock = clock
        self.times = self.bench.manager.lifetimes
        self.times._clock = clock
        self.manager = self.bench.manager

    async def go_on(self, seconds: float) -> None:
        """Let time go by, and what is due be done."""
        self.clock.go_on(seconds)
        await self.looked()

    async def looked(self) -> None:
        self.times.changed()
        for _ in range(20):  # the look, the stops that it begins, and what these report
            await asyncio.sleep(0)

    def states(self) -> list[tuple[str, str, str | None]]:
        return [(task.name, task.status, task.message) for task in self.manager.book.all()]


@contextlib.asynccontextmanager
async def timed(directory: Path, clock: HandClock | None = None) -> AsyncIterator[Timed]:
    one = Timed(directory, clock or HandClock())
    await one.bench.open()
    running = asyncio.ensure_future(one.times.run())
    try:
        yield one
    finally:
        await cancel_all([running])
        await one.manager.close(stop_tasks=False)


def test_a_task_is_stopped_when_its_time_to_live_is_over_and_says_so(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with timed(tmp_path) as one:
            task = await one.manager.create(a_task(1, ttl=8 * HOUR))
            await one.manager.create(a_task(2))
            assert task.ends_at == one.clock.wall() + 8 * HOUR
            await one.go_on(8 * HOUR - 1)
            assert task.status == "running"
            await one.go_on(1)
            assert one.states() == [("web1", "stopped", "its time to live of 8 h is over"), ("web2", "running", None)]
            assert one.bench.dropped[-1][1] == "task web1 stopped: its time to live of 8 h is over"
            await one.manager.restart("c1")  # with its time anew
            await one.go_on(8 * HOUR - 1)
            assert (task.status, task.message) == ("running", None)
            await one.go_on(1)
            assert task.status == "stopped"
            await one.manager.restart("c1")
            await one.manager.stop("c1")  # by somebody: there is nothing to say
            assert (task.status, task.message, task.stop_reason) == ("stopped", None, None)

    run(check())


def test_a_task_is_idle_while_nobody_is_connected_and_however_short_somebody_was_counts(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with timed(tmp_path) as one:
            task = await one.manager.create(a_task(1, idle_stop=30 * 60))
            await one.looked()
            await one.go_on(29 * 60)
            one.times.entered("c1")
            one.times.entered("c1")
            one.times.left("c1")
            await one.go_on(24 * HOUR)
            assert task.status == "running"  # one is still connected
            one.times.left("c1")
            await one.looked()
            await one.go_on(29 * 60)
            one.times.entered("c1")
            one.times.left("c1")
            await one.looked()
            await one.go_on(29 * 60)
            assert task.status == "running"
            await one.go_on(60)
            assert one.states() == [("web1", "stopped", "idle for 30 min")]
            await one.manager.restart("c1")
            await one.looked()
            await one.go_on(29 * 60)
            assert task.status == "running"

    run(check())


def test_a_clock_on_the_wall_that_is_set_ends_no_task(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with timed(tmp_path) as one:
            task = await one.manager.create(a_task(1, ttl=HOUR, idle_stop=HOUR))
            await one.looked()
            one.clock.on_the_wall += 365 * 24 * HOUR
            await one.go_on(HOUR - 1)
            assert task.status == "running"
            one.clock.on_the_wall = 0.0
            await one.go_on(1)
            assert task.status == "stopped"

    run(check())


@pytest.mark.parametrize(
    ("rebooted", "wall", "left"),
    [
        (False, 0.0, 600.0),
        (False, 1e9, 600.0),  # the clock was set while no runner was there
        (True, 0.0, 600.0),
        (True, -1e9, 3600.0),  # a machine that has lost its clock gives no more than there was
        (True, 1e9, 0.0),
    ],
)
def test_a_time_to_live_goes_on_over_restarts_of_the_runner_and_of_the_machine(
    run: Run, tmp_path: Path, rebooted: bool, wall: float, left: float
) -> None:
    async def check() -> None:
        clock = HandClock()
        async with timed(tmp_path, clock) as one:
            await one.manager.create(a_task(1, ttl=HOUR))
            await one.go_on(HOUR / 2)
        clock.go_on(HOUR / 2 - 600)
        clock.on_the_wall += wall
        if rebooted:
            clock.boot, clock.at = "another start", 5.0
        async with timed(tmp_path, clock) as one:
            (task,) = one.manager.book.all()
            assert one.times.left_of(task) == pytest.approx(left)
            if left:
                assert task.ends_at == pytest.approx(clock.wall() + left)
            await one.go_on(left)
            assert task.message == "its time to live of 1 h is over"

    run(check())


def test_idle_time_goes_on_over_a_restart_and_begins_anew_where_a_runner_was_killed(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        clock = HandClock()
        async with timed(tmp_path, clock) as one:
            await one.manager.create(a_task(1, idle_stop=HOUR))
            await one.looked()
            clock.go_on(HOUR / 2)
        async with timed(tmp_path, clock) as one:
            (task,) = one.manager.book.all()
            await one.looked()
            assert one.times._idle["c1"].left(clock) == HOUR / 2
            one.manager.book.write_down()  # as every change is; then it is killed
            records = one.bench.state.load_tasks()
        one.bench.state.save_tasks(records)
        clock.go_on(HOUR)
        async with timed(tmp_path, clock) as one:
            (task,) = one.manager.book.all()
            await one.looked()
            assert task.status == "running"
            await one.go_on(HOUR)
            assert task.message == "idle for 1 h"

    run(check())


def test_no_time_to_live_is_longer_than_calendars_go(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with timed(tmp_path) as one:
            task = await one.manager.create(a_task(1, ttl=HOUR))
            one.manager.extend("c1", LONGEST_TIME - 2 * HOUR, most=0)
            with pytest.raises(UsageError, match="No task can have more than"):
                one.manager.extend("c1", 2 * HOUR, most=0)
            assert task.ends_at is not None
            assert MOMENT.validate_python(task.ends_at)

    run(check())


@pytest.mark.parametrize("moment", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_node_can_name_no_moment_that_no_calendar_has(moment: float) -> None:
    with pytest.raises(ValidationError, match="it must be a number"):
        MOMENT.validate_python(moment)


def test_a_time_to_live_is_extended_within_what_its_owner_may_have(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with timed(tmp_path) as one:
            task = await one.manager.create(a_task(1, ttl=HOUR))
            before = task.revision
            one.manager.extend("c1", 4 * HOUR, most=0)
            assert task.revision > before  # the host hears of it
            await one.go_on(5 * HOUR - 1)
            assert task.status == "running"
            with pytest.raises(UsageError, match="would have 3 h left, and its owner's limit 'ttl' is 2 h") as refused:
                one.manager.extend("c1", 3 * HOUR - 1, most=2 * HOUR)
            assert "extend it by 1 h 59 min at most" in refused.value.message
            one.manager.extend("c1", HOUR, most=2 * HOUR)
            await one.go_on(HOUR)
            assert task.status == "running"
            await one.go_on(1)
            assert (task.status, task.message) == ("stopped", "its time to live is over")
            with pytest.raises(UnavailableError, match="not running"):
                one.manager.extend("c1", HOUR, most=0)
            await one.manager.create(a_task(2))
            with pytest.raises(UsageError, match="no time to live"):
                one.manager.extend("c2", HOUR, most=0)

    run(check())


def test_a_task_that_can_not_be_stopped_is_tried_again(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with timed(tmp_path) as one:
            task = await one.manager.create(a_task(1, ttl=60))
            stop, tries = one.bench.backend.stop, []

            async def fails(task: TaskRecord) -> None:
                tries.append(task)
                raise KohakuRiverError("The engine hangs.")

            one.bench.backend.stop = fails  # type: ignore[method-assign]
            await one.go_on(60)
            await one.go_on(AGAIN_SECONDS - 1)
            assert (len(tries), task.status) == (1, "running")
            one.bench.backend.stop = stop  # type: ignore[method-assign]
            await one.go_on(1)
            assert task.status == "stopped"

    run(check())


def test_a_task_that_is_restarted_while_its_end_waits_for_its_turn_goes_on(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with timed(tmp_path) as one:
            task = await one.manager.create(a_task(1, ttl=60))
            one.bench.backend.gate.clear()
            restart = asyncio.ensure_future(one.manager.restart("c1"))
            await asyncio.sleep(0)
            one.clock.go_on(60)
            one.times.begin(task)
            await one.looked()
            one.bench.backend.gate.set()
            await restart
            await one.looked()
            assert task.status == "running"

    run(check())


def test_the_real_clock_counts_from_the_start_of_the_machine() -> None:
    clock = BootClock()
    deadline = Deadline.after(60, clock)
    assert clock.boot
    assert 0 < deadline.left(clock) <= 60
    assert Deadline.read(deadline.written()) == deadline
    assert Deadline.read(None) is None


def test_times_are_read_and_written_as_people_do() -> None:
    assert [seconds_in(text) for text in ("90s", "30m", "8h", "1d", "2w")] == [90, 1800, 28800, 86400, 1209600]
    for text in ("", "h", "8", "-1h", "1.5h", "0h", "8x", "٣h"):
        with pytest.raises(ValueError, match="12h"):
            seconds_in(text)
    words = [time_in_words(seconds) for seconds in (0, 59.6, 1800, 5400, 90061, 28800)]
    assert words == ["0 s", "1 min", "30 min", "1 h 30 min", "1 d 1 h", "8 h"]


def test_a_task_gets_the_times_that_it_asks_for_within_its_users_limits(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            body = {"backend": "process"}
            free = (await ann.post("/api/tasks", json=body)).json()
            assert (free["ttl"], free["idle_stop"], free["ends_at"]) == (None, None, None)
            limits = {"ttl": 24 * HOUR, "idle_stop": HOUR}
            assert (await host.user.patch("/api/users/ann/limits", json=limits)).status_code == 200
            task = (await ann.post("/api/tasks", json={**body, "name": "web", "ttl": 8 * HOUR})).json()
            assert (task["ttl"], task["idle_stop"]) == (8 * HOUR, HOUR)
            assert (runner.asked[-1][2]["ttl"], runner.asked[-1][2]["idle_stop"]) == (8 * HOUR, HOUR)
            refused = await ann.post("/api/tasks", json={**body, "ttl": 48 * HOUR})
            assert (refused.status_code, refused.json()["error"]) == (403, "over_limit")
            assert "is 1 d, and this task asks for 2 d; give less by --ttl" in refused.json()["message"]
            assert (await ann.post("/api/tasks", json={**body, "ttl": 0})).status_code in (400, 422)

            runner.change(task["container"], ends_at=1_800_000_000.0)
            await runner.beat()
            assert (await ann.get("/api/tasks/web")).json()["ends_at"] == "2027-01-15T08:00:00+00:00"
            runner.answers[f"/api/tasks/{task['container']}/extend"] = (200, runner.tasks[task["container"]])
            for who, most in ((ann, 24 * HOUR), (host.user, 0)):
                assert (await who.post("/api/tasks/web/extend", json={"seconds": 4 * HOUR})).status_code == 200
                assert runner.asked[-1][2] == {"seconds": 4 * HOUR, "most": most}
            runner.change(task["container"], status="stopped", message="idle for 1 h")
            await runner.beat()
            assert (await ann.get("/api/tasks/web")).json()["ends_at"] is None

    run(check())


def test_who_is_connected_is_told_once_before_a_time_to_live_is_over(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with timed(tmp_path) as one:
            said: list[tuple[str, str]] = []
            one.times.tell = lambda container, sentence: said.append((container, sentence))
            await one.manager.create(a_task(1, ttl=8 * HOUR))
            await one.manager.create(a_task(2, ttl=8 * HOUR))  # to which nobody is connected
            one.times.entered("c1")
            await one.go_on(8 * HOUR - 301)
            assert said == []
            await one.go_on(1)
            await one.go_on(100)
            assert said == [
                (
                    "c1",
                    "Task web1 is stopped in 5 min, when its time to live is over; its owner adds to it with "
                    "`kohakuriver vps extend web1 1h`.",
                )
            ]
            one.manager.extend("c1", HOUR, most=0)
            await one.go_on(HOUR)
            assert len(said) == 2  # of the new end, too

    run(check())
