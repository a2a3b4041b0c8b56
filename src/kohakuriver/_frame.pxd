# cython: language_level=3
"""Constants, structures and byte accessors of the hot path: the only place that knows offsets and byte order.

A caller of an accessor has checked that the bytes are there.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    C_HEADER_SIZE = 8
    C_HEADROOM = 32
    C_MAX_MESSAGE = 16 << 20
    C_MAX_SEND = 1 << 20
    C_WHOLE = 128 << 10
    C_CHUNK_DIGITS = 15
    C_CHUNK_LINE = 1024
    C_FIRST = 1
    C_LAST = 2
    C_TCP = 0
    C_CONNECTED = 0x02
    C_DATA = 0x03
    C_WINDOW = 0x08
    C_ACK = 0x0C
    # Of opcodes: those of data frames are 0 to 2, those of control frames 8 to 10 (RFC 6455 section 5.2).
    OP_CONTINUATION = 0
    OP_TEXT = 1
    OP_BINARY = 2
    OP_CLOSE = 8
    OP_PING = 9
    OP_PONG = 10
    C_WS = 0x100            # a message that is a WebSocket frame of its own: 0x100 + opcode
    # What a frame that relay() writes may hold behind its two headers, and how small a frame is worth moving.
    PIECE_MAX = C_MAX_SEND - 10 - C_HEADER_SIZE
    SMALL = 16 << 10
    MAX_RUNS = 1024
    # What is kept of a stream: the size of a block, and of a read that is kept where it lies; the next one is then made
    # where it can be. After CALM small reads in a row no bulk is expected. With less than LEAST_ROOM left in a block, bulk
    # is read into the next. COPIES bytes of small writes are kept in one piece, and SPARE blocks that nobody has.
    C_BLOCK = 1 << 20
    C_BULK = 16 << 10
    CALM = 8
    LEAST_ROOM = 256 << 10
    COPIES = 64 << 10
    SPARE = 16
    # What a peer that broke the protocol is owed (RFC 6455 section 7.4.1).
    CLOSE_PROTOCOL_ERROR = 1002
    CLOSE_UNSUPPORTED = 1003
    CLOSE_TOO_BIG = 1009
    # Results of a parsing step.
    NEED = 0
    GOT = 1
    BAD = 2


cdef struct Header:
    uint8_t type
    uint8_t proto
    uint32_t client_id
    uint16_t port


cdef struct WsHeader:
    uint8_t opcode
    bint fin
    uint64_t length
    size_t size             # of the header itself, 2 to 14
    uint8_t[4] key


cdef struct Found:
    Header head
    int kind                # what Message calls type
    int flags
    bint piece              # part of the data frame that the walker stands in, rather than a whole frame
    uint8_t[4] key          # of a whole frame
    size_t resume           # consumed up to here if the caller does not take it
    size_t start
    size_t stop


cdef inline uint64_t load_be(const uint8_t* p, int size) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(size):
        value = (value << 8) | p[i]
    return value


cdef inline void store_be(uint8_t* p, uint64_t value, int size) noexcept nogil:
    cdef int i
    for i in range(size):
        p[i] = <uint8_t>(value >> (8 * (size - 1 - i)))


cdef inline void store_header(uint8_t* p, const Header* head) noexcept nogil:
    p[0] = head.type
    p[1] = head.proto
    store_be(p + 2, head.client_id, 4)
    store_be(p + 6, head.port, 2)


cdef inline void load_header(const uint8_t* p, Header* head) noexcept nogil:
    head.type = p[0]
    head.proto = p[1]
    head.client_id = <uint32_t>load_be(p + 2, 4)
    head.port = <uint16_t>load_be(p + 6, 2)


cdef inline int ws_header_size(uint64_t length) noexcept nogil:
    return 2 if length < 126 else 4 if length < 65536 else 10


cdef inline void store_ws_header(uint8_t* p, int opcode, uint64_t length) noexcept nogil:
    """Write a FIN header without a mask, of ws_header_size(length) bytes."""
    p[0] = <uint8_t>(0x80 | opcode)
    if length < 126:
        p[1] = <uint8_t>length
    elif length < 65536:
        p[1] = 126
        store_be(p + 2, length, 2)
    else:
        p[1] = 127
        store_be(p + 2, length, 8)
