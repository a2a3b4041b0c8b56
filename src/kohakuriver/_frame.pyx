# cython: language_level=3, auto_pickle=False, infer_types=False
"""The hot path of the tunnel: tunnel header, RFC 6455 frames, masking, id rewriting, routing.

Bytes in, offsets out: nothing here opens a socket or waits, and only `Unacked` keeps bytes of payloads. Offsets count
bytes from the start of the buffer that the call was given. Every length that a peer claims is unsigned and is compared with what is
left before it is used. Sources: RFC 6455 section 5 for frames, docs/protocol.md §1 and §3 for what they carry.
The parts below are one module: calls between them are plain calls in C.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove

cimport cython

import os

HEADER_SIZE = C_HEADER_SIZE
HEADROOM = C_HEADROOM
MAX_MESSAGE = C_MAX_MESSAGE
MAX_SEND = C_MAX_SEND
WHOLE = C_WHOLE
BLOCK = C_BLOCK
BULK = C_BULK
FIRST = C_FIRST
LAST = C_LAST
PROTO_TCP = C_TCP
TYPE_CONNECTED = C_CONNECTED
TYPE_DATA = C_DATA
TYPE_WINDOW = C_WINDOW
WS_TEXT = C_WS + OP_TEXT
WS_CLOSE = C_WS + OP_CLOSE
WS_PING = C_WS + OP_PING
WS_PONG = C_WS + OP_PONG

Message = tuple[int, int, int, int, int, int, int]


class FrameViolation(Exception):
    """The peer broke the protocol. `code` is the WebSocket close code that it is owed (RFC 6455 section 7.4.1)."""

    def __init__(self, code, reason):
        super().__init__(code, reason)
        self.code = code

    def __str__(self):
        return self.args[1]


include "_frame_build.pxi"    # headers, masks, frames to send
include "_frame_walk.pxi"     # frames and messages that arrive
include "_frame_route.pxi"    # where the streams of a shared WebSocket lead
include "_frame_relay.pxi"    # what the two hops in the middle pass on
include "_frame_unacked.pxi"  # what a sender keeps until its peer has it
include "_frame_chunks.pxi"   # chunks of HTTP
