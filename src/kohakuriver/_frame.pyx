# cython: language_level=3, auto_pickle=False, infer_types=False
"""The hot path of the tunnel: tunnel header, RFC 6455 frames, masking, id rewriting, routing.

Bytes in, offsets out: nothing here opens a socket, waits, or keeps a byte of a payload. Offsets count bytes from the
start of the buffer that the call was given. Every length that a peer claims is unsigned and is compared with what is
left before it is used. Sources: RFC 6455 section 5 for frames, docs/protocol.md §1 and §3 for what they carry.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
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
FIRST = C_FIRST
LAST = C_LAST
PROTO_TCP = C_TCP
TYPE_CONNECTED = C_CONNECTED
TYPE_DATA = C_DATA
TYPE_WINDOW = C_WINDOW
WS_TEXT = C_WS + OP_TEXT
WS_CLOSE = C_WS + OP_CLOSE
WS_PING = C_WS + 9
WS_PONG = C_WS + OP_PONG

Message = tuple[int, int, int, int, int, int, int]


class FrameViolation(Exception):
    """The peer broke the protocol. `code` is the WebSocket close code that it is owed (RFC 6455 section 7.4.1)."""

    def __init__(self, code, reason):
        super().__init__(code, reason)
        self.code = code

    def __str__(self):
        return self.args[1]


cdef void xor_key(uint8_t* p, size_t size, const uint8_t* key, unsigned int phase) noexcept nogil:
    cdef uint8_t[8] pattern
    cdef uint64_t pattern_word, word
    cdef size_t i, words = size >> 3
    for i in range(8):
        pattern[i] = key[(i + phase) & 3]
    memcpy(&pattern_word, pattern, 8)
    for i in range(words):
        memcpy(&word, p + 8 * i, 8)
        word ^= pattern_word
        memcpy(p + 8 * i, &word, 8)
    for i in range(words << 3, size):
        p[i] ^= pattern[i & 7]


cdef uint8_t* open_buffer(object buf, Py_ssize_t start, Py_ssize_t stop, Py_buffer* view) except NULL:
    """Lock a writable buffer and check the range that all later reads and writes of this call stay in."""
    PyObject_GetBuffer(buf, view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    if 0 <= start <= stop <= view.len:
        return <uint8_t*>view.buf
    PyBuffer_Release(view)
    raise ValueError(f"range {start}:{stop} does not lie in a buffer of {view.len} bytes")


# ---- header, mask, frames to send --------------------------------------------------------------------------------------

def pack_header(uint8_t kind, uint8_t proto, uint32_t client_id, uint16_t port):
    """Return the 8 bytes of a tunnel header (docs/protocol.md §1); OverflowError if a field does not fit."""
    cdef Header head = Header(kind, proto, client_id, port)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, C_HEADER_SIZE)
    store_header(<uint8_t*>PyBytes_AS_STRING(out), &head)
    return out


cdef int load_header_at(const uint8_t* p, Py_ssize_t size, Py_ssize_t offset, Header* head) except -1:
    if not 0 <= offset <= size - C_HEADER_SIZE:
        raise ValueError(f"no {C_HEADER_SIZE}-byte header at offset {offset} of {size} bytes")
    load_header(p + offset, head)
    return 0


def unpack_header(data, Py_ssize_t offset=0):
    """Return (type, proto, client_id, port) of the tunnel header at data[offset:]; ValueError if it is cut short."""
    cdef Py_buffer view
    cdef Header head = Header(0, 0, 0, 0)      # else the C compiler thinks that it may stay unset
    if type(data) is bytes:     # the buffer protocol would take longer than all the rest
        load_header_at(<const uint8_t*>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), offset, &head)
    else:
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            load_header_at(<const uint8_t*>view.buf, view.len, offset, &head)
        finally:
            PyBuffer_Release(&view)
    return head.type, head.proto, head.client_id, head.port


def mask(buf, Py_ssize_t start, Py_ssize_t stop, uint32_t key, unsigned int phase=0):
    """XOR buf[start:stop] in place with the mask key (RFC 6455 section 5.3), whose first byte is its most significant.

    Byte i takes key byte (i - start + phase) % 4. ValueError if the range does not lie in buf.
    """
    cdef Py_buffer view
    cdef uint8_t[4] key_bytes
    cdef uint8_t* b = open_buffer(buf, start, stop, &view)
    store_be(key_bytes, key, 4)
    xor_key(b + start, <size_t>(stop - start), key_bytes, phase)
    PyBuffer_Release(&view)


cdef int frame_before(uint8_t* payload, size_t size, const Header* head, int opcode, long long key) except -1:
    """Write the headers of a frame right before its payload, mask it if key >= 0, and return the headers' size.

    Without a tunnel header (head is NULL) only the WebSocket's own is written.
    """
    cdef size_t inner = C_HEADER_SIZE if head != NULL else 0
    cdef int outer = ws_header_size(size + inner)
    cdef int total = outer + <int>inner + (4 if key >= 0 else 0)
    cdef uint8_t* p = payload - total
    store_ws_header(p, opcode, size + inner)
    if head != NULL:
        store_header(payload - C_HEADER_SIZE, head)
    if key >= 0:
        p[1] |= 0x80
        store_be(p + outer, <uint64_t>key, 4)
        xor_key(payload - inner, size + inner, p + outer, 0)
    return total


cdef int check_sendable(Py_ssize_t size, long long key) except -1:
    if size > C_MAX_SEND:
        raise ValueError(f"a message of {size} bytes is over the limit of {C_MAX_SEND}")
    if not -1 <= key <= 0xFFFFFFFF:
        raise ValueError("a mask key is -1 (none) or an unsigned 32-bit number")
    return 0


def frame_in_place(buf, Py_ssize_t start, Py_ssize_t stop, uint8_t kind, uint8_t proto, uint32_t client_id,
                   uint16_t port, long long key=-1):
    """Make the payload at buf[start:stop] a whole binary frame, by writing both headers right before it.

    With key >= 0 the frame is masked in place. Returns the offset of the frame's first byte. ValueError if there are
    fewer than HEADROOM bytes before the payload, the range does not lie in buf, or the message is over MAX_SEND.
    """
    cdef Py_buffer view
    cdef Header head = Header(kind, proto, client_id, port)
    cdef uint8_t* b = open_buffer(buf, start, stop, &view)
    try:
        if start < C_HEADROOM:
            raise ValueError(f"{start} bytes before the payload, {C_HEADROOM} are needed")
        check_sendable(stop - start + C_HEADER_SIZE, key)
        return start - frame_before(b + start, <size_t>(stop - start), &head, OP_BINARY, key)
    finally:
        PyBuffer_Release(&view)


cdef bytes new_frame(int opcode, const Header* head, payload, long long key):
    cdef Py_buffer view
    cdef size_t inner = C_HEADER_SIZE if head != NULL else 0
    cdef size_t before
    cdef bytes out
    cdef uint8_t* p
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    try:
        if opcode >= OP_CLOSE and view.len > 125:
            raise ValueError("a control frame carries at most 125 bytes")
        check_sendable(view.len + <Py_ssize_t>inner, key)
        before = ws_header_size(<uint64_t>view.len + inner) + inner + (4 if key >= 0 else 0)
        out = PyBytes_FromStringAndSize(NULL, view.len + <Py_ssize_t>before)
        p = <uint8_t*>PyBytes_AS_STRING(out)
        memcpy(p + before, view.buf, <size_t>view.len)
        frame_before(p + before, <size_t>view.len, head, opcode, key)
        return out
    finally:
        PyBuffer_Release(&view)


def build_frame(uint8_t kind, uint8_t proto, uint32_t client_id, uint16_t port, payload=b"", long long key=-1):
    """Return a whole binary frame with one tunnel message; masked if key >= 0. ValueError if over MAX_SEND."""
    cdef Header head = Header(kind, proto, client_id, port)
    return new_frame(OP_BINARY, &head, payload, key)


def build_ws(int opcode, payload=b"", long long key=-1):
    """Return a whole frame without a tunnel header: text, close, ping or pong.

    ValueError for another opcode, a control payload over 125 bytes, or a message over MAX_SEND.
    """
    if opcode not in (OP_TEXT, OP_BINARY, OP_CLOSE, 9, OP_PONG):
        raise ValueError(f"no frame begins with opcode {opcode}")
    return new_frame(opcode, NULL, payload, key)


@cython.final
cdef class MaskKeys:
    """Mask keys that nobody can predict (RFC 6455 section 10.3), fetched from the system 4 KiB at a time."""

    cdef bytes pool
    cdef Py_ssize_t used

    def __cinit__(self):
        self.pool = b""
        self.used = 0

    def next(self):
        """Return the next key, an unsigned 32-bit number."""
        cdef const uint8_t* p
        if self.used + 4 > len(self.pool):
            self.pool = os.urandom(4096)
            self.used = 0
        p = <const uint8_t*>PyBytes_AS_STRING(self.pool) + self.used
        self.used += 4
        return load_be(p, 4)


# ---- receiving ---------------------------------------------------------------------------------------------------------

cdef class FrameWalker:
    """FrameWalker(*, masked, allow_text=False, max_message=16777216)
--

    The receiving side of one WebSocket. Incremental; the bytes stay in the caller's buffer.

    masked: whether the peer must mask (it is the WebSocket's client). allow_text: whether text messages are let
    through; may be changed between calls. max_message: bytes that one message may have over all its fragments.
    """

    cdef readonly bint masked
    cdef public bint allow_text
    cdef readonly uint64_t max_message
    cdef bint in_frame, fin, in_message, first, failed
    cdef uint8_t message_opcode
    cdef uint64_t message_size      # claimed by the headers of the message's frames so far
    cdef uint64_t remaining         # of the data frame's payload
    cdef uint8_t[4] key
    cdef unsigned int phase
    cdef uint8_t[C_HEADER_SIZE] header
    cdef unsigned int header_have
    cdef int code
    cdef str reason

    def __init__(self, *, bint masked, bint allow_text=False, uint64_t max_message=C_MAX_MESSAGE):
        self.masked = masked
        self.allow_text = allow_text
        self.max_message = max_message
        self.in_frame = self.in_message = self.failed = False

    cdef int refuse(self, int code, str reason) except -1:
        self.code = code
        self.reason = reason
        return BAD

    cdef int check_alive(self) except -1:
        if self.failed:
            raise FrameViolation(self.code, self.reason)
        return 0

    cdef int fail(self) except -1:
        self.failed = True
        return self.check_alive()

    cdef int check_first_bytes(self, uint8_t first, uint8_t second) except -1:
        """Everything that the first two bytes of a frame can be wrong in."""
        cdef uint8_t opcode = first & 0x0F
        cdef bint fin = first & 0x80 != 0
        if first & 0x70:
            return self.refuse(1002, "a reserved bit is set and no extension was agreed on")
        if opcode >= OP_CLOSE:
            if opcode > OP_PONG:
                return self.refuse(1002, "unknown control opcode")
            if not fin:
                return self.refuse(1002, "a control frame is fragmented")
            if second & 0x7F > 125:
                return self.refuse(1002, "a control frame is longer than 125 bytes")
            if opcode == OP_CLOSE and second & 0x7F == 1:
                return self.refuse(1002, "a close frame has half a close code")
        elif opcode > OP_BINARY:
            return self.refuse(1002, "unknown data opcode")
        if (second & 0x80 != 0) != self.masked:
            return self.refuse(1002, "a frame is not masked" if self.masked else "a frame is masked")
        if opcode == OP_CONTINUATION and not self.in_message:
            return self.refuse(1002, "a continuation frame continues nothing")
        if opcode in (OP_TEXT, OP_BINARY) and self.in_message:
            return self.refuse(1002, "a message begins inside a fragmented message")
        if opcode == OP_TEXT and not self.allow_text:
            return self.refuse(1003, "text where binary is due")
        return GOT

    cdef int check_message_size(self, const WsHeader* h) except -1:
        cdef uint64_t before = self.message_size if h.opcode == OP_CONTINUATION else 0
        cdef uint8_t opcode = self.message_opcode if h.opcode == OP_CONTINUATION else h.opcode
        if h.length > self.max_message - before:
            return self.refuse(1009, f"a message is over the limit of {self.max_message} bytes")
        if h.fin and opcode == OP_BINARY and before + h.length < C_HEADER_SIZE:
            return self.refuse(1002, "a message is shorter than its header")
        return GOT

    cdef int read_ws_header(self, const uint8_t* p, size_t left, WsHeader* h) except -1:
        """Read the header of the frame at p; nothing of the walker's state changes."""
        if left < 2:
            return NEED
        if self.check_first_bytes(p[0], p[1]) == BAD:
            return BAD
        h.opcode = p[0] & 0x0F
        h.fin = p[0] & 0x80 != 0
        h.length = p[1] & 0x7F
        h.size = 2 if h.length < 126 else 4 if h.length == 126 else 10
        if left < h.size:
            return NEED
        if h.size > 2:
            h.length = load_be(p + 2, <int>h.size - 2)
            if h.length >> 63:
                return self.refuse(1002, "a frame claims 2^63 bytes or more")
            if <size_t>ws_header_size(h.length) != h.size:
                return self.refuse(1002, "a frame's length is not in its shortest form")
        if h.opcode < OP_CLOSE and self.check_message_size(h) == BAD:
            return BAD
        if self.masked:
            if left < h.size + 4:
                return NEED
            memcpy(h.key, p + h.size, 4)
            h.size += 4
        return GOT

    cdef void enter(self, const WsHeader* h) noexcept:
        """Step behind the header of a data frame."""
        if h.opcode != OP_CONTINUATION:
            self.message_opcode = h.opcode
            self.message_size = 0
            self.in_message = self.first = True
            self.header_have = 0
        self.message_size += h.length
        self.remaining = h.length
        self.fin = h.fin
        self.in_frame = True
        memcpy(self.key, h.key, 4)
        self.phase = 0

    cdef void advance(self, uint64_t size) noexcept:
        """Step over size bytes of the data frame's payload, at most as many as remain."""
        self.phase = <unsigned int>((self.phase + size) & 3)
        self.remaining -= size
        if self.remaining == 0:
            self.in_frame = False
            if self.fin:
                self.in_message = False

    cdef bint find_whole(self, uint8_t* b, size_t stop, const WsHeader* h, Found* f) noexcept:
        """Fill f from the frame at f.resume, if all of its payload is there."""
        f.start = f.resume + h.size
        if h.length > stop - f.start:
            return False
        f.stop = f.start + <size_t>h.length
        f.flags = C_FIRST | C_LAST
        f.piece = False
        memcpy(f.key, h.key, 4)
        if h.opcode == OP_BINARY:
            f.kind = f.head.type
            f.start += C_HEADER_SIZE
        else:
            f.head = Header(0, 0, 0, 0)
            f.kind = C_WS + h.opcode
        return True

    cdef int find_at_header(self, uint8_t* b, size_t stop, Found* f) except -1:
        """Look at the frame at f.resume. GOT: f is a whole frame, or the walker stands in it and f.resume moved."""
        cdef WsHeader h
        cdef uint8_t[C_HEADER_SIZE] header
        cdef int got = self.read_ws_header(b + f.resume, stop - f.resume, &h)
        cdef bint whole
        if got != GOT:
            return got
        whole = h.opcode >= OP_CLOSE or (h.fin and h.opcode == OP_TEXT and h.length <= C_WHOLE)
        if h.fin and h.opcode == OP_BINARY:
            if stop - f.resume - h.size < C_HEADER_SIZE:
                return NEED
            memcpy(header, b + f.resume + h.size, C_HEADER_SIZE)
            if self.masked:
                xor_key(header, C_HEADER_SIZE, h.key, 0)
            load_header(header, &f.head)
            whole = h.length <= C_WHOLE and not (f.head.type == C_DATA and f.head.proto == C_TCP)
        if whole:
            return GOT if self.find_whole(b, stop, &h, f) else NEED
        self.enter(&h)
        f.resume += h.size
        return GOT

    cdef void gather_header(self, const uint8_t* b, size_t stop, Found* f) noexcept:
        """Take what is there of a tunnel header, which may be split over frames and reads."""
        cdef size_t size = min(<uint64_t>(C_HEADER_SIZE - self.header_have), self.remaining, <uint64_t>(stop - f.resume))
        memcpy(self.header + self.header_have, b + f.resume, size)
        if self.masked:
            xor_key(self.header + self.header_have, size, self.key, self.phase)
        self.header_have += <unsigned int>size
        f.resume += size
        # The frame's end is not passed here: an empty payload still makes a piece, which passes it.
        self.phase = <unsigned int>((self.phase + size) & 3)
        self.remaining -= size

    cdef bint find_piece(self, size_t stop, Found* f) noexcept:
        """Fill f with what is there of the data frame's payload, if that makes a piece."""
        f.start = f.resume
        f.stop = f.start + <size_t>min(self.remaining, <uint64_t>(stop - f.start))
        f.piece = True
        f.flags = C_FIRST if self.first else 0
        if self.fin and f.stop - f.start == self.remaining:
            f.flags |= C_LAST
        if self.message_opcode == OP_TEXT:
            f.head = Header(0, 0, 0, 0)
            f.kind = C_WS + OP_TEXT
        else:
            load_header(self.header, &f.head)
            f.kind = f.head.type
        return f.stop > f.start or f.flags & C_LAST

    cdef int find(self, uint8_t* b, size_t pos, size_t stop, Found* f) except -1:
        """Find the next message or piece from pos on; f.resume says how far the headers before it were consumed."""
        cdef int got
        f.resume = pos
        while True:
            if not self.in_frame:
                f.piece = True
                got = self.find_at_header(b, stop, f)
                if got != GOT or not f.piece:
                    return got
            if self.message_opcode == OP_BINARY and self.header_have < C_HEADER_SIZE:
                self.gather_header(b, stop, f)
            if self.message_opcode == OP_TEXT or self.header_have == C_HEADER_SIZE:
                if self.find_piece(stop, f):
                    return GOT
            if self.remaining:
                return NEED
            self.advance(0)

    cdef void take(self, uint8_t* b, const Found* f) noexcept:
        """Unmask what find() found and step behind it."""
        if self.masked and f.piece:
            xor_key(b + f.start, f.stop - f.start, self.key, self.phase)
        elif self.masked:
            xor_key(b + f.start, f.stop - f.start, f.key, 0)
        self.skip(f)

    cdef void skip(self, const Found* f) noexcept:
        if f.piece:
            self.first = False
            self.advance(f.stop - f.start)

    def walk(self, buf, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t limit=256):
        """Return the messages in buf[start:stop], at most limit, and the offset up to which bytes are consumed.

        A message is (type, proto, client_id, port, start, stop, flags): its payload, unmasked in place, is
        buf[start:stop]. The caller presents the bytes behind the returned offset again, followed by more. DATA of a
        TCP stream, and anything fragmented or larger than WHOLE, comes in pieces as it arrives: FIRST marks the first
        and LAST the last, which alone may be empty. FrameViolation once everything before the fault is returned.
        """
        cdef Py_buffer view
        cdef Found f
        cdef int got
        cdef size_t pos = <size_t>start
        cdef list out = []
        if limit < 1:
            raise ValueError("limit must be at least 1")
        self.check_alive()
        cdef uint8_t* b = open_buffer(buf, start, stop, &view)
        try:
            while len(out) < limit:
                got = self.find(b, pos, <size_t>stop, &f)
                pos = f.resume
                if got != GOT:
                    if got == BAD and pos == <size_t>start:
                        self.fail()
                    break
                self.take(b, &f)
                pos = f.stop
                out.append(message(&f))
            return out, pos
        finally:
            PyBuffer_Release(&view)


cdef tuple message(const Found* f):
    return (f.kind, f.head.proto, f.head.client_id, f.head.port, f.start, f.stop, f.flags)


# ---- routing -----------------------------------------------------------------------------------------------------------

cdef struct Route:
    uint64_t serial         # 0: the slot is free
    uint32_t client_id
    uint32_t new_id


cdef uint64_t next_serial = 1


@cython.final
cdef class RoutingTable:
    """Where the streams of one WebSocket lead: client id -> (target, id there). Open addressing, linear probing.

    Peers choose client ids, so the hash is keyed: nobody can make ids collide on purpose. Ids are unsigned 32-bit
    numbers, else OverflowError.
    """

    cdef Route* routes
    cdef list targets           # beside routes, so that the collector sees the references
    cdef size_t size, used      # size is a power of two, at least twice used
    cdef int shift
    cdef uint64_t factor

    def __cinit__(self):
        self.factor = <uint64_t>int.from_bytes(os.urandom(8), "big") | 1
        self.allocate(4)

    def __dealloc__(self):
        free(self.routes)

    cdef int allocate(self, int bits) except -1:
        cdef list targets = [None] * (<Py_ssize_t>1 << bits)
        cdef Route* routes = <Route*>calloc(<size_t>1 << bits, sizeof(Route))
        if routes == NULL:
            raise MemoryError()
        self.routes = routes
        self.targets = targets
        self.size = <size_t>1 << bits
        self.shift = 64 - bits
        self.used = 0
        return 0

    cdef inline size_t home(self, uint32_t client_id) noexcept:
        # Multiply-shift with a random odd factor: a universal hash.
        return <size_t>((self.factor * client_id) >> self.shift)

    cdef inline size_t slot(self, uint32_t client_id) noexcept:
        """Return the id's slot, or the free one where it would go."""
        cdef size_t i = self.home(client_id)
        while self.routes[i].serial and self.routes[i].client_id != client_id:
            i = (i + 1) & (self.size - 1)
        return i

    cdef int grow(self) except -1:
        cdef Route* old = self.routes
        cdef list targets = self.targets
        cdef size_t i, j, size = self.size
        self.allocate(65 - self.shift)
        for i in range(size):
            if old[i].serial:
                j = self.slot(old[i].client_id)
                self.routes[j] = old[i]
                self.targets[j] = targets[i]
                self.used += 1
        free(old)
        return 0

    cdef int vacate(self, size_t i) except -1:
        """Free slot i, and move back those behind it that had to step over it."""
        cdef size_t j = i, wanted, end = self.size - 1
        while True:
            j = (j + 1) & end
            if not self.routes[j].serial:
                break
            wanted = self.home(self.routes[j].client_id)
            if ((j - wanted) & end) >= ((j - i) & end):
                self.routes[i] = self.routes[j]
                self.targets[i] = self.targets[j]
                i = j
        self.routes[i].serial = 0
        self.used -= 1
        self.targets[i] = None
        return 0

    def add(self, uint32_t client_id, target, uint32_t new_id):
        """Lead client_id to target, as new_id there; KeyError if it leads somewhere already."""
        global next_serial
        if self.routes[self.slot(client_id)].serial:
            raise KeyError(client_id)
        if 2 * (self.used + 1) > self.size:
            self.grow()
        cdef size_t i = self.slot(client_id)
        self.routes[i] = Route(next_serial, client_id, new_id)
        self.targets[i] = target
        self.used += 1
        next_serial += 1

    def get(self, uint32_t client_id):
        """Return (target, new_id), or None."""
        cdef size_t i = self.slot(client_id)
        return (self.targets[i], self.routes[i].new_id) if self.routes[i].serial else None

    def remove(self, uint32_t client_id):
        """Forget client_id and return what it led to as (target, new_id), or None."""
        cdef size_t i = self.slot(client_id)
        if not self.routes[i].serial:
            return None
        found = (self.targets[i], self.routes[i].new_id)
        self.vacate(i)
        return found

    def remove_target(self, target):
        """Forget all ids that lead to this very target; return them as [(client_id, new_id)]."""
        cdef list found = [(client_id, new_id) for client_id, (other, new_id) in self.items() if other is target]
        for client_id, _ in found:
            self.vacate(self.slot(client_id))
        return found

    def items(self):
        """Return [(client_id, (target, new_id))], in no order."""
        cdef size_t i
        cdef list out = []
        for i in range(self.size):
            if self.routes[i].serial:
                out.append((self.routes[i].client_id, (self.targets[i], self.routes[i].new_id)))
        return out

    def __len__(self):
        return self.used

    def __contains__(self, uint32_t client_id):
        return self.routes[self.slot(client_id)].serial != 0


@cython.final
cdef class RelayWalker(FrameWalker):
    """The receiving side of a WebSocket whose streams lead to others (hop 3): rewrites ids and headers in place.

    bytes_routed counts payload bytes handed out in runs; unrouted counts messages of which some or all was dropped
    because their client id leads nowhere.
    """

    cdef readonly uint64_t bytes_routed, unrouted
    cdef uint64_t serial        # of the route that the message at hand takes; 0: it is dropped

    cdef bint choose_route(self, const Found* f, uint64_t serial) noexcept:
        """Whether f may take the route with this serial.

        Later pieces of a message follow its first only while the very same route stands: an id that was freed and
        given to another session in between must not get the rest.
        """
        if f.flags & C_FIRST:
            self.serial = serial
            self.unrouted += 0 if serial else 1
        elif self.serial and self.serial != serial:
            self.serial = 0
            self.unrouted += 1
        return self.serial != 0

    def relay(self, buf, Py_ssize_t start, Py_ssize_t stop, RoutingTable table not None):
        """Route what can be routed in buf[start:stop]; return (runs, event, consumed).

        A run (target, start, stop) is a range of buf with complete unmasked frames for that target. event is the first
        message that is not DATA, CONNECTED or WINDOW in one frame (DATA of a TCP stream: in any form), or None; the
        runs come before it. consumed is as for walk(): call again from there until it stands still, after the runs are
        sent or copied, for up to HEADROOM bytes before it may be overwritten. ValueError if start < HEADROOM.
        """
        cdef Py_buffer view
        cdef Found f
        cdef int got, before
        cdef size_t size, i, pos = <size_t>start
        cdef size_t run_start = 0, run_stop = 0      # the open run, if any; nothing may be written before run_stop
        cdef object run_target = None, target, event = None
        cdef list runs = []
        self.check_alive()
        cdef uint8_t* b = open_buffer(buf, start, stop, &view)
        try:
            if start < C_HEADROOM:
                raise ValueError(f"{start} bytes before what was read, {C_HEADROOM} are needed")
            while len(runs) < MAX_RUNS - 1:      # and the open one
                got = self.find(b, pos, <size_t>stop, &f)
                pos = f.resume
                if got != GOT:
                    if got == BAD and pos == <size_t>start:
                        self.fail()
                    break
                if not is_routed(&f):
                    self.take(b, &f)
                    pos = f.stop
                    event = message(&f)
                    break
                if f.stop - f.start > PIECE_MAX:
                    f.stop = f.start + PIECE_MAX
                    f.flags &= ~C_LAST
                size = f.stop - f.start
                i = table.slot(f.head.client_id)
                if not self.choose_route(&f, table.routes[i].serial) or not (size or f.flags & C_FIRST):
                    self.skip(&f)
                    pos = f.stop
                    continue
                before = ws_header_size(size + C_HEADER_SIZE) + C_HEADER_SIZE
                if f.start - before < run_stop:
                    break       # a fragment's new header would overwrite the run before it: that must go first
                self.take(b, &f)
                pos = f.stop
                f.head.client_id = table.routes[i].new_id
                target = table.targets[i]
                if run_stop and target is run_target and before + size <= SMALL:
                    memmove(b + run_stop + before, b + f.start, size)
                    f.start = run_stop + before
                elif not run_stop or target is not run_target or f.start - before != run_stop:
                    if run_stop:
                        runs.append((run_target, run_start, run_stop))
                    run_target = target
                    run_start = f.start - before
                frame_before(b + f.start, size, &f.head, OP_BINARY, -1)
                run_stop = f.start + size
                self.bytes_routed += size
            if run_stop:
                runs.append((run_target, run_start, run_stop))
            return runs, event, pos
        finally:
            PyBuffer_Release(&view)


cdef inline bint is_routed(const Found* f) noexcept:
    if f.kind == C_DATA and f.head.proto == C_TCP:
        return True
    return not f.piece and f.kind in (C_DATA, C_WINDOW, C_CONNECTED)


@cython.final
cdef class SpliceWalker(FrameWalker):
    """The receiving side of a WebSocket whose binary frames pass to another as they are (hop 2), mask and all.

    bytes_passed counts payload bytes of binary frames, messages those that ended.
    """

    cdef readonly uint64_t bytes_passed, messages
    cdef readonly Py_ssize_t boundary   # where in the last splice() range a passed frame last ended; -1: nowhere

    @property
    def at_boundary(self):
        """Whether the last byte that was passed on ended a frame, so that another frame may follow it."""
        return not self.in_frame

    def splice(self, buf, Py_ssize_t start, Py_ssize_t stop):
        """Return (end, event, consumed): buf[start:end] is to be passed on verbatim.

        event is a control frame or a text message that lies between end and consumed, unmasked in place, and is not
        passed on; without one consumed equals end. The tunnel header is not looked at. FrameViolation as for walk();
        a text message must come in one frame of at most WHOLE bytes, else its code is 1009.
        """
        cdef Py_buffer view
        cdef WsHeader h
        cdef Found f
        cdef uint64_t size
        cdef int got
        cdef size_t pos = <size_t>start
        self.boundary = -1
        self.check_alive()
        cdef uint8_t* b = open_buffer(buf, start, stop, &view)
        try:
            while True:
                if self.in_frame:
                    size = min(self.remaining, <uint64_t>(<size_t>stop - pos))
                    pos += <size_t>size
                    self.bytes_passed += size
                    self.advance(size)
                    if self.in_frame:
                        break
                    self.messages += 0 if self.in_message else 1
                    self.boundary = <Py_ssize_t>pos
                got = self.read_ws_header(b + pos, <size_t>stop - pos, &h)
                if got == GOT and h.opcode == OP_TEXT and not (h.fin and h.length <= C_WHOLE):
                    got = self.refuse(1009, f"a text message is not in one frame of at most {C_WHOLE} bytes")
                if got != GOT:
                    if got == BAD and pos == <size_t>start:
                        self.fail()
                    break
                if h.opcode == OP_TEXT or h.opcode >= OP_CLOSE:
                    f.resume = pos
                    if not self.find_whole(b, <size_t>stop, &h, &f):
                        break
                    self.take(b, &f)
                    return pos, message(&f), f.stop
                self.enter(&h)
                pos += h.size
            return pos, None, pos
        finally:
            PyBuffer_Release(&view)
