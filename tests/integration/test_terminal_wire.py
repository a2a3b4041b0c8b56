"""Terminals as another implementation would open them: plain WebSockets, docs/protocol.md §6 in hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.support.processes import PATIENCE, Cluster, a_cluster

V2 = Subprotocol("kohakuriver.terminal.v2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("wire")) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        cluster.create(name="here", env={"SHELL": "/bin/sh", "PS1": "$ "})
        cluster.connected("here")
        yield cluster


@contextmanager
def a_terminal(
    cluster: Cluster, task: str = "here", query: str = "", *, v2: bool = False, token: str | None = ""
) -> Iterator[ClientConnection]:
    url = f"ws{cluster.url.removeprefix('http')}/ws/task/{task}/terminal{query}"
    headers = {} if token is None else {"Authorization": f"Bearer {token or cluster.token}"}
    with connect(
        url, additional_headers=headers, subprotocols=[V2] if v2 else None, open_timeout=PATIENCE, proxy=None
    ) as socket:
        yield socket


def until(socket: ClientConnection, text: str) -> None:
    """Receive v1 output until it contains `text`."""
    seen = ""
    while text not in seen:
        message = json.loads(socket.recv(PATIENCE))
        assert message["type"] == "output"
        seen += message["data"]


def the_rest(socket: ClientConnection) -> list[str | bytes]:
    """All messages to the close."""
    messages: list[str | bytes] = []
    try:
        while True:
            messages.append(socket.recv(PATIENCE))
    except ConnectionClosed:
        return messages


def test_v1_is_a_shell_in_json_with_resize_and_exit_code(cluster: Cluster) -> None:
    with a_terminal(cluster) as socket:
        assert socket.subprotocol is None
        socket.send(json.dumps({"type": "resize", "rows": 33, "cols": 111}))
        socket.send(json.dumps({"type": "input", "data": "stty size; echo grü$((1))ße\r"}))
        until(socket, "33 111\r\ngrü1ße\r\n")
        socket.send(json.dumps({"type": "input", "data": "exit 6\r"}))
        last = the_rest(socket)[-1]
        assert json.loads(last) == {"type": "exit", "code": 6}
        assert socket.close_code == 1000


def test_v1_begins_with_an_empty_output_which_its_command_line_throws_away(cluster: Cluster) -> None:
    with a_terminal(cluster) as socket:
        assert json.loads(socket.recv(PATIENCE)) == {"type": "output", "data": ""}
        until(socket, "$ ")


def test_v1_output_is_whole_characters_wherever_it_was_cut(cluster: Cluster) -> None:
    with a_terminal(cluster) as socket:
        command = r"printf '\342\202'; sleep 0.1; printf '\254-\377-end'"
        socket.send(json.dumps({"type": "input", "data": f"{command}\r"}))
        until(socket, "€-\N{REPLACEMENT CHARACTER}-end")


def test_v2_is_raw_bytes_both_ways_without_any_further_word(cluster: Cluster) -> None:
    with a_terminal(cluster, v2=True) as socket:
        assert socket.subprotocol == V2
        socket.send(b"stty -echo -opost; printf 'be\\377gin'; exit 4\r")
        messages = the_rest(socket)
        assert b"be\xffgin" in b"".join(m for m in messages if isinstance(m, bytes))
        assert json.loads(messages[-1]) == {"type": "exit", "code": 4}


def test_a_start_message_runs_a_command_with_its_outputs_apart(cluster: Cluster) -> None:
    with a_terminal(cluster, query="?start=1&tty=0", v2=True) as socket:
        command = ["sh", "-c", "cat; echo err >&2; exit 2"]
        socket.send(json.dumps({"type": "start", "tty": False, "command": command}))
        socket.send(b"in\x00put")
        socket.send(json.dumps({"type": "eof"}))
        *messages, last = the_rest(socket)
        outputs, name = {"stdout": b"", "stderr": b""}, "stdout"
        for message in messages:
            if isinstance(message, bytes):
                outputs[name] += message
            else:
                name = json.loads(message)["name"]
        assert outputs == {"stdout": b"in\x00put", "stderr": b"err\n"}
        assert json.loads(last) == {"type": "exit", "code": 2}


@pytest.mark.parametrize(
    "first", ["nonsense", '{"type": "resize", "rows": 1, "cols": 1}', '{"type": "start", "command": 1}']
)
def test_a_start_that_makes_no_sense_closes_with_1008_and_says_why(cluster: Cluster, first: str) -> None:
    with a_terminal(cluster, query="?start=1", v2=True) as socket:
        socket.send(first)
        (error,) = the_rest(socket)
        assert json.loads(error)["error"] == "bad_request"
        assert socket.close_code == 1008


def test_nonsense_later_on_closes_with_1008_too(cluster: Cluster) -> None:
    with a_terminal(cluster, v2=True) as socket:
        socket.send('{"type": "resize", "rows": 0, "cols": 5}')
        assert json.loads(the_rest(socket)[-1])["type"] == "error"
        assert socket.close_code == 1008


def test_a_v2_refusal_is_an_http_status(cluster: Cluster) -> None:
    for task, token, status in (("here", None, 401), ("here", "wrong", 401), ("nowhere", "", 404)):
        with pytest.raises(InvalidStatus) as refused, a_terminal(cluster, task, v2=True, token=token):
            pass
        assert refused.value.response.status_code == status
        assert set(json.loads(refused.value.response.body or b"")) == {"error", "message"}


def test_a_v1_refusal_is_an_error_message_and_a_close_but_credentials_are_a_status(cluster: Cluster) -> None:
    with a_terminal(cluster, "nowhere") as socket:
        (error,) = the_rest(socket)
        assert json.loads(error)["type"] == "error"
        assert "nowhere" in json.loads(error)["data"]
        assert socket.close_code == 1008
    with pytest.raises(InvalidStatus) as refused, a_terminal(cluster, token=None):
        pass
    assert refused.value.response.status_code == 401


def test_a_runner_opens_no_terminal_without_its_hosts_ticket(cluster: Cluster) -> None:
    task = cluster.task("here")["task_id"]
    url = f"ws{cluster.runners['n1'].ready['url'].removeprefix('http')}/ws/task/{task}/terminal"
    for headers in ({}, {"Authorization": f"Bearer {cluster.token}"}):
        with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=headers, proxy=None):
            pass
        assert refused.value.response.status_code == 401


@pytest.mark.parametrize("text", ['{"type": "input", "data": ' + "[" * 100_000 + "]" * 100_000 + "}", "x" * 300_000])
def test_a_message_that_is_too_deep_or_too_long_ends_its_terminal_with_a_sentence(cluster: Cluster, text: str) -> None:
    with a_terminal(cluster) as socket:
        socket.send(text)
        last = json.loads(the_rest(socket)[-1])
        assert (last["type"], last["status"]) == ("error", 400)
        assert socket.close_code == 1008
