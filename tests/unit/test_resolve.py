"""Names of machines: one that can't be a name is an error with a sentence, and no look-up outlives Ctrl-C."""

from __future__ import annotations

import gc
import signal
import socket
import threading

import pytest

from kohakuriver.cli import ssh_dial
from kohakuriver.config import advertise_url, host_url
from kohakuriver.errors import HostUnreachableError, LocalAddressError, UsageError
from kohakuriver.http_proxy import http_proxy
from kohakuriver.resolve import ascii_named, joined, resolving
from kohakuriver.tunnel.udp import connected
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from kohakuriver.web.app import bind
from tests.unit.test_dial import Run

NAMES = pytest.mark.parametrize("name", ["a..b", "a" * 70 + ".test"])


@NAMES
def test_it_fails_as_other_names_do(name: str) -> None:
    with pytest.raises(socket.gaierror), resolving():
        socket.getaddrinfo(name, 1)


@NAMES
def test_a_server_can_not_listen_on_it(name: str) -> None:
    with pytest.raises(LocalAddressError, match=r"is no address that this machine can listen on"):
        bind(name, 0)


@NAMES
def test_a_forward_can_not_listen_on_it(run: Run, name: str) -> None:
    async def main() -> None:
        endpoint = UserEndpoint(on_detach=lambda reason: None)
        with pytest.raises(LocalAddressError, match=r"is not an address of this machine"):
            await endpoint.listen_tcp(name, 0, 80)

    run(main())


@NAMES
def test_datagrams_can_not_be_sent_to_it(name: str) -> None:
    with pytest.raises(socket.gaierror):
        connected(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), name, 80)


@NAMES
def test_ssh_is_told_that_its_proxy_can_not_be_reached(name: str) -> None:
    with pytest.raises(HostUnreachableError, match=r"The SSH proxy at .* can't be reached: "):
        ssh_dial.dial(f"{name}:22", "7", None)
    with pytest.raises(HostUnreachableError, match=r"can't be reached: this can't be the name of a machine\."):
        ssh_dial.to_show(f"https://{name}", "7", "token", None)


@pytest.mark.parametrize(
    ("url", "known_as"),
    [
        ("http://b\u00fccher.example:81/x", "http://xn--bcher-kva.example:81/x"),
        ("http://ann:\u00fc@\uff11\uff12\uff17.0.0.1", "http://ann:\u00fc@127.0.0.1"),
        ("https://host.lab", "https://host.lab"),
    ],
)
def test_a_name_in_other_letters_is_asked_for_as_name_servers_know_it(url: str, known_as: str) -> None:
    assert ascii_named(url) == known_as


@pytest.mark.parametrize("name", ["\u00fc..\u00df", "x\udcff", "\u00fc" * 70])
def test_other_letters_that_make_no_name_are_a_mistake_in_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"^The host must be a URL like"):
        host_url(f"http://{name}:1")
    with pytest.raises(UsageError, match=r"^--advertise-url must be a URL like"):
        advertise_url(f"http://{name}:1", 8001)
    assert advertise_url("node7", 8001) == "http://node7:8001"
    monkeypatch.setenv("KOHAKURIVER_PROXY", f"http://{name}:1")
    with pytest.raises(UsageError, match=r"^The address of the proxy in the environment is no URL\.$"):
        http_proxy("http://host.lab")


def test_a_wait_for_a_thread_ends_by_ctrl_c_though_another_thread_gets_the_signal() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    leave, left = threading.Event(), threading.Event()

    def work() -> None:
        signal.raise_signal(signal.SIGINT)  # this thread's own: it wakes nobody
        leave.wait(20)
        left.set()

    def wait() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        joined(thread)

    gc.disable()  # where a finalizer runs just then, KeyboardInterrupt is its own, and lost
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
        assert not left.is_set()
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)
        leave.set()
        left.wait()
