"""Programs of ours that a process which has all of their modules already makes of itself.

Half a second to one and a half of each start is Python's work at imports, the same each time, and the suite starts
hundreds of programs. They are processes of their own all the same: number, parent, descriptors, environment, signals,
command line, exit code and the end of the interpreter are those of any other. `up` and `demo` start their host and
runner in the same way. What is about a program's beginning (closed descriptors, locale, limits, `nohup`) starts it
anew, and with KOHAKURIVER_TEST_FORKS=0 everything does.

    python -m tests.support.forked NUMBER ROOM    (of a socket, and for command lines; started by this module)
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, AnyStr

__all__ = ["PROGRAM", "Forked", "Started", "run", "start", "template"]

PROGRAM = [sys.executable, "-m", "kohakuriver"]

# What the interpreter itself goes by, at its start alone.
_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "ASAN_", "UBSAN_", "TZ")
_MESSAGE = 1 << 20
_ROOM = 1 << 13
_SET_CHILD_SUBREAPER = 36  # of prctl(2)


class Forked:
    """A program, as `subprocess.Popen` would have it. For `with`, too."""

    def __init__(self, pid: int, pipes: Sequence[IO[Any] | None]) -> None:
        self.pid = pid
        self.stdin, self.stdout, self.stderr = pipes
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)  # the process stays until its exit code was asked for
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit code, if it has ended; minus the number of the signal that ended it."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit code. Raises subprocess.TimeoutExpired."""
        code = self._ended(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is not None:
            return self.returncode
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            return None
        with self._lock:
            if self.returncode is None:
                self.returncode = _template().exit_code(self.pid)
                os.close(self._descriptor)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        self.wait()


Started = Forked | subprocess.Popen[Any]


def start(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
    text: bool = True,
) -> Started:
    """Start `kohakuriver ARGUMENTS…`; `text` or bytes go through its pipes."""
    if not _can_be_forked(env):
        return subprocess.Popen([*PROGRAM, *arguments], stdin=stdin, stdout=stdout, stderr=stderr, env=env, text=text)
    with contextlib.ExitStack() as theirs:
        pipes: list[IO[Any] | None] = []
        descriptors = []
        for wanted, mode in ((stdin, "w"), (stdout, "r"), (stderr, "r")):
            descriptor, pipe = _descriptor(wanted, mode if text else f"{mode}b")
            if isinstance(wanted, int):
                theirs.callback(os.close, descriptor)
            descriptors.append(descriptor)
            pipes.append(pipe)
        return Forked(_template().start(arguments, env, descriptors), pipes)


def run(
    arguments: Sequence[str], *, env: Mapping[str, str], stdin: AnyStr, timeout: float
) -> subprocess.CompletedProcess[AnyStr]:
    """Run `kohakuriver ARGUMENTS…` to its end, given `stdin`; it says text, or bytes, as that is.

    Raises subprocess.TimeoutExpired.
    """
    program = start(arguments, env=env, stdin=subprocess.PIPE, text=isinstance(stdin, str))
    if isinstance(program, subprocess.Popen):
        with program:
            out, err = program.communicate(stdin, timeout)
    else:
        with program:
            out, err = _talk(program, stdin, timeout)
    assert program.returncode is not None
    return subprocess.CompletedProcess([*PROGRAM, *arguments], program.returncode, out, err)


def _talk(program: Forked, stdin: AnyStr, timeout: float) -> tuple[AnyStr, AnyStr]:
    said: dict[str, AnyStr] = {}

    def read(name: str, stream: IO[AnyStr] | None) -> None:
        assert stream is not None
        said[name] = stream.read()

    def write() -> None:
        assert program.stdin is not None
        with contextlib.suppress(BrokenPipeError), program.stdin as pipe:
            pipe.write(stdin)

    threads = [
        threading.Thread(target=read, args=("out", program.stdout)),
        threading.Thread(target=read, args=("err", program.stderr)),
        threading.Thread(target=write),
    ]
    for thread in threads:
        thread.start()
    try:
        program.wait(timeout)
    except subprocess.TimeoutExpired:
        program.kill()
        raise
    finally:
        for thread in threads:
            thread.join(timeout)
    return said["out"], said["err"]


def _can_be_forked(env: Mapping[str, str]) -> bool:
    def at_start(variables: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in variables.items() if name.startswith(_AT_START)}

    wanted = os.environ.get("KOHAKURIVER_TEST_FORKS") != "0"
    return wanted and hasattr(os, "pidfd_open") and at_start(env) == at_start(os.environ)


def _descriptor(wanted: int | IO[bytes], mode: str) -> tuple[int, IO[Any] | None]:
    """The program's descriptor, and our end of it where that is a pipe."""
    if not isinstance(wanted, int):
        return wanted.fileno(), None
    if wanted == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDWR), None
    assert wanted == subprocess.PIPE
    reading, writing = os.pipe()
    theirs, ours = (reading, writing) if mode.startswith("w") else (writing, reading)
    return theirs, os.fdopen(ours, mode)


def template() -> int:
    """The number of the process that programs are made of."""
    return _template().pid


class _Template:
    """The process that programs are made of; it ends with this one."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            command = [sys.executable, "-m", "tests.support.forked", str(theirs.fileno()), "-" * _ROOM]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, arguments: Sequence[str], env: Mapping[str, str], descriptors: Sequence[int]) -> int:
        """The number of the new process."""
        return _asked(self._channel, self._lock, _order(arguments, env, os.getcwd()), descriptors)  # noqa: PTH109

    def exit_code(self, pid: int) -> int:
        """Of a process that has ended."""
        return _asked(self._channel, self._lock, {"ended": pid})

    def end(self) -> None:
        self._channel.close()
        self._process.wait()


def _order(arguments: Sequence[str], env: Mapping[str, str], directory: str, *, apart: bool = False) -> dict[str, Any]:
    return {"arguments": list(arguments), "env": dict(env), "directory": directory, "apart": apart}


def _asked(
    channel: socket.socket,
    lock: contextlib.AbstractContextManager[Any],
    order: dict[str, Any],
    descriptors: Sequence[int] = (),
) -> int:
    with lock:
        socket.send_fds(channel, [json.dumps(order).encode()], descriptors)
        answer: int = json.loads(channel.recv(_MESSAGE))
        return answer


@functools.cache
def _template() -> _Template:
    import atexit

    template = _Template()
    atexit.register(template.end)
    return template


def _serve(channel: socket.socket, fork: Callable[[], int] = os.fork) -> bool:
    """Make programs until nobody asks for any more, and False then; True in each new program."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE, 3)
        if not message:
            return False
        order = json.loads(message)
        if "ended" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["ended"], 0)[1])
        else:
            answer = fork()
            if answer == 0:
                channel.close()
                _become(order, descriptors)
                return True
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(json.dumps(answer).encode())


def _become(order: dict[str, Any], descriptors: Sequence[int]) -> None:
    """The descriptors, variables and arguments that the new program was given, and nothing else of this one."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, 1024)
    if order["apart"]:
        os.setsid()
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[:] = [sys.argv[0], *order["arguments"]]
    _show([*PROGRAM, *order["arguments"]])
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        errors = "backslashreplace" if name == "stderr" else None
        stream = open(number, mode, closefd=False, errors=errors, buffering=1 if name == "stderr" else -1)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _show(command: Sequence[str]) -> None:
    """Have this process's command line be that, as far as there is room for it."""
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123
        start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])
    assert end - start > _ROOM
    line = b"".join(os.fsencode(word) + b"\0" for word in command)
    ctypes.memmove(start, line[: end - start].ljust(end - start, b"\0"), end - start)


def _bring_a_template() -> None:
    """Before this program does anything, a process is made of it which makes the programs that it will start.

    Returns in each of these, too. Forked by the program itself they would have what its event loop has in C.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        start = asyncio.create_subprocess_exec

        async def fork_ours(*command: Any, **how: Any) -> Any:
            if list(command[:3]) != PROGRAM:
                return await start(*command, **how)
            return await _Begun.of(command[3:], ours, **how)

        setattr(asyncio, "create_subprocess_exec", fork_ours)  # noqa: B010
        return
    ours.close()
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.close(nothing)
    if not _serve(theirs, _fork_for_parent):
        os._exit(0)


def _fork_for_parent() -> int:
    """Fork, and leave the new process to this one's parent, which just then takes in whatever is orphaned below it."""
    reads, writes = os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid == 0:
            return 0
        os.write(writes, str(pid).encode())
        os._exit(0)
    os.waitpid(between, 0)
    pid = int(os.read(reads, 100))
    os.close(reads)
    os.close(writes)
    return pid


class _Begun:
    """A child of this process, as far as asyncio.subprocess.Process is used for programs of ours."""

    def __init__(self, pid: int, stdin: IO[bytes], stdout: asyncio.StreamReader) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[int] = self._loop.create_future()
        self._descriptor = os.pidfd_open(pid)
        self._loop.add_reader(self._descriptor, self._ended)

    @classmethod
    async def of(
        cls, arguments: Sequence[str], channel: socket.socket, *, cwd: Any, stdin: int, stdout: int, **how: Any
    ) -> _Begun:
        assert (stdin, stdout, how) == (subprocess.PIPE, subprocess.PIPE, {"start_new_session": True})
        order = _order(arguments, os.environ, str(cwd), apart=True)
        (reads, ours), (its, writes) = os.pipe(), os.pipe()
        prctl = ctypes.CDLL(None).prctl
        prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        pid = _asked(channel, contextlib.nullcontext(), order, [reads, writes, 2])
        prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        os.close(reads)
        os.close(writes)
        said = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), os.fdopen(its, "rb", 0))
        return cls(pid, os.fdopen(ours, "wb", 0), said)

    def _ended(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._end.set_result(self.returncode)

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    def send_signal(self, number: int) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# What programs import later, at the first thing that they are asked: whoever forks with it there does not pay for it.
_LATER = (
    *("anyio._backends._asyncio", "certifi", "encodings.idna", "httpcore", "platformdirs.unix", "resource", "sqlite3"),
    *("sqlalchemy.dialects.sqlite", "typer._click.decorators", "uvicorn.lifespan.off"),
    *("uvicorn.protocols.http.httptools_impl", "uvloop"),
)


def _load() -> None:
    """What programs import and build at their start, or at the first thing that they are asked."""
    for name in ("kohakuriver.host", "kohakuriver.runner", "kohakuriver.client", "kohakuriver.cli"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith(("terminal_child", "__main__")):
                importlib.import_module(module.name)
    for name in _LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    importlib.import_module("kohakuriver.cli.main").command()
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever runs the tests
    _load()
    if _serve(socket.socket(fileno=int(sys.argv[1]))):
        if sys.argv[1:2] in (["up"], ["demo"]):
            _bring_a_template()
        importlib.import_module("kohakuriver.__main__").main()
