"""Vectors of what endpoints decide: windows, states, reconnecting, the texts of errors. README.md has their formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.reference.windows import Budget, Window

Vector = dict[str, Any]
Step = tuple[Any, ...]

KIB, MIB = 1 << 10, 1 << 20


# -- windows ------------------------------------------------------------------------------------------------------


def burst(stream: int, size: int, read: int, at: int) -> list[Step]:
    """`size` bytes that arrive in reads of `read` bytes and are consumed at once."""
    sizes = [read] * (size // read) + ([size % read] if size % read else [])
    return [step for each in sizes for step in (("recv", stream, each, at), ("consume", stream, each))]


def round_trips(count: int, every: int, size: int, read: int) -> list[Step]:
    """One burst each `every` µs on stream 1; a PONG comes right before each but the first."""
    steps = [("open", 1), *burst(1, size, read, 0)]
    for number in range(1, count):
        steps += [("pong", 1, number * every), *burst(1, size, read, number * every)]
    return steps


def windows() -> list[Vector]:
    plenty = (64 * MIB, 256 * KIB, 16 * MIB)
    cases: list[tuple[str, tuple[int, int, int], list[Step]]] = [
        (
            "credit is announced a quarter of the window at a time",
            plenty,
            [("open", 1), ("recv", 1, 100_000, 0), ("consume", 1, 65_535), ("consume", 1, 1), ("consume", 1, 34_464)],
        ),
        ("bytes past the limit are a violation", plenty, [("open", 1), ("recv", 1, 256 * KIB, 0), ("recv", 1, 1, 0)]),
        (
            "early data is allowed whatever the budget left",
            (0, 256 * KIB, 16 * MIB),
            [("open", 1), ("recv", 1, 64 * KIB, 0), ("recv", 1, 1, 0)],
        ),
        (
            "early data that was consumed past a small limit leaves the limit behind until it is announced",
            (0, 256 * KIB, 16 * MIB),
            [("open", 1), ("recv", 1, 64 * KIB, 0), ("consume", 1, 1023), ("consume", 1, 1), ("consume", 1, 64_512)],
        ),
        (
            "the least window is given to every stream, and the budget never goes below zero",
            (8 * KIB, 256 * KIB, 16 * MIB),
            [*(("open", n) for n in range(1, 6)), *(("close", n) for n in range(1, 6)), ("open", 6)],
        ),
        (
            "a rest of the budget below the least window is not lost",
            (256 * KIB + 100, 256 * KIB, 16 * MIB),
            [("open", 1), ("open", 2), ("close", 2), ("close", 2), ("close", 1)],
        ),
        (
            "a window that grew is announced, however little that is",
            (300_000, 256 * KIB, 16 * MIB),
            [("open", 1), *burst(1, 192 * KIB, 64 * KIB, 0), ("pong", 1, 1000)],
        ),
        (
            "a window grows while round trips fill it, as far as the budget lasts",
            (256 * KIB + MIB, 256 * KIB, 16 * MIB),
            round_trips(8, 20_000, 256 * KIB, 64 * KIB),
        ),
        ("a window grows to its cap", (64 * MIB, 64 * KIB, 256 * KIB), round_trips(8, 30_000, 192 * KIB, 16 * KIB)),
        (
            "a sample that does not fill the window makes it stay, and PINGs rarer",
            plenty,
            round_trips(40, 50_000, 40_000, 10_000),
        ),
        ("one PING at a time", plenty, [("open", 1), *(("recv", 1, 80_000, n) for n in range(3)), ("pong", 1, 9)]),
        ("a PONG that was not asked for changes nothing", plenty, [("open", 1), ("recv", 1, 1000, 0), ("pong", 1, 5)]),
        (
            "a window that ended goes back to the others",
            (600_000, 256 * KIB, 16 * MIB),
            [*(("open", n) for n in range(1, 6)), ("close", 1), ("close", 3), ("open", 7), ("open", 8)],
        ),
        ("while others receive too, less than the window is in force", plenty, shared()),
        ("users near and far share a container's link", plenty, near_and_far()),
        ("while several receive, all have the same in force, and who has less grows", plenty, shared_by_two()),
        (
            "without a link a window is the others', and of what they left there is another",
            (600_000, 256 * KIB, 16 * MIB),
            gone_for_a_while(),
        ),
    ]
    return [{"name": name, **play(budget, steps)} for name, budget, steps in cases]


def gone_for_a_while() -> list[Step]:
    return [
        *[("open", 1), ("recv", 1, 50_000, 0), ("consume", 1, 10_000), ("open", 2), ("detach", 1), ("open", 3)],
        *[("attach", 1), ("detach", 1), ("open", 4), ("attach", 1), ("detach", 1)],
        *[("close", 2), ("attach", 1), ("consume", 1, 40_000), ("close", 1), ("close", 3), ("close", 4)],
    ]


def shared() -> list[Step]:
    steps: list[Step] = [("open", 1)]
    for number in range(10):
        steps += [*burst(1, 250_000, 50_000, number * 400), ("pong", 1, number * 400 + 301)]
    steps += [("shared", True), *burst(1, 1_000_000, 50_000, 5000), ("shared", False), *burst(1, 1000, 1000, 6000)]
    return steps


def shared_by_two() -> list[Step]:
    """Over a long link, 1 alone for a while, and so with the wider window; then 1 and 2 by turns."""
    steps: list[Step] = [("open", 1), ("open", 2)]
    for number, size in enumerate([200, 200, 400, 400, 800, 800, 1600, 1600]):
        steps += [*burst(1, size * 1000, 50_000, number * 50_000), ("pong", 1, number * 50_000 + 49_000)]
    steps += [("shared", True)]
    for number, size in enumerate([200, 200, 400, 400, 800, 800, 1200, 1200], 8):
        steps += [*burst(2, size * 1000, 50_000, number * 50_000), ("pong", 2, number * 50_000 + 49_000)]
        steps += [*burst(1, 900_000, 50_000, number * 50_000), ("pong", 1, number * 50_000 + 49_500)]
    return steps


def near_and_far() -> list[Step]:
    """What one opener's round trips are says nothing of another's: 1 is near, 2 and 3 are one far one's."""
    steps: list[Step] = [("open", 1, 1), ("open", 2, 2), ("open", 3, 2), ("shared", True)]
    for number, size in enumerate([200, 200, 400, 400, 800, 800, 1600, 1600]):
        at = number * 100_000
        steps += [*burst(1, 200_000, 50_000, at), ("pong", 1, at + 400)]
        for stream in (2, 3):
            steps += [*burst(stream, size * 1000, 50_000, at), ("pong", stream, at + 99_000)]
    return steps


def play(settings: tuple[int, int, int], steps: list[Step]) -> Vector:
    """The budget and the events, each with what it leads to; a violation is the last one."""
    budget = Budget(*settings)
    streams: dict[int, Window] = {}
    events: list[Vector] = []
    for do, *about in steps:
        event: Vector = {"do": do}
        if do == "shared":
            budget.shared = event["value"] = about[0]
        else:
            event["stream"] = about[0]
            event |= act(budget, streams, do, *about)
        events.append(event | {"left": budget.left})
        if event.get("ok") is False:
            break
    return {**dict(zip(("total", "first", "cap"), settings, strict=True)), "events": events}


def act(budget: Budget, streams: dict[int, Window], do: str, stream: int, *about: int) -> Vector:
    if do == "open":
        streams[stream] = Window(budget, *about)
        return {"opener": about[0] if about else 0, "limit": streams[stream].granted}
    window = streams[stream]
    if do == "recv":
        ok, ping = window.receive(*about)
        return {"size": about[0], "at": about[1], "ok": ok, "ping": ping}
    if do == "consume":
        return {"size": about[0], "limit": window.consume(*about)}
    if do == "pong":
        return {"at": about[0], "limit": window.pong(*about)}
    if do == "attach":
        return {"limit": window.attach()}
    window.close()
    return {}


# -- states -------------------------------------------------------------------------------------------------------

ALIVE = ["opening", "opening_local_ended", "opening_remote_ended", "open", "local_ended", "remote_ended"]
Row = tuple[str, str, str, list[str]]

OPENING: list[Row] = [
    ("opening", "established", "open", []),
    ("opening_local_ended", "established", "local_ended", []),
    ("opening_remote_ended", "established", "remote_ended", []),
]
WAITING: list[Row] = [
    ("waiting", "link", "opening", ["send_connect"]),
    ("waiting", "link_lost", "over", ["reset_local"]),
    ("waiting", "local_closed", "over", []),
    ("waiting", "local_error", "over", ["reset_local"]),
]
BOTH: list[Row] = [
    *((state, "local_closed", "over", ["send_close"]) for state in ALIVE),
    *((state, "local_error", "over", ["send_error", "reset_local"]) for state in ALIVE),
    *((state, "link_lost", "over", ["reset_local"]) for state in ALIVE),
    ("delivering", "local_closed", "over", []),
    ("delivering", "local_error", "over", ["reset_local"]),
]
V2: list[Row] = [
    ("opening", "local_eof", "opening_local_ended", ["send_eof"]),
    ("opening", "remote_eof", "opening_remote_ended", ["shut_local"]),
    ("open", "local_eof", "local_ended", ["send_eof"]),
    ("open", "remote_eof", "remote_ended", ["shut_local"]),
    ("local_ended", "remote_eof", "delivering", ["close_local"]),
    ("remote_ended", "local_eof", "delivering", ["send_eof", "close_local"]),
    *((state, "remote_close", "delivering", ["close_local"]) for state in ALIVE),
    *((state, "remote_error", "over", ["reset_local"]) for state in ALIVE),
]
V1: list[Row] = [
    ("opening", "local_eof", "opening_local_ended", ["linger"]),
    ("open", "local_eof", "local_ended", ["linger"]),
    *((state, "remote_close", "delivering", ["send_close", "close_local"]) for state in ALIVE),
    *((state, "remote_error", "over", ["send_close", "reset_local"]) for state in ALIVE),
]
V1_OPENER: list[Row] = [
    ("opening_local_ended", "linger_over", "half_closed", ["send_close", "linger"]),
    ("local_ended", "linger_over", "half_closed", ["send_close", "linger"]),
    ("half_closed", "linger_over", "delivering", ["send_close", "close_local"]),
    ("half_closed", "remote_close", "delivering", ["close_local"]),
    ("half_closed", "remote_error", "over", ["reset_local"]),
    ("half_closed", "local_closed", "over", ["send_close"]),
    ("half_closed", "local_error", "over", ["send_error", "reset_local"]),
    ("half_closed", "link_lost", "over", ["reset_local"]),
]
V1_ACCEPTOR: list[Row] = [("local_ended", "linger_over", "delivering", ["send_close", "close_local"])]

# No v1 stream ever gets there: its peer has no EOF.
NOT_V1 = {"opening_remote_ended", "remote_ended"}
# No acceptor ever gets there: it reads nothing from its service before the dial has succeeded.
NOT_ACCEPTOR = {"opening_local_ended"}


def states() -> list[Vector]:
    return [
        {"version": version, "role": role, "state": state, "event": event, "to": to, "actions": actions}
        for version in (2, 1)
        for role in ("opener", "acceptor")
        for state, event, to, actions in rows(version, role)
    ]


def rows(version: int, role: str) -> Iterator[Row]:
    acceptor = role == "acceptor"
    own = V2 if version == 2 else [*V1, *(V1_ACCEPTOR if acceptor else V1_OPENER)]
    for state, event, to, actions in [*([] if acceptor else WAITING), *OPENING, *BOTH, *own]:
        if (version == 1 and state in NOT_V1) or (acceptor and state in NOT_ACCEPTOR):
            continue
        answers = event == "established" and acceptor
        yield state, event, to, ["send_connected"] if answers else actions


# What a kept stream does instead: it is over when its acceptor says so.
KEPT_INSTEAD: list[Row] = [
    ("remote_ended", "local_eof", "ended", ["send_eof", "close_local"]),
    ("ended", "remote_close", "delivering", []),
    ("ended", "remote_error", "over", ["reset_local"]),
    ("ended", "link_lost", "over", ["reset_local"]),
]
KEPT_OPENER: list[Row] = [("local_ended", "remote_eof", "ended", ["send_ack", "close_local"])]
KEPT_ACCEPTOR: list[Row] = [
    ("local_ended", "remote_eof", "ended", ["close_local"]),
    ("ended", "acked", "delivering", ["send_close"]),
]


def kept_states() -> list[Vector]:
    out = []
    for role, own in (("opener", KEPT_OPENER), ("acceptor", KEPT_ACCEPTOR)):
        instead = [*KEPT_INSTEAD, *own]
        changed = {(state, event) for state, event, _, _ in instead}
        for state, event, to, actions in [*(row for row in rows(2, role) if row[:2] not in changed), *instead]:
            out.append({"role": role, "state": state, "event": event, "to": to, "actions": actions})
    return out


# -- reconnecting of a tunnel client ------------------------------------------------------------------------------


def reconnect() -> list[Vector]:
    at_once, soon, later, longest = (0.0, 0.0), (0.0, 0.1), (0.0, 0.4), (0.0, 5.0)
    soonest, refused = (0.0, 0.5), (15.0, 30.0)
    cases: list[tuple[str, Vector, Vector]] = [
        ("the first failure", {}, {"pause": soon, "failures": 1}),
        ("pauses double", {"failures": 2}, {"pause": later, "failures": 3}),
        ("pauses double up to half a second", {"failures": 8}, {"pause": soonest, "failures": 9}),
        ("they stay there for a minute or so", {"failures": 239}, {"pause": soonest, "failures": 240}),
        ("pauses double further up to the longest", {"failures": 241}, {"pause": (0.0, 2.0), "failures": 242}),
        ("the longest that they get", {"failures": 290}, {"pause": longest, "failures": 291}),
        ("the longest is a setting", {"failures": 290, "delay": 1.5}, {"pause": (0.0, 1.5), "failures": 291}),
        ("the longest may be short", {"failures": 8, "delay": 0.3}, {"pause": (0.0, 0.3), "failures": 9}),
        ("a runner that answers and refuses", {"failures": 8, "code": 503}, {"pause": longest, "failures": 9}),
        ("a tunnel that lived for a second was a good one", {"failures": 7, "lived": 1.0, "code": 1001},
         {"pause": at_once, "failures": 0}),
        ("one that lived for less is a failure", {"failures": 2, "lived": 0.9, "code": 1006},
         {"pause": later, "failures": 3}),
        ("wrong credentials", {"code": 401}, {"pause": refused, "failures": 1}),
        ("not allowed", {"code": 403, "failures": 5}, {"pause": refused, "failures": 6}),
        ("a runner that is busy", {"code": 503, "failures": 2}, {"pause": later, "failures": 3}),
        ("replaced by another client", {"lived": 1.0, "code": 4000}, {"end": "replaced", "exit": 0}),
        ("replaced, as a container's first process", {"lived": 0.9, "code": 4000, "mode": "run"},
         {"pause": refused, "failures": 1}),
        ("replaced after long, as a container's first process", {"lived": 3600.0, "code": 4000, "mode": "run"},
         {"pause": refused, "failures": 0}),
        ("the last attempt that is allowed", {"max": 3, "failures": 2}, {"end": "gave_up", "exit": 1}),
        ("the last but one", {"max": 3, "failures": 1}, {"pause": (0.0, 0.2), "failures": 2}),
        ("a good tunnel counts no failures", {"max": 1, "lived": 60.0, "code": 1006},
         {"pause": at_once, "failures": 0}),
    ]  # fmt: skip
    default: Vector = {"mode": "serve", "failures": 0, "lived": None, "code": None, "max": 0, "delay": 5.0}
    return [{"name": name, **default, **before, "then": then} for name, before, then in cases]


# -- texts of errors ----------------------------------------------------------------------------------------------


def errors() -> list[Vector]:
    port, where = 8080, "in the task"
    texts = [
        ("ECONNREFUSED", f"ECONNREFUSED: nothing listens on port {port} {where}"),
        ("ETIMEDOUT", f"ETIMEDOUT: port {port} {where} did not answer"),
        ("ECONNRESET", "ECONNRESET: the service reset the connection"),
        ("EPIPE", "EPIPE: the service closed the connection"),
        ("EMFILE", "EMFILE: this end of the tunnel has too many open files"),
        ("ENFILE", "ENFILE: the node has too many open files"),
        ("EHOSTUNREACH", f"EHOSTUNREACH: there is no route to port {port} {where}"),
        ("ENETUNREACH", f"ENETUNREACH: there is no network to reach port {port} {where}"),
        ("EADDRNOTAVAIL", f"EADDRNOTAVAIL: no local port is free to reach port {port} {where} from"),
        ("EPROTO", "EPROTO: more was sent than the window allows"),
        ("EPROTONOSUPPORT", "EPROTONOSUPPORT: only TCP and UDP are carried"),
        ("ENOBUFS", "ENOBUFS: the node is out of memory"),
        ("ENOMEM", "ENOBUFS: the node is out of memory"),
        ("EACCES", f"EIO: port {port} {where} can't be reached: Permission denied"),
        ("ENOTDIR", f"EIO: port {port} {where} can't be reached: Not a directory"),
    ]
    return [{"errno": name, "port": port, "text": text} for name, text in texts]
