# What is sent: the tunnel header, masks, whole frames (docs/protocol.md §1, RFC 6455 section 5).

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


cdef int frame_before(uint8_t* payload, size_t size, const Header* head, int opcode, long long key) noexcept:
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
    if opcode not in (OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG):
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
