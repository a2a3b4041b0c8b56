"""Streams of frames as hypothesis strategies: mostly right, in all the ways that RFC 6455 allows, and then broken."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.reference import frame as twin

# Around each place where something changes: lengths of one and two bytes, the tunnel header, nothing at all.
SIZES = st.one_of(
    st.integers(0, 20), st.sampled_from([110, 116, 117, 118, 119, 120, 125, 126, 127, 300, 16_360, 16_380])
)
TYPES = st.sampled_from([twin.TYPE_DATA] * 6 + [1, 2, 4, 5, 6, 8, 9, 0x0F, 0xFF])
SPLITS = st.lists(st.one_of(st.integers(1, 20), st.integers(100, 20_000)), max_size=40)


@dataclass(frozen=True)
class Sent:
    """A message that went into a stream. Its payload is one byte, repeated: whose it is shows wherever it ends up."""

    kind: int
    proto: int
    client_id: int
    payload: bytes

    def joined(self) -> tuple[int, int, int, int, bytes]:
        return (self.kind, self.proto, self.client_id, 0, self.payload)


@dataclass(frozen=True)
class Stream:
    data: bytes
    masked: bool
    sent: list[Sent]  # in the order in which they end


def raw_frame(fin: bool, opcode: int, payload: bytes, key: int) -> bytes:
    built = twin.build_ws(opcode or twin.BINARY, payload, key)
    return bytes([(0x80 if fin else 0) | opcode]) + built[1:]


@st.composite
def streams(draw: st.DrawFn, masked: bool | None = None, text: bool = False, client_ids: int = 6) -> Stream:
    """Up to 12 messages, each in one frame or in fragments, with control frames anywhere between the frames."""
    mask_it = draw(st.booleans()) if masked is None else masked
    keys = st.integers(0, 0xFFFFFFFF) if mask_it else st.just(-1)
    out = bytearray()
    sent: list[Sent] = []

    def control() -> None:
        if draw(st.integers(0, 5)) == 0:
            opcode = draw(st.sampled_from([twin.PING, twin.PONG]))
            payload = draw(st.binary(max_size=6))
            out.extend(raw_frame(True, opcode, payload, draw(keys)))
            sent.append(Sent(0x100 + opcode, 0, 0, payload))

    for number in range(draw(st.integers(1, 12))):
        control()
        payload = bytes([number]) * draw(SIZES)
        if text and draw(st.integers(0, 4)) == 0:
            message, opcode, body = Sent(twin.WS_TEXT, 0, 0, payload), twin.TEXT, payload
        else:
            message = Sent(draw(TYPES), draw(st.integers(0, 1)), draw(st.integers(0, client_ids - 1)), payload)
            opcode, body = twin.BINARY, twin.pack_header(message.kind, message.proto, message.client_id, 0) + payload
        cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=3))) if draw(st.integers(0, 2)) == 0 else []
        bounds = [0, *cuts, len(body)]
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if i:
                control()
            out.extend(
                raw_frame(stop == len(body) and i == len(cuts), 0 if i else opcode, body[start:stop], draw(keys))
            )
        sent.append(message)
    return Stream(bytes(out), mask_it, sent)


@st.composite
def broken_streams(draw: st.DrawFn, text: bool = False) -> Stream:
    """A stream with a few bytes changed, left out or put in, so that it may be right or not."""
    stream = draw(streams(text=text))
    data = bytearray(stream.data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["change", "drop", "insert"]))
        if what == "drop":
            del data[at : at + draw(st.integers(1, 9))]
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif data:
            data[at] = draw(st.integers(0, 255))
    return Stream(bytes(data), stream.masked, [])
