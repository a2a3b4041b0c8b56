"""What a session holds, whatever it carries: taken once, let go of once, and told about in words of tasks and nodes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.errors import KohakuRiverError, NotAllowedError, UnavailableError, from_status
from kohakuriver.limits import Limits
from kohakuriver.session.carried import Carrier, Passed, Route, at_runner
from kohakuriver.tunnel.dial import Server, open_session
from kohakuriver.tunnel.protocol import CloseCode

Run = Callable[[Coroutine[Any, Any, None]], None]


class Grant:
    def __init__(self) -> None:
        self.said: list[Any] = []
        self.end: Callable[[str], None] = lambda reason: None

    def opened(self, **about: Any) -> None:
        self.said.append("opened")

    def need_room(self) -> None:
        pass

    def ran(self, command: list[str]) -> None:
        pass

    def counted(self, passed: Callable[[], tuple[int, int]]) -> None:
        pass

    def stays(self) -> None:
        pass

    def attach(self, end: Callable[[str], None]) -> None:
        self.end = end

    def closed(self, **how: Any) -> None:
        self.said.append(how)

    def release(self) -> None:
        self.said.append("released")


class Moved:
    def __init__(self) -> None:
        self.cuts: list[tuple[int, str]] = []

    def passed(self) -> Passed:
        return 3, 4

    def cut(self, code: int, reason: str) -> None:
        self.cuts.append((code, reason))


def test_a_session_that_can_not_be_opened_leaves_nothing_behind() -> None:
    carrier, grant = Carrier[Moved](Limits()), Grant()
    with pytest.raises(ConnectionError), carrier.carry(Moved(), Route("", "c", None, grant)):
        raise ConnectionError
    assert (grant.said, carrier.snapshot()["sessions"]) == (["released"], 0)


def test_a_session_is_let_go_of_once_with_the_first_reason_and_its_bytes_count_on() -> None:
    carrier, grant = Carrier[Moved](Limits()), Grant()
    with carrier.carry(Moved(), Route("", "c", None, grant)) as carried:
        carried.begin("127.0.0.1:1", proto="tcp")
    carried.end("user", 1000, "done")
    for _ in range(2):
        carried.end("node", 1011, "late")
        carried.over()
    how = {"ended_by": "user", "code": 1000, "reason": "done", "bytes_to_container": 3, "bytes_to_user": 4}
    assert grant.said == ["opened", how]
    assert carrier.snapshot() == {"sessions": 0, "bytes_to_container": 3, "bytes_to_user": 4}


@pytest.mark.parametrize(("code", "lost"), [(1000, False), (1008, False), (4001, False), (1006, True), (1001, True)])
def test_the_audit_log_tells_a_session_that_was_lost_from_one_that_ended(code: int, lost: bool) -> None:
    carrier, grant = Carrier[Moved](Limits()), Grant()
    with carrier.carry(Moved(), Route("", "c", None, grant)) as carried:
        carried.begin("127.0.0.1:1")
    carried.end("user", code, "")
    carried.over()
    assert grant.said[1].get("lost", False) is lost


def test_a_session_is_cut_when_its_right_goes_and_when_the_program_ends() -> None:
    carrier, moved, grant = Carrier[Moved](Limits()), Moved(), Grant()
    with carrier.carry(moved, Route("", "c", None, grant)) as carried:
        carried.begin("127.0.0.1:1")
        carried.hang_on_right()
    grant.end("no longer shared")
    carrier.cut_all("shutting down")
    assert moved.cuts == [(CloseCode.POLICY, "no longer shared"), (CloseCode.GOING_AWAY, "shutting down")]
    carried.over()
    assert grant.said[1]["reason"] == "no longer shared"


def test_a_session_in_which_nothing_passes_is_cut(run: Run) -> None:
    async def main() -> None:
        cut: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        moved = Moved()
        moved.cut = lambda code, reason: cut.set_result(code)  # type: ignore[method-assign]
        carrier = Carrier[Moved](Limits(idle_timeout=0.05))
        with carrier.carry(moved, Route("", "c", None, Grant())) as carried:
            carried.begin("127.0.0.1:1")
        assert await asyncio.wait_for(cut, 10) == CloseCode.IDLE
        carried.over()

    run(main())


def test_a_runner_that_can_not_be_reached_is_told_by_its_nodes_name_and_with_exit_code_4(run: Run) -> None:
    async def main() -> None:
        with socket.socket() as taken:  # bound, and nobody listens
            taken.bind(("127.0.0.1", 0))
            url = f"ws://127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(UnavailableError) as caught, at_runner(Route(url, "c1", None, task="web", node="n1")):
                await open_session(Server(f"{url}/ws/forward/c1/80"))
        assert caught.value.message.startswith("The host can't reach node n1: ")
        assert "127.0.0.1" not in caught.value.message
        assert caught.value.exit_code == _told(caught.value).exit_code == 4

    run(main())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UnavailableError("kohakuriver-vps-1 is not there", code="tunnel_not_connected", status=504), "Task web runs"),
        (NotAllowedError("The ticket has run out."), "Node n1 did not take the host's ticket"),
    ],
)
def test_what_a_runner_refuses_is_told_by_the_tasks_and_the_nodes_names(error: KohakuRiverError, words: str) -> None:
    with (
        pytest.raises(UnavailableError, match=words) as caught,
        at_runner(Route("", "c1", None, task="web", node="n1")),
    ):
        raise error
    assert "kohakuriver-vps-1" not in caught.value.message
    assert _told(caught.value).exit_code == 4


def _told(error: KohakuRiverError) -> KohakuRiverError:
    """As the command line makes it of the host's answer."""
    return from_status(error.status, error.message, error.code)
