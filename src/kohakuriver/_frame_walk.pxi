# What is received: frames, and the messages in them, as they arrive (RFC 6455 section 5).

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
            return self.refuse(CLOSE_PROTOCOL_ERROR, "a reserved bit is set and no extension was agreed on")
        if opcode >= OP_CLOSE:
            if opcode > OP_PONG:
                return self.refuse(CLOSE_PROTOCOL_ERROR, "unknown control opcode")
            if not fin:
                return self.refuse(CLOSE_PROTOCOL_ERROR, "a control frame is fragmented")
            if second & 0x7F > 125:
                return self.refuse(CLOSE_PROTOCOL_ERROR, "a control frame is longer than 125 bytes")
            if opcode == OP_CLOSE and second & 0x7F == 1:
                return self.refuse(CLOSE_PROTOCOL_ERROR, "a close frame has half a close code")
        elif opcode > OP_BINARY:
            return self.refuse(CLOSE_PROTOCOL_ERROR, "unknown data opcode")
        if (second & 0x80 != 0) != self.masked:
            return self.refuse(CLOSE_PROTOCOL_ERROR, "a frame is not masked" if self.masked else "a frame is masked")
        if opcode == OP_CONTINUATION and not self.in_message:
            return self.refuse(CLOSE_PROTOCOL_ERROR, "a continuation frame continues nothing")
        if opcode in (OP_TEXT, OP_BINARY) and self.in_message:
            return self.refuse(CLOSE_PROTOCOL_ERROR, "a message begins inside a fragmented message")
        if opcode == OP_TEXT and not self.allow_text:
            return self.refuse(CLOSE_UNSUPPORTED, "text where binary is due")
        return GOT

    cdef int check_message_size(self, const WsHeader* h) except -1:
        cdef uint64_t before = self.message_size if h.opcode == OP_CONTINUATION else 0
        cdef uint8_t opcode = self.message_opcode if h.opcode == OP_CONTINUATION else h.opcode
        if h.length > self.max_message - before:
            return self.refuse(CLOSE_TOO_BIG, f"a message is over the limit of {self.max_message} bytes")
        if h.fin and opcode == OP_BINARY and before + h.length < C_HEADER_SIZE:
            return self.refuse(CLOSE_PROTOCOL_ERROR, "a message is shorter than its header")
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
                return self.refuse(CLOSE_PROTOCOL_ERROR, "a frame claims 2^63 bytes or more")
            if <size_t>ws_header_size(h.length) != h.size:
                return self.refuse(CLOSE_PROTOCOL_ERROR, "a frame's length is not in its shortest form")
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
