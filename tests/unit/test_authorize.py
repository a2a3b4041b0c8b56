"""Who may open a forward session, and with which ticket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from kohakuriver.errors import NotAllowedError, NotFoundError, UnauthenticatedError, UnavailableError
from kohakuriver.host.services.nodes import RESTART_SECONDS
from kohakuriver.session import ticket
from kohakuriver.session.nodes import NodeOfflineError
from kohakuriver.store import Passes
from kohakuriver.store.passes import PASS_SECONDS
from kohakuriver.tunnel.protocol import TUNNEL_V2
from tests.support.host_only import a_host

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_a_session_goes_to_the_tasks_node_with_a_ticket_for_its_container_alone(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            target = await host.forwards.authorize(host.admin_token, "web", 8080, "tcp")
            assert target.runner_ws_url == runner.url.replace("http://", "ws://")
            assert target.container == task["container"]
            assert target.ticket is not None
            shown = ticket.check(runner.key, target.ticket, node="n1", scope="forward")
            assert (shown.task, shown.container, shown.user) == (task["task_id"], task["container"], "admin")

    run(check())


def test_a_ticket_names_the_ports_that_its_session_does_and_no_others(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await host.create(name="web")
            forwards, token = host.forwards, host.admin_token
            named = frozenset({80, 443})
            for credential, ports in (
                ((await forwards.authorize(token, "web", 8080, "tcp")).ticket, None),
                ((await forwards.authorize(token, "web", 8080, "tcp", named)).ticket, {80, 443, 8080}),
                ((await forwards.authorize(token, "web", None, "tcp", named)).ticket, {22}),
                ((await forwards.authorize_ssh(token, "web")).ticket, {22}),
                ((await forwards.authorize_ssh(token, "web", 5432)).ticket, {5432}),
            ):
                assert credential is not None
                assert ticket.check(runner.key, credential, node="n1", scope="forward").ports == ports
            terminal = await forwards.authorize_terminal(token, "web")
            assert terminal.ticket is not None
            assert ticket.check(runner.key, terminal.ticket, node="n1", scope="terminal").ports == frozenset()

    run(check())


def test_a_pass_stands_for_a_token_for_one_ssh_connection_to_one_task_within_a_minute(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            for name in ("web", "other"):
                await host.create(name=name)
            now = 0.0
            host.forwards._passes = Passes(host.store, clock=lambda: now)

            async def a_pass() -> str:
                answer = await host.user.post("/api/tasks/web/ssh-pass")
                assert answer.status_code == 201
                return str(answer.json()["pass"])

            shown = await a_pass()
            assert (await host.forwards.authorize_ssh(shown, "web")).task == "web"
            with pytest.raises(UnauthenticatedError):
                await host.forwards.authorize_ssh(shown, "web")
            with pytest.raises(NotAllowedError):
                await host.forwards.authorize_ssh(await a_pass(), "other")
            with pytest.raises(UnauthenticatedError):
                await host.forwards.authorize(await a_pass(), "web", 80, "tcp")
            with pytest.raises(UnauthenticatedError):
                await host.forwards.authorize_ssh("krp_guessed", "nothing")
            shown = await a_pass()
            now += PASS_SECONDS
            with pytest.raises(UnauthenticatedError):
                await host.forwards.authorize_ssh(shown, "web")

    run(check())


def test_a_session_to_what_is_not_there_or_does_not_run_is_refused_with_the_reason(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            await host.create(name="web")
            authorize, token = host.forwards.authorize, host.admin_token
            with pytest.raises(NotFoundError):
                await authorize(token, "other", 80, "tcp")
            await host.user.post("/api/tasks/web/stop")
            with pytest.raises(UnavailableError, match="stopped") as caught:
                await authorize(token, "web", 80, "tcp")
            assert caught.value.code == "task_not_running"
            await host.user.post("/api/tasks/web/restart")
            host.clock.now += 100
            with pytest.raises(NodeOfflineError, match="offline") as away:
                await authorize(token, "web", 80, "tcp")
            assert (away.value.code, away.value.node) == ("node_offline", "n1")

    run(check())


def test_who_comes_to_a_node_that_has_just_left_waits_until_it_is_back(run: Run, tmp_path: Path) -> None:
    """As in a restart; one that has been gone for longer is waited for by nobody."""

    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await host.create(name="web")
            forwards, token = host.forwards, host.admin_token
            await runner.beat(leaving=True)
            waiting = [
                asyncio.ensure_future(come)
                for come in (
                    forwards.authorize(token, "web", 80, "tcp"),
                    forwards.authorize_terminal(token, "web"),
                    forwards.authorize_ssh(token, "web"),
                )
            ]
            while len(host.nodes._registered._events["n1"]) < len(waiting):  # noqa: ASYNC110
                await asyncio.sleep(0)
            await runner.register()
            assert [route.task for route in await asyncio.gather(*waiting)] == ["web"] * 3
            await runner.beat(leaving=True)
            host.clock.now += RESTART_SECONDS
            with pytest.raises(NodeOfflineError, match="offline"):
                await forwards.authorize(token, "web", 80, "tcp")
            assert not host.nodes._registered._events

    run(check())


@pytest.mark.parametrize("token", [None, "wrong", ""])
def test_a_session_without_a_valid_token_is_refused(run: Run, tmp_path: Path, token: str | None) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            await host.create(name="web")
            with pytest.raises(UnauthenticatedError):
                await host.forwards.authorize(token, "web", 80, "tcp")

    run(check())


@pytest.mark.parametrize("port", ["0", "-1", "65536", "080808", "eighty", "٨٠"])
def test_a_session_to_what_is_no_port_is_refused_before_anything_is_looked_up(
    run: Run, tmp_path: Path, port: str
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            url = f"{host.url.replace('http', 'ws')}/ws/forward/web/{quote(port)}"
            with pytest.raises(InvalidStatus) as caught:
                await connect(url, subprotocols=[Subprotocol(TUNNEL_V2)], proxy=None)
            assert caught.value.response.status_code == 400
            assert "ports go from 1 to 65535" in (caught.value.response.body or b"").decode()

    run(check())


def test_a_host_that_allows_it_opens_sessions_for_those_without_a_token(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path, allow_anonymous=True) as host:
            runner = await host.runner()
            await host.create(name="web")
            target = await host.forwards.authorize(None, "web", 80, "tcp")
            assert target.ticket is not None
            assert ticket.check(runner.key, target.ticket, node="n1", scope="forward").user == "anonymous"
            with pytest.raises(UnauthenticatedError):
                await host.forwards.authorize("wrong", "web", 80, "tcp")

    run(check())
