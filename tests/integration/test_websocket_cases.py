"""The cases of the Autobahn test suite that apply to us, against a real host and a real runner (docs/websocket.md).

Numbers in the comments are the suite's. Where it has a message echoed, a PING message of the session is: its payload
comes back in a PONG, from the runner, and on a session of the host through the host's splice in both directions.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator

import pytest

from kohakuriver.tunnel.protocol import DATA, PING, PONG
from tests.support.peers.attackers import attackers_own
from tests.support.peers.wire import (
    BINARY,
    CLOSE,
    CONTINUATION,
    SAME_CLIENT,
    TEXT,
    WS_PING,
    WS_PONG,
    Target,
    Wire,
    frame,
    session,
    tunnel,
)
from tests.support.processes import Cluster, a_cluster

FIN = 0x80
MIB = 1 << 20
VALID_CODES = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999]
INVALID_CODES = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


@pytest.fixture(scope="module")
def target(cluster: Cluster) -> Iterator[Target]:
    with attackers_own(cluster, "n1") as target:
        yield target


@pytest.fixture(params=[session, tunnel], ids=["host", "runner"])
def wire(request: pytest.FixtureRequest, target: Target) -> Iterator[Wire]:
    """A user's session at the host, or a container's tunnel at the runner."""
    opened: Callable[[Target], Wire] = request.param
    with opened(target) as wire:
        yield wire


def message(payload: bytes = b"", kind: int = PING, client_id: int = 0) -> bytes:
    """A tunnel message."""
    return struct.pack(">BBIH", kind, 0, client_id, 0) + payload


def answers(wire: Wire, *payloads: bytes) -> None:
    """Wait for the answers to PINGs with these payloads, and nothing else."""
    for payload in payloads:
        assert wire.receive() == (FIN | BINARY, message(payload, PONG))


def lives(wire: Wire) -> None:
    """Show that the WebSocket is as good as new."""
    wire.send(frame(BINARY, message(b"alive")))
    answers(wire, b"alive")


def closes(wire: Wire, payload: bytes = b"\x03\xe8") -> None:
    """Close it in good order: the answer has the same code, and then the TCP connection ends."""
    wire.send(frame(CLOSE, payload))
    first, answer = wire.receive()
    assert (first, answer[:2]) == (FIN | CLOSE, payload[:2])
    assert wire.ended()


def refused(wire: Wire, code: int) -> None:
    """Wait for a close frame with this code and a reason, and the end."""
    first, payload = wire.receive()
    assert (first, int.from_bytes(payload[:2], "big")) == (FIN | CLOSE, code)
    assert payload[2:].decode()
    wire.sock.shutdown(1)
    assert wire.ended()


def chopped(wire: Wire, data: bytes, size: int) -> None:
    """Send with one TCP segment for each piece, as far as that is ours to say."""
    for at in range(0, len(data), size):
        wire.send(data[at : at + size])


# ---- 1: framing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 117, 118, 119, 120, 65_527, 65_528, MIB - 8])
def test_binary_messages_of_every_length_form_come_back(wire: Wire, size: int) -> None:
    """1.2.1 to 1.2.7; their sizes are less our header."""
    payload = bytes([0xFE]) * size
    wire.send(frame(BINARY, message(payload)))
    answers(wire, payload)
    closes(wire)


@pytest.mark.parametrize("size", [1, 997])
def test_a_message_in_small_tcp_segments_comes_back(wire: Wire, size: int) -> None:
    """1.2.8, and in single bytes."""
    payload = bytes([0xFE]) * (65_528 if size > 1 else 300)
    chopped(wire, frame(BINARY, message(payload)), size)
    answers(wire, payload)
    closes(wire)


@pytest.mark.parametrize("text", [b"", b"hello", b"\xce\xba\xe1\xbd\xb9", b"\xff", b"x" * 70_000])
@pytest.mark.parametrize("fin", [True, False])
def test_text_is_refused_with_1003(wire: Wire, text: bytes, fin: bool) -> None:
    """In place of 1.1 and 6: text of whatever length, encoding and fragmentation has no place here."""
    wire.send(frame(TEXT, text, fin=fin))
    refused(wire, 1003)


@pytest.mark.parametrize("size", range(8))
def test_a_message_shorter_than_its_header_is_refused(wire: Wire, size: int) -> None:
    wire.send(frame(BINARY, bytes(size)))
    refused(wire, 1002)


def test_an_unmasked_frame_is_refused(wire: Wire) -> None:
    wire.send(frame(BINARY, message(), masked=False))
    refused(wire, 1002)


@pytest.mark.parametrize(
    ("opcode", "size", "form"), [(BINARY, 8, 2), (BINARY, 8, 8), (BINARY, 300, 8), (WS_PING, 5, 2)]
)
def test_a_length_that_is_not_in_its_shortest_form_is_refused(wire: Wire, opcode: int, size: int, form: int) -> None:
    wire.send(frame(opcode, bytes(size), size=form))
    refused(wire, 1002)


# ---- 2: pings and pongs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"Hello, world!", bytes([0, 0xFF, 0xFE, 0xFD]), b"\xfe" * 125])
@pytest.mark.parametrize("size", [1000, 1])
def test_a_ping_is_answered_with_its_payload(wire: Wire, payload: bytes, size: int) -> None:
    """2.1 to 2.4, 2.6."""
    chopped(wire, frame(WS_PING, payload), size)
    assert wire.receive() == (FIN | WS_PONG, payload)
    closes(wire)


@pytest.mark.parametrize("opcode", [WS_PING, WS_PONG, CLOSE])
def test_a_control_frame_of_126_bytes_is_refused(wire: Wire, opcode: int) -> None:
    """2.5, 7.3.6."""
    wire.send(frame(opcode, b"\x03\xe8" + b"\x2a" * 124))
    refused(wire, 1002)


@pytest.mark.parametrize("payload", [b"", b"unsolicited"])
def test_an_unsolicited_pong_is_ignored(wire: Wire, payload: bytes) -> None:
    """2.7 to 2.9."""
    wire.send(frame(WS_PONG, payload), frame(WS_PING, b"after it"))
    assert wire.receive() == (FIN | WS_PONG, b"after it")
    closes(wire)


@pytest.mark.parametrize("size", [1000, 1])
def test_ten_pings_have_ten_answers(wire: Wire, size: int) -> None:
    """2.10, 2.11."""
    payloads = [f"payload-{i}".encode() for i in range(10)]
    chopped(wire, b"".join(frame(WS_PING, payload) for payload in payloads), size)
    assert [wire.receive() for _ in payloads] == [(FIN | WS_PONG, payload) for payload in payloads]
    closes(wire)


# ---- 3 and 4: reserved bits and opcodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("reserved", range(1, 8))
@pytest.mark.parametrize("opcode", [BINARY, WS_PING, CLOSE])
def test_a_reserved_bit_is_refused(wire: Wire, reserved: int, opcode: int) -> None:
    """3.1 to 3.7."""
    lives(wire)
    wire.send(frame(opcode, message(), reserved=reserved), frame(WS_PING))
    refused(wire, 1002)


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
@pytest.mark.parametrize("payload", [b"", message(b"a payload")])
def test_an_unknown_opcode_is_refused(wire: Wire, opcode: int, payload: bytes) -> None:
    """4.1.1 to 4.1.5 and 4.2.1 to 4.2.5."""
    lives(wire)
    wire.send(frame(opcode, payload), frame(WS_PING))
    refused(wire, 1002)


# ---- 5: fragmentation ------------------------------------------------------------------------------------------------


def fragments(data: bytes, sizes: list[int], between: bytes = b"") -> bytes:
    """A message in fragments of these sizes and a last one, with other frames between them."""
    bounds = [0, *itertools.accumulate(sizes), len(data)]
    return between.join(
        frame(CONTINUATION if i else BINARY, data[a:b], fin=i == len(sizes))
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    )


@pytest.mark.parametrize("opcode", [WS_PING, WS_PONG, CLOSE])
def test_a_fragmented_control_frame_is_refused(wire: Wire, opcode: int) -> None:
    """5.1, 5.2."""
    wire.send(frame(opcode, b"\x03\xe8", fin=False), frame(CONTINUATION, b"rest"))
    refused(wire, 1002)


@pytest.mark.parametrize("sizes", [[20], [4], [0, 0], [8, 0, 5, 0], [1] * 30], ids=str)
@pytest.mark.parametrize("chop", [10_000, 1])
def test_a_fragmented_message_comes_back(wire: Wire, sizes: list[int], chop: int) -> None:
    """5.3 to 5.5, also with empty fragments and with cuts inside our header."""
    payload = b"fragment one" * 4
    chopped(wire, fragments(message(payload), sizes), chop)
    answers(wire, payload)
    closes(wire)


@pytest.mark.parametrize("sizes", [[20], [3], [8, 8, 8, 8, 8]], ids=str)
@pytest.mark.parametrize("chop", [10_000, 1])
def test_a_ping_between_fragments_is_answered_at_once(wire: Wire, sizes: list[int], chop: int) -> None:
    """5.6 to 5.8, 5.19, 5.20."""
    payload = b"fragment one" * 4
    data = fragments(message(payload), sizes, between=frame(WS_PING, b"in between"))
    chopped(wire, data, chop)
    seen = sorted(wire.receive() for _ in range(len(sizes) + 1))
    assert seen == sorted([(FIN | WS_PONG, b"in between")] * len(sizes) + [(FIN | BINARY, message(payload, PONG))])
    closes(wire)


@pytest.mark.parametrize("fin", [True, False])
@pytest.mark.parametrize("chop", [10_000, 1])
@pytest.mark.parametrize("payload", [b"", message()])
def test_a_continuation_of_nothing_is_refused(wire: Wire, fin: bool, chop: int, payload: bytes) -> None:
    """5.9 to 5.14, 5.16, 5.17."""
    chopped(wire, frame(CONTINUATION, payload, fin=fin) + frame(BINARY, message()), chop)
    refused(wire, 1002)


def test_a_continuation_behind_a_whole_fragmented_message_is_refused(wire: Wire) -> None:
    """5.15."""
    wire.send(fragments(message(b"good"), [3]))
    answers(wire, b"good")
    wire.send(frame(CONTINUATION, b"more", fin=False), frame(BINARY, message()))
    refused(wire, 1002)


def test_a_message_inside_a_fragmented_one_is_refused(wire: Wire) -> None:
    """5.18."""
    wire.send(frame(BINARY, message(), fin=False), frame(BINARY, message()))
    refused(wire, 1002)


# ---- 7: the closing handshake ----------------------------------------------------------------------------------------


def test_what_comes_before_a_close_is_answered_and_what_comes_after_it_is_not(wire: Wire) -> None:
    """7.1.1 to 7.1.6."""
    big = bytes(MIB - 8)
    wire.send(frame(BINARY, message(big)))
    answers(wire, big)  # its way is longer than that of the host's answer to the close
    wire.send(frame(CLOSE, b"\x03\xe8"), frame(CLOSE, b"\x03\xe8"), frame(WS_PING), frame(BINARY, message(b"late")))
    assert wire.receive() == (FIN | CLOSE, b"\x03\xe8")
    assert wire.ended()


def test_a_close_inside_a_fragmented_message_is_answered(wire: Wire) -> None:
    """7.1.5."""
    wire.send(frame(BINARY, message(), fin=False))
    closes(wire)


@pytest.mark.parametrize("code", VALID_CODES)
@pytest.mark.parametrize("reason", [b"", b"Hello, world!", b"*" * 123])
def test_a_valid_close_code_comes_back(wire: Wire, code: int, reason: bytes) -> None:
    """7.3.3 to 7.3.5, 7.7.1 to 7.7.13."""
    lives(wire)
    closes(wire, code.to_bytes(2, "big") + reason)


def test_a_close_without_a_code_is_answered_with_one_without(wire: Wire) -> None:
    """7.3.1."""
    closes(wire, b"")


def test_half_a_close_code_is_refused(wire: Wire) -> None:
    """7.3.2."""
    wire.send(frame(CLOSE, b"\x03"))
    refused(wire, 1002)


def test_a_close_reason_that_is_not_utf_8_is_refused_with_1007(wire: Wire) -> None:
    """7.5.1."""
    wire.send(frame(CLOSE, b"\x03\xe8\xce\xba\xe1\xbd\xb9\xed\xa0\x80"))
    refused(wire, 1007)


@pytest.mark.parametrize("code", INVALID_CODES)
def test_a_close_code_that_may_not_be_sent_is_refused(wire: Wire, code: int) -> None:
    """7.9.1 to 7.9.9, 7.13.1, 7.13.2."""
    wire.send(frame(CLOSE, code.to_bytes(2, "big")))
    refused(wire, 1002)


# ---- 9 and 10: limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MIB, 4 * MIB, 16 * MIB])
@pytest.mark.parametrize("fragment", [64, 1024, 65_536, 16 * MIB])
def test_messages_up_to_16_mib_are_taken_in_fragments_of_any_size(wire: Wire, size: int, fragment: int) -> None:
    """9.1 to 9.6, 10.1.1: DATA of a stream that does not exist, which is read and dropped."""
    if size // fragment > 70_000:
        size = 70_000 * fragment
    data = message(bytes(size - 8), DATA, 5)
    wire.send(fragments(data, [fragment] * (size // fragment - 1)))
    lives(wire)
    closes(wire)


@pytest.mark.parametrize("fragment", [1024, 16 * MIB])
def test_a_message_over_16_mib_is_refused_with_1009(wire: Wire, fragment: int) -> None:
    first = frame(BINARY, message(bytes(fragment - 8), DATA, 5), fin=False)
    more = frame(CONTINUATION, bytes(fragment), fin=False)
    wire.send(first, more * (16 * MIB // fragment - 1), frame(CONTINUATION, b"x"))
    refused(wire, 1009)


def test_a_thousand_small_messages_come_back_in_order(wire: Wire) -> None:
    """9.7, 9.8."""
    payloads = [i.to_bytes(2, "big") * (i % 40) for i in range(1000)]
    wire.send(*(frame(BINARY, message(payload)) for payload in payloads))
    answers(wire, *payloads)
    closes(wire)


# ---- 12 and 13: compression ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["host", "runner"])
@pytest.mark.parametrize(
    "offer", ["permessage-deflate", "permessage-deflate; client_max_window_bits; server_no_context_takeover"]
)
def test_compression_is_not_taken_up(target: Target, place: str, offer: str) -> None:
    """In place of 12 and 13; with a reserved bit set, see 3."""
    port, path, token = {
        "host": (target.host_port, f"/ws/forward/{target.task}/1", target.token),
        "runner": (target.runner_port, f"/ws/tunnel/{target.container}", target.tunnel_token),
    }[place]
    with Wire(port, path, token, more=f"{SAME_CLIENT}Sec-WebSocket-Extensions: {offer}\r\n") as wire:
        assert wire.status == 101
        assert b"sec-websocket-extensions" not in wire.head.lower()
