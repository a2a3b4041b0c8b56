"""Writes the golden vectors: `python -m tests.vectors.generate`. A test checks that the committed ones are these.

They come from the plain twins and from tables written out here, never from the implementations that are checked against
them. README.md says what is in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.reference import frame
from tests.vectors import rules, traces

HERE = Path(__file__).parent
KEY = "a1b2c3d4"

TYPES = {"CONNECT": 1, "CONNECTED": 2, "DATA": 3, "CLOSE": 4, "ERROR": 5, "PING": 6, "PONG": 7, "WINDOW": 8, "EOF": 9}
CONNECT, DATA, ERROR = TYPES["CONNECT"], TYPES["DATA"], TYPES["ERROR"]
TCP, UDP = 0, 1
PROTOS = (("TCP", TCP), ("UDP", UDP))

Vector = dict[str, Any]


def headers() -> list[Vector]:
    cases = [
        ("all zero", 0, 0, 0, 0),
        ("all ones", 0xFF, 0xFF, 0xFFFFFFFF, 0xFFFF),
        ("each byte another", 0x01, 0x00, 0x02030405, 0x0607),
        ("top bits", 0x80, 0x80, 0x80000000, 0x8000),
        ("a client id over 16 bits", DATA, TCP, 0x00010000, 0),
        ("connect to port 443", CONNECT, TCP, 1, 443),
        ("connect to the highest port", CONNECT, UDP, 0xFFFFFFFF, 65535),
        *((f"{name}, {proto}", kind, number, 7, 0) for name, kind in TYPES.items() for proto, number in PROTOS),
        *((f"reserved type {kind:#04x}", kind, TCP, 7, 0) for kind in range(0x0A, 0x10)),
    ]
    return [
        {
            "name": name,
            "type": kind,
            "proto": proto,
            "client_id": client_id,
            "port": port,
            "hex": frame.pack_header(kind, proto, client_id, port).hex(),
        }
        for name, kind, proto, client_id, port in cases
    ]


def frames() -> list[Vector]:
    out = []
    for opcode, name, sizes in (
        (frame.BINARY, "binary", (8, 125, 126, 127, 65535, 65536, frame.MAX_SEND)),
        (frame.TEXT, "text", (0, 9)),
        (frame.CLOSE, "close", (0, 2, 125)),
        (frame.PING, "ping", (0, 4, 125)),
        (frame.PONG, "pong", (0, 4, 125)),
    ):
        for size in sizes:
            for key in (None, KEY, "00000000", "ffffffff"):
                how = f"masked with {key}" if key else "unmasked"
                out.append({"name": f"{name} of {size} bytes, {how}", **one_frame(opcode, size, key)})
    return out


def one_frame(opcode: int, size: int, key: str | None) -> Vector:
    mask = int(key, 16) if key else -1
    about = {"opcode": opcode, "masked": key is not None, "key": key}
    if size <= 127:
        payload = bytes(range(0x41, 0x41 + size)) if opcode != frame.CLOSE else b"\x03\xe8" + b"x" * (size - 2)
        payload = payload[:size] if opcode != frame.TEXT else b"CONNECTED"[:size]
        return {**about, "payload_hex": payload.hex(), "hex": frame.build_ws(opcode, payload, mask).hex()}
    unit = bytes.fromhex("0011223344556677")
    count, rest = divmod(size, len(unit))
    head = unit[:rest]
    whole = frame.build_ws(opcode, head + unit * count, mask)
    repeated = whole[-len(unit) :]
    return {
        **about,
        "payload_hex": head.hex(),
        "payload_repeat": {"hex": unit.hex(), "count": count},
        "hex": whole[: len(whole) - len(unit) * count].hex(),
        "then_repeat": {"hex": repeated.hex(), "count": count},
    }


def messages() -> list[Vector]:
    limit, largest = (256 * 1024).to_bytes(8, "big"), b"\xff" * 8
    broken = "EIO: kaputt – défectueux".encode()
    refused = b"ECONNREFUSED: nothing listens on port 8080"
    cases: list[tuple[str, str, int, int, int, Vector, bytes]] = [
        ("CONNECT of v1", "CONNECT", TCP, 1, 8080, {"limit": None}, b""),
        ("CONNECT of v2", "CONNECT", TCP, 1, 8080, {"limit": 256 * 1024}, limit),
        ("CONNECT of v2 to the session's port", "CONNECT", TCP, 2, 0, {"limit": 256 * 1024}, limit),
        ("CONNECT of v2 for datagrams", "CONNECT", UDP, 3, 53, {"limit": 0}, bytes(8)),
        ("CONNECTED of v1", "CONNECTED", TCP, 1, 0, {"limit": None}, b""),
        ("CONNECTED of v2", "CONNECTED", TCP, 1, 0, {"limit": 256 * 1024}, limit),
        ("DATA", "DATA", TCP, 1, 0, {"data_hex": b"GET / HTTP/1.1\r\n".hex()}, b"GET / HTTP/1.1\r\n"),
        ("DATA of no bytes", "DATA", TCP, 1, 0, {"data_hex": ""}, b""),
        ("DATA that is an empty datagram", "DATA", UDP, 0xFFFFFFFF, 0, {"data_hex": ""}, b""),
        ("CLOSE", "CLOSE", TCP, 1, 0, {"reason": ""}, b""),
        ("CLOSE of v2 with a reason", "CLOSE", TCP, 1, 0, {"reason": "idle"}, b"idle"),
        ("ERROR of v1", "ERROR", TCP, 1, 0, {"code": "", "message": "connection refused"}, b"connection refused"),
        (
            "ERROR of v2",
            "ERROR",
            TCP,
            1,
            0,
            {"code": "ECONNREFUSED", "message": "nothing listens on port 8080"},
            refused,
        ),
        (
            "ERROR beyond ASCII",
            "ERROR",
            UDP,
            1,
            0,
            {"code": "EIO", "message": "kaputt – défectueux"},
            broken,
        ),
        ("PING", "PING", TCP, 0, 0, {"data_hex": "00ff10"}, b"\x00\xff\x10"),
        ("PONG", "PONG", TCP, 0, 0, {"data_hex": "00ff10"}, b"\x00\xff\x10"),
        ("WINDOW", "WINDOW", TCP, 1, 0, {"limit": 256 * 1024}, limit),
        ("WINDOW with the largest limit", "WINDOW", TCP, 1, 0, {"limit": 2**64 - 1}, largest),
        ("EOF", "EOF", TCP, 1, 0, {}, b""),
    ]
    return [
        {
            "name": name,
            "message": kind,
            "type": TYPES[kind],
            "proto": proto,
            "client_id": client_id,
            "port": port,
            "fields": fields,
            "payload_hex": payload.hex(),
            "hex": frame.build_frame(TYPES[kind], proto, client_id, port, payload).hex(),
            "key": KEY,
            "masked_hex": frame.build_frame(TYPES[kind], proto, client_id, port, payload, int(KEY, 16)).hex(),
        }
        for name, kind, proto, client_id, port, fields, payload in cases
    ]


def raw(first: int, payload: bytes, *, masked: bool) -> bytes:
    """A short frame with any first byte, so also those that no builder writes."""
    if not masked:
        return bytes([first, len(payload)]) + payload
    key = bytes.fromhex(KEY)
    return bytes([first, 0x80 | len(payload)]) + key + frame.masked_bytes(payload, key)


def sequences() -> list[Vector]:
    message = frame.pack_header(DATA, TCP, 7, 0) + b"hello, world"
    error = frame.pack_header(ERROR, TCP, 7, 0) + b"ECONNRESET: gone"
    data: Vector = {"type": DATA, "proto": TCP, "client_id": 7, "port": 0, "payload_hex": b"hello, world".hex()}
    failed: Vector = {"type": ERROR, "proto": TCP, "client_id": 7, "port": 0, "payload_hex": b"ECONNRESET: gone".hex()}
    ping: Vector = {"type": frame.WS_PING, "proto": 0, "client_id": 0, "port": 0, "payload_hex": b"are you".hex()}
    begin, middle, end, whole, control = 0x02, 0x00, 0x80, 0x82, 0x89
    cases: list[tuple[str, list[tuple[int, bytes]], list[Vector]]] = [
        ("two messages", [(whole, message), (whole, error)], [data, failed]),
        ("a ping before a message", [(control, b"are you"), (whole, message)], [ping, data]),
        ("DATA in three fragments", [(begin, message[:10]), (middle, message[10:13]), (end, message[13:])], [data]),
        ("a header split over fragments", [(begin, message[:3]), (middle, message[3:5]), (end, message[5:])], [data]),
        ("an ERROR in fragments", [(begin, error[:1]), (end, error[1:])], [failed]),
        ("a last fragment of no bytes", [(begin, message), (end, b"")], [data]),
        ("fragments of no bytes", [(begin, b""), (middle, b""), (middle, message), (end, b"")], [data]),
        ("a ping between fragments", [(begin, message[:10]), (control, b"are you"), (end, message[10:])], [ping, data]),
        ("a ping inside a header", [(begin, message[:4]), (control, b"are you"), (end, message[4:])], [ping, data]),
    ]
    return [
        {
            "name": f"{name}, {'masked' if masked else 'unmasked'}",
            "masked": masked,
            "hex": b"".join(raw(first, payload, masked=masked) for first, payload in parts).hex(),
            "messages": expected,
        }
        for name, parts, expected in cases
        for masked in (False, True)
    ]


def violations() -> list[Vector]:
    good = raw(0x82, frame.pack_header(DATA, TCP, 7, 0) + b"x", masked=False)
    begun = raw(0x02, frame.pack_header(DATA, TCP, 7, 0) + b"x", masked=False)
    text = raw(0x81, b"CONNECTED", masked=False)
    cases: list[tuple[str, int, bytes, int, Vector]] = [
        ("RSV1 set", 1002, raw(0xC2, bytes(8), masked=False), 0, {}),
        ("RSV2 set", 1002, raw(0xA2, bytes(8), masked=False), 0, {}),
        ("RSV3 set", 1002, raw(0x92, bytes(8), masked=False), 0, {}),
        *((f"opcode {op:#x}", 1002, raw(0x80 | op, bytes(8), masked=False), 0, {}) for op in (3, 7, 0xB, 0xF)),
        ("a fragmented ping", 1002, raw(0x09, b"", masked=False), 0, {}),
        ("a ping of 126 bytes", 1002, bytes.fromhex("897e007e") + bytes(126), 0, {}),
        ("a close of one byte", 1002, raw(0x88, b"\x03", masked=False), 0, {}),
        ("masked where it must not be", 1002, raw(0x82, bytes(8), masked=True), 0, {}),
        ("unmasked where it must be masked", 1002, good, 0, {"masked": True}),
        ("a continuation of nothing", 1002, raw(0x80, bytes(8), masked=False), 0, {}),
        ("a continuation behind a whole message", 1002, good + raw(0x80, b"", masked=False), 1, {}),
        ("a message inside a fragmented one", 1002, begun + good, 0, {}),
        ("text inside a fragmented message", 1002, begun + text, 0, {"allow_text": True}),
        ("text where binary is due", 1003, text, 0, {}),
        ("text behind a message", 1003, good + text, 1, {}),
        ("a message of no bytes", 1002, raw(0x82, b"", masked=False), 0, {}),
        ("a message of seven bytes", 1002, raw(0x82, bytes(7), masked=False), 0, {}),
        ("seven bytes in fragments", 1002, raw(2, bytes(4), masked=False) + raw(0x80, bytes(3), masked=False), 0, {}),
        ("125 bytes with a 16-bit length", 1002, bytes.fromhex("827e007d"), 0, {}),
        ("65535 bytes with a 64-bit length", 1002, bytes.fromhex("827f000000000000ffff"), 0, {}),
        ("2^63 bytes", 1002, bytes.fromhex("827f8000000000000000"), 0, {}),
        ("2^64-1 bytes", 1002, bytes.fromhex("827fffffffffffffffff"), 0, {}),
        ("2^63-1 bytes", 1009, bytes.fromhex("827f7fffffffffffffff"), 0, {}),
        ("16 MiB and one byte", 1009, bytes.fromhex("827f0000000001000001"), 0, {}),
        ("fragments over the limit", 1009, begun + bytes.fromhex("007e0100"), 0, {"max_message": 264}),
        ("a fragment of 2^63-1 bytes", 1009, begun + bytes.fromhex("807f7fffffffffffffff"), 0, {}),
    ]
    default: Vector = {"masked": False, "allow_text": False, "max_message": frame.MAX_MESSAGE}
    return [
        {"name": name, **default, **about, "hex": data.hex(), "messages": before, "code": code}
        for name, code, data, before, about in cases
    ]


def ports() -> list[Vector]:
    """PORTS both ways, written out by hand; what makes no sense has null in the place of its fields."""
    one = "00 22b8 04 00000000 07 707974686f6e33"
    six = "01 0035 10 20010db8000000000000000000000001 00"
    told: list[Vector] = [
        {"proto": 0, "port": 8888, "address": "0.0.0.0", "program": "python3"},
        {"proto": 1, "port": 53, "address": "2001:db8::1", "program": ""},
    ]
    questions: list[tuple[str, str, Vector | None]] = [
        ("of the network", "00000007 00", {"number": 7, "scope": 0, "mark": ""}),
        ("of what is seen", "ffffffff 01", {"number": 2**32 - 1, "scope": 1, "mark": ""}),
        ("of its own processes", "00000007 02 413d31", {"number": 7, "scope": 2, "mark": "A=1"}),
        ("without a scope", "00000007", None),
        ("of an unknown scope", "00000007 03", None),
        ("with a mark that means nothing", "00000007 00 413d31", None),
        ("without the mark that it needs", "00000007 02", None),
        ("with a NUL in its mark", "00000007 02 410031", None),
    ]
    answers: list[tuple[str, str, Vector | None]] = [
        ("of nothing", "00000007 00", {"number": 7, "more": False, "ports": []}),
        ("of two ports", f"00000007 00 {one} {six}", {"number": 7, "more": False, "ports": told}),
        ("that there are more", f"00000007 01 {one}", {"number": 7, "more": True, "ports": told[:1]}),
        ("without flags", "00000007", None),
        ("with a flag that there is not", "00000007 02", None),
        ("of port 0", "00000007 00 00 0000 04 00000000 00", None),
        ("of a protocol that is no transport", "00000007 00 02 0050 04 00000000 00", None),
        ("with an address of 5 bytes", "00000007 00 00 0050 05 0000000000 00", None),
        ("with an address that is cut short", "00000007 00 00 0050 10 00000000", None),
        ("without the length of a name", "00000007 00 00 0050 04 00000000", None),
        ("with a name that is cut short", "00000007 00 00 0050 04 00000000 03 6162", None),
        ("with a name of 65 bytes", f"00000007 00 00 0050 04 00000000 41 {'61' * 65}", None),
        ("with one byte too many", f"00000007 00 {one} 00", None),
        ("of 1001 ports", f"00000007 00 {one * 1001}", None),
    ]
    return [
        {"name": f"{what} {name}", "what": what, "hex": text.replace(" ", ""), "fields": fields}
        for what, rows in (("question", questions), ("answer", answers))
        for name, text, fields in rows
    ]


FILES = {
    "header.json": headers,
    "frames.json": frames,
    "messages.json": messages,
    "sequences.json": sequences,
    "violations.json": violations,
    "windows.json": rules.windows,
    "states.json": rules.states,
    "kept_states.json": rules.kept_states,
    "traces.json": traces.traces,
    "ports.json": ports,
    "reconnect.json": rules.reconnect,
    "errors.json": rules.errors,
}


def text_of(name: str) -> str:
    """What the file of this name must hold: one vector a line."""
    lines = [json.dumps(vector, ensure_ascii=False) for vector in FILES[name]()]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main() -> None:
    for name in FILES:
        (HERE / name).write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
