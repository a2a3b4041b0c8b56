"""The way to a task's SSH server, as OpenSSH's ProxyCommand: `kohakuriver ssh-proxy`.

Before ssh hears from the server, the host key that the host knows is put where ssh looks for it. ssh starts this for
every connection, so it also runs as a program of its own (`python -m`) and imports little. Source: docs/protocol.md §7.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kohakuriver.cli.ssh_names import task_of
from kohakuriver.descriptors import prepare
from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    UnavailableError,
    UsageError,
    from_answer,
)
from kohakuriver.resolve import connected, joined, resolving
from kohakuriver.text import json_of, printable

__all__ = ["dial", "main", "proxy", "relay", "to_show"]

ANSWER_SECONDS = 30.0
MAX_ANSWER = 8192
LONGEST_ANSWER = 16 << 20
"""Bytes of what the host tells of a task; what is longer is cut off, and so no JSON."""
PIECE = 256 * 1024

Answer = TypeVar("Answer")


def dial(ssh_proxy: str, task: str, token: str | None) -> socket.socket:
    """A connection to the task's SSH server through the SSH proxy, `host:port`, or the first of several that answers.

    Raises HostUnreachableError when the proxy does not answer, UnavailableError with its reason when it refuses, and
    UsageError for an address or a task that can't be one.
    """
    return _of_first(ssh_proxy, lambda one: _dial(one, task, token))


def _of_first(several: str, ask: Callable[[str], Answer]) -> Answer:
    """The answer of the first that gives one, of several with commas between. Raises what the last raises."""
    *others, last = several.split(",")
    for one in others:
        with contextlib.suppress(HostUnreachableError):
            return ask(one)
    return ask(last)


def _dial(ssh_proxy: str, task: str, token: str | None) -> socket.socket:
    host, colon, port = ssh_proxy.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"The SSH proxy must be given as host:port, not {ssh_proxy!r}.")
    request = f"REQUEST_TUNNEL {task} {token or ''}".strip()
    if not task or len(request.split()) > 3 or not request.isprintable():
        raise UsageError(f"{task!r} can't be a task's name.")
    try:
        with resolving():
            sock = _connect(f"https://{ssh_proxy}", host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostUnreachableError(f"The SSH proxy at {ssh_proxy} can't be reached: {reason}.") from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.sendall(request.encode() + b"\n")
        answer = _line(sock)
    except OSError as error:
        sock.close()
        raise HostUnreachableError(f"The SSH proxy at {ssh_proxy} did not answer: {error}.") from error
    if answer == "SUCCESS":
        sock.settimeout(None)
        return sock
    sock.close()
    if answer.startswith("ERROR "):
        raise UnavailableError(answer.removeprefix("ERROR "))
    raise HostUnreachableError(f"What answers at {ssh_proxy} is not KohakuRiver's SSH proxy.")


def to_show(host: str, task: str, token: str | None, ca_file: str | None) -> str | None:
    """What to show to the SSH proxy: the token, or where the host speaks TLS a pass, for the proxy speaks none.

    Raises KohakuRiverError.
    """
    if token is None or not host.startswith("https:"):
        return token
    return str(_ask(host, f"{_path(task)}/ssh-pass", token, ca_file, method="POST").get("pass"))


def _connect(url: str, host: str, port: int) -> socket.socket:
    """A connection to `host`:`port`, by the HTTP proxy that there is for `url`.

    Raises OSError, and KohakuRiverError where a proxy leads nowhere.
    """
    # What nobody names need not be looked for: this program starts for every connection of ssh.
    if any(name[-6:].lower() == "_proxy" for name in os.environ) or sys.platform in ("darwin", "win32"):
        from kohakuriver.http_proxy import connect_through, http_proxy

        if (proxy := http_proxy(url)) is not None:
            return connect_through(proxy, host, port, ANSWER_SECONDS)
    return connected(host, port, ANSWER_SECONDS)


def _line(sock: socket.socket) -> str:
    """One line, and not a byte more: what follows is for ssh."""
    line = b""
    while len(line) < MAX_ANSWER:
        seen = sock.recv(MAX_ANSWER, socket.MSG_PEEK)
        end = seen.find(b"\n") + 1
        taken = sock.recv(end or len(seen))
        line += taken
        if end or not taken:
            break
    return line.decode("utf-8", "replace").strip()


def proxy(
    *,
    host: str,
    token: str | None,
    ssh_proxy: str,
    ca_file: str | None,
    task: str,
    pass_socket: bool,
    known: bool = False,
    direct: bool = False,
) -> None:
    """Connect stdin and stdout to the task's SSH server, or with `pass_socket` hand ssh a socket that leads there.

    The connection goes on when what lies between went and came back, by a process that stays for that; a `direct` one
    goes by the host's SSH proxy and needs none. With `known` the host is not asked for the task first: ssh knows the
    host key already. Raises KohakuRiverError.
    """
    if not direct:
        from kohakuriver.cli import ssh_kept
        from kohakuriver.config import load_settings

        if not known:
            _learn_host_keys(host, task, token, ca_file)
        first, *others = host.split(",")
        settings = replace(load_settings(), host=first, other_hosts=tuple(others), token=token, ca_file=ca_file)
        if pass_socket:
            ssh_kept.hand_over(task, settings, _pass_to_parent)
        else:
            ssh_kept.between_pipes(task, settings)
        return
    dialling = _Dialling(lambda: dial(ssh_proxy, task, to_show(host, task, token, ca_file)))
    if not known:
        try:
            _learn_host_keys(host, task, token, ca_file)
        except HostUnreachableError:
            pass  # it may be that only the proxy can be reached from here: ssh checks what it knows already
        except KohakuRiverError:
            dialling.forget()
            raise
    sock = dialling.result()
    if pass_socket:
        _pass_to_parent(sock)
    else:
        relay(sock)


class _Dialling(threading.Thread):
    """`dial`, while something else is done. What it raises is raised by `result`."""

    def __init__(self, dial: Callable[[], socket.socket]) -> None:
        super().__init__(daemon=True)
        self._dial = dial
        self._result: socket.socket | BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._dial()
        except BaseException as error:
            self._result = error

    def result(self) -> socket.socket:
        joined(self)
        if isinstance(self._result, BaseException):
            raise self._result
        assert self._result is not None
        return self._result

    def forget(self) -> None:
        """Whatever comes of it is of no use any more."""
        joined(self)
        if isinstance(self._result, socket.socket):
            self._result.close()


def _learn_host_keys(host: str, task: str, token: str | None, ca_file: str | None) -> None:
    """Ask the host for the task's host keys and write them down. Raises KohakuRiverError, also when it does not run."""
    from kohakuriver.cli.ssh_files import learn_host_keys, prepare

    prepare()  # ssh writes down a host key that nobody told it, where it finds the directory
    found = _ask(host, _path(task), token, ca_file)
    keys = [str(key) for name in ("ssh_host_key", "ssh_host_key_ecdsa") if (key := found.get(name))]
    if keys:
        learn_host_keys(int(found["task_id"]), str(found["name"]), keys)


def _path(task: str) -> str:
    from kohakuriver.config import path_segment

    return f"/api/tasks/{path_segment(task)}"


def _ask(hosts: str, path: str, token: str | None, ca_file: str | None, *, method: str = "GET") -> dict[str, Any]:
    return _of_first(hosts, lambda host: _ask_one(host, path, token, ca_file, method))


def _ask_one(host: str, path: str, token: str | None, ca_file: str | None, method: str) -> dict[str, Any]:
    parts = urlsplit(host)
    connection = http.client.HTTPConnection(parts.netloc, timeout=ANSWER_SECONDS)
    trusted = None
    if parts.scheme == "https":
        from kohakuriver.tls import client_context, reason

        trusted = client_context(host, ca_file)
        connection = http.client.HTTPSConnection(parts.netloc, timeout=ANSWER_SECONDS, context=trusted)
    try:
        with contextlib.closing(connection), resolving():
            sock = _connect(host, connection.host, connection.port)
            connection.sock = trusted.wrap_socket(sock, server_hostname=connection.host) if trusted else sock
            connection.request(method, parts.path + path, headers={"Authorization": f"Bearer {token}"} if token else {})
            answer = connection.getresponse()
            body = answer.read(LONGEST_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        why = (reason(error) if parts.scheme == "https" else None) or _plainly(error, host)
        raise HostUnreachableError(f"The host at {host} can't be reached: {why}.", url=host) from error
    if answer.status not in (200, 201):
        raise from_answer(host, answer.status, body, location=answer.getheader("location", ""))
    try:
        found = json_of(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise from_answer(host, answer.status, body)
    return found


def _plainly(error: Exception, host: str) -> str:
    if isinstance(error, http.client.RemoteDisconnected):
        from kohakuriver.tls import hung_up

        return hung_up(host)
    return getattr(error, "strerror", None) or str(error)


def _pass_to_parent(sock: socket.socket) -> None:
    """Hand the connection to ssh, which waits for it at our stdout: from then on we are not in its way."""
    try:
        with socket.socket(fileno=os.dup(1)) as parent:
            socket.send_fds(parent, [b"\0"], [sock.fileno()])
    except (OSError, AttributeError) as error:
        raise UsageError(
            "--pass-socket is for ssh, with `ProxyUseFdpass yes`; leave it out to use stdin and stdout."
        ) from error


def relay(sock: socket.socket) -> None:
    """Copy both ways until the task's side ends."""

    def send() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(0, PIECE):
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

    threading.Thread(target=send, daemon=True).start()
    buffer = memoryview(bytearray(PIECE))
    with contextlib.suppress(OSError):
        while count := sock.recv_into(buffer):
            written = 0
            while written < count:
                written += os.write(1, buffer[written:count])


def _settings() -> tuple[str, str | None, str, str | None]:
    """Hosts, token, SSH proxies and CA file. Where the environment has all that, nothing is looked up."""
    host, token, ssh_proxy, ca_file = (
        os.environ.get(f"KOHAKURIVER_{name}", "") for name in ("HOST", "TOKEN", "SSH_PROXY", "CA_FILE")
    )
    plain = f"{host}{token}{ssh_proxy}{ca_file}".isprintable() and " " not in token  # else it is told what is wrong
    hosts = [each.rstrip("/") for each in host.split(",")]
    known = all(each.startswith("http://") or (each.startswith("https://") and ca_file) for each in hosts)
    if plain and token and ssh_proxy and known:
        return ",".join(hosts), token, ssh_proxy, ca_file or None
    from kohakuriver.config import load_settings

    settings = load_settings()
    return settings.named, settings.token, settings.ssh_proxy, settings.ca_file


def main(arguments: list[str]) -> int:
    """`[--pass-socket] [--known] [--direct] HOST_NAME`: what ssh runs; the exit code."""
    try:
        host, token, ssh_proxy, ca_file = _settings()
        proxy(
            host=host,
            token=token,
            ssh_proxy=ssh_proxy,
            ca_file=ca_file,
            task=task_of(arguments[-1]),
            pass_socket="--pass-socket" in arguments[:-1],
            known="--known" in arguments[:-1],
            direct="--direct" in arguments[:-1],
        )
    except KohakuRiverError as error:
        with contextlib.suppress(OSError):
            print(f"Error: {printable(error.message)}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:  # as where host keys can't be written down: then ssh must not go on
        with contextlib.suppress(OSError):
            where = f"{error.filename}: " if error.filename else ""
            print(f"Error: {printable(f'{where}{error.strerror or error}')}.", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    prepare()
    code = main(sys.argv[1:])
    os._exit(code)  # a thread may still wait for stdin, which nobody reads any more
