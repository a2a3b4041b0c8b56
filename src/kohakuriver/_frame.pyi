from __future__ import annotations

from typing import Final, Generic, TypeAlias, final

from typing_extensions import Buffer, TypeVar, disjoint_base

__test__: dict[str, str]

HEADER_SIZE: Final = 8
HEADROOM: Final = 32
MAX_MESSAGE: Final = 16777216
MAX_SEND: Final = 1048576
WHOLE: Final = 131072
FIRST: Final = 1
LAST: Final = 2
PROTO_TCP: Final = 0
TYPE_CONNECTED: Final = 2
TYPE_DATA: Final = 3
TYPE_WINDOW: Final = 8
WS_TEXT: Final = 257
WS_CLOSE: Final = 264
WS_PING: Final = 265
WS_PONG: Final = 266

# (type, proto, client_id, port, start, stop, flags): the payload is at buf[start:stop].
Message: TypeAlias = tuple[int, int, int, int, int, int, int]

# What a routing table leads to.
_Target = TypeVar("_Target", default=object)

class FrameViolation(Exception):
    code: int
    def __init__(self, code: int, reason: str) -> None: ...

def pack_header(kind: int, proto: int, client_id: int, port: int) -> bytes: ...
def unpack_header(data: Buffer, offset: int = 0) -> tuple[int, int, int, int]: ...
def mask(buf: bytearray | memoryview, start: int, stop: int, key: int, phase: int = 0) -> None: ...
def frame_in_place(
    buf: bytearray | memoryview,
    start: int,
    stop: int,
    kind: int,
    proto: int,
    client_id: int,
    port: int,
    key: int = -1,
) -> int: ...
def build_frame(kind: int, proto: int, client_id: int, port: int, payload: Buffer = b"", key: int = -1) -> bytes: ...
def build_ws(opcode: int, payload: Buffer = b"", key: int = -1) -> bytes: ...

@final
class MaskKeys:
    def next(self) -> int: ...

@disjoint_base
class FrameWalker:
    allow_text: bool
    def __init__(self, *, masked: bool, allow_text: bool = False, max_message: int = 16777216) -> None: ...
    @property
    def masked(self) -> bool: ...
    @property
    def max_message(self) -> int: ...
    def walk(
        self, buf: bytearray | memoryview, start: int, stop: int, limit: int = 256
    ) -> tuple[list[Message], int]: ...

@final
class RoutingTable(Generic[_Target]):
    def add(self, client_id: int, target: _Target, new_id: int) -> None: ...
    def get(self, client_id: int) -> tuple[_Target, int] | None: ...
    def remove(self, client_id: int) -> tuple[_Target, int] | None: ...
    def remove_target(self, target: _Target) -> list[tuple[int, int]]: ...
    def items(self) -> list[tuple[int, tuple[_Target, int]]]: ...
    def __len__(self) -> int: ...
    def __contains__(self, client_id: int, /) -> bool: ...

@final
class RelayWalker(FrameWalker):
    @property
    def bytes_routed(self) -> int: ...
    @property
    def unrouted(self) -> int: ...
    def relay(
        self, buf: bytearray | memoryview, start: int, stop: int, table: RoutingTable[_Target]
    ) -> tuple[list[tuple[_Target, int, int]], Message | None, int]: ...

@final
class SpliceWalker(FrameWalker):
    @property
    def bytes_passed(self) -> int: ...
    @property
    def messages(self) -> int: ...
    @property
    def boundary(self) -> int: ...
    @property
    def at_boundary(self) -> bool: ...
    def splice(self, buf: bytearray | memoryview, start: int, stop: int) -> tuple[int, Message | None, int]: ...
