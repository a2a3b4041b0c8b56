# What a sender of a kept stream keeps until its peer has it (docs/protocol.md §3, "Streams that outlive links").

cdef list spare_blocks = []     # of the process: blocks that no stream has, SPARE at most


@cython.final
cdef class _Block:
    """A buffer that keeps what is read into it."""

    cdef object view            # of a bytearray that nobody can resize while the view is there
    cdef uint8_t* start
    cdef size_t pieces          # that are in use

    def __cinit__(self):
        cdef bytearray data = PyByteArray_FromStringAndSize(NULL, C_BLOCK)
        self.view = memoryview(data)
        self.start = <uint8_t*>PyByteArray_AS_STRING(data)


@cython.final
@cython.freelist(64)
cdef class _Piece:
    """Bytes that lie together: copies of what was written, or a part of a block, masked with `key`.

    `paid` is what it takes of the budget, if it is a copy.
    """

    cdef bytearray copies
    cdef _Block block           # None for copies
    cdef size_t start, size     # where in the block it is
    cdef Py_ssize_t paid
    cdef long long key

    cdef void read(self, uint8_t* out, size_t start, size_t size) noexcept:
        """Copy size of its bytes, from start on, without the mask."""
        cdef uint8_t[4] key
        if self.block is None:
            memcpy(out, PyByteArray_AS_STRING(self.copies) + start, size)
            return
        memcpy(out, self.block.start + self.start + start, size)
        if self.key >= 0:
            store_be(key, <uint64_t>self.key, 4)
            xor_key(out, size, key, <unsigned int>(start & 3))


cdef class Blocks:
    """Blocks(pool)
--

    What the streams of one endpoint may keep together, and the blocks of BLOCK bytes that bulk of theirs is read into.

    pool: where the bytes come from. `left` are those that nobody has; `take(size)` says that so many more are kept, or
    fewer where that is negative.
    """

    cdef readonly object pool
    cdef readonly Py_ssize_t used   # bytes of the pool
    cdef _Block fresh               # what is read into next, unless a stream has room in its own

    def __init__(self, pool):
        self.pool = pool

    cdef _Block next(self):
        """The block that is to be read into now; None where nothing is left for one."""
        if self.fresh is None and self.pool.left >= C_BLOCK:
            self.fresh = <_Block>spare_blocks.pop() if spare_blocks else _Block()
        return self.fresh

    cdef int take(self) except -1:
        """Something was read into the fresh block: it is a stream's now."""
        self.fresh = None
        return self.spend(C_BLOCK)

    cdef int give_back(self, _Block block) except -1:
        """It is another's now."""
        self.spend(-C_BLOCK)
        keep_spare(block)
        if not self.used and self.fresh is not None:
            keep_spare(self.fresh)
            self.fresh = None
        return 0

    cdef int spend(self, Py_ssize_t size) except -1:
        """A stream keeps so many bytes more, or fewer where size is negative."""
        self.used += size
        self.pool.take(size)
        return 0


cdef int keep_spare(_Block block) except -1:
    if len(spare_blocks) < SPARE:
        spare_blocks.append(block)
    return 0


@cython.final
cdef class Unacked:
    """Unacked(blocks)
--

    The bytes from offset `start` up to `end` of one direction of a stream: those that its peer is not known to have.

    Bulk stays where it was read, masked as it was sent, in blocks that go from stream to stream. The key stays with it,
    so that it can be sent again. What comes in small parts is copied. Where the peer has everything, nothing is kept.

    A transport asks for `space`, reads into it, and `frame` or `came` follows before anything else is done here. Where
    `space` gave none, bytes are read into a buffer of the caller's, behind HEADROOM free ones.
    """

    cdef readonly uint64_t start, end
    cdef Blocks blocks
    cdef list pieces                # None where there are none
    cdef uint64_t first             # the offset of the first piece, at most start
    cdef _Piece copies              # the last piece, as long as small writes may be added to it
    cdef _Block block               # the last one that bulk was read into
    cdef size_t free                # where there is room in it
    cdef _Block reading             # what `space` gave last, until it is known what was read
    cdef size_t at, room            # where in it, and how much
    cdef readonly int bulk          # how many small reads it takes until no bulk is expected

    def __cinit__(self, Blocks blocks not None):
        self.blocks = blocks

    def __len__(self):
        return self.end - self.start

    @property
    def memory(self):
        """The bytes of memory that it takes."""
        cdef _Piece piece
        cdef size_t size = 0
        cdef set blocks = set()
        for piece in self.pieces or ():
            if piece.block is None:
                size += piece.size
            else:
                blocks.add(piece.block)
        return size + len(blocks) * C_BLOCK

    # -- what comes

    def space(self, size_t size):
        """Return where up to size bytes are to be read; None where no bulk is expected, or nothing is left for it."""
        self.reading = None
        if not self.bulk:
            return None
        if self.block is not None and self.free + LEAST_ROOM <= C_BLOCK:     # free may lie behind the block's end
            self.reading, self.at = self.block, self.free
        else:
            self.reading, self.at = self.blocks.next(), C_HEADROOM
            if self.reading is None:
                return None
        self.room = min(size, C_BLOCK - self.at)
        return self.reading.view[self.at:self.at + self.room]

    def frame(self, view, size_t size, uint32_t client_id, long long key=-1):
        """Keep the size bytes that were read last, and return them as a whole DATA frame, masked if key >= 0.

        They lie in `space`, or in view[HEADROOM:] where that gave none; the frame lies there, too, until the next read.
        ValueError if they do not, or the message is over MAX_SEND.
        """
        cdef Header head = Header(C_DATA, C_TCP, client_id, 0)
        cdef _Block block = self.reading
        cdef Py_buffer buffer
        cdef uint8_t* b
        cdef size_t at = self.at
        check_sendable(<Py_ssize_t>size + C_HEADER_SIZE, key)
        if block is not None:
            self.check_read(block, size)
            self.reading = None
            self.keep(block, size, key)
            return block.view[at - frame_before(block.start + at, size, &head, OP_BINARY, key):at + size]
        at = C_HEADROOM
        b = open_buffer(view, C_HEADROOM, C_HEADROOM + <Py_ssize_t>size, &buffer)
        try:
            self.copy(b + at, size)
            return view[at - frame_before(b + at, size, &head, OP_BINARY, key):at + size]
        finally:
            PyBuffer_Release(&buffer)

    def came(self, view, size_t size):
        """Return the size bytes that were read last, as they are; they are not kept. ValueError as of `frame`."""
        cdef _Block block = self.reading
        if block is None:
            return view[C_HEADROOM:C_HEADROOM + size]
        self.check_read(block, size)
        self.reading = None
        return block.view[self.at:self.at + size]

    cdef int check_read(self, _Block block, size_t size) except -1:
        if size > self.room:
            raise ValueError(f"{size} bytes were not read into a space of {self.room}")
        if block is not self.block and block is not self.blocks.fresh:
            raise ValueError("the space has become another stream's since it was given")
        return 0

    cdef int keep(self, _Block block, size_t size, long long key) except -1:
        """Keep what was read into this block: there, if it is much."""
        cdef _Piece piece
        if size < C_BULK:
            return self.copy(block.start + self.at, size)
        if block is not self.block:
            self.blocks.take()
            self.block = block
        piece = _Piece.__new__(_Piece)
        piece.block = block
        piece.start = self.at
        piece.size = size
        piece.key = key
        self.append(piece)
        block.pieces += 1
        self.free = (self.at + size + 2 * C_HEADROOM - 1) & ~<size_t>(C_HEADROOM - 1)
        self.bulk = CALM
        return 0

    def add(self, data):
        """Keep a copy of what comes behind `end`; data is only valid during the call."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.copy(<const uint8_t*>view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    cdef int copy(self, const uint8_t* data, size_t size) except -1:
        cdef _Piece piece = self.copies
        if not size:
            return 0
        if piece is None:
            piece = _Piece.__new__(_Piece)
            piece.copies = PyByteArray_FromStringAndSize(<const char*>data, <Py_ssize_t>size)
            piece.size = size
            self.append(piece)
            self.copies = piece
        else:
            PyByteArray_Resize(piece.copies, <Py_ssize_t>(piece.size + size))
            memcpy(PyByteArray_AS_STRING(piece.copies) + piece.size, data, size)
            piece.size += size
            self.end += size
        self.bulk = CALM if size >= C_BULK else self.bulk - 1 if self.bulk else 0
        return self.pay() if piece.size >= COPIES else 0

    cdef int append(self, _Piece piece) except -1:
        if self.pieces is None:
            self.pieces, self.first = [], self.end
        elif self.copies is not None:
            self.pay()
        self.pieces.append(piece)
        self.end += piece.size
        return 0

    cdef int pay(self) except -1:
        """The copies are out of the budget from now on, and nothing is added to them."""
        cdef _Piece piece = self.copies
        self.copies = None
        piece.paid = <Py_ssize_t>piece.size
        return self.blocks.spend(piece.paid)

    # -- what has arrived

    def ack(self, uint64_t offset):
        """The peer has all before offset. ValueError if that does not lie between `start` and `end`."""
        cdef _Piece piece
        cdef Py_ssize_t count = 0
        cdef list gone
        if not self.start <= offset <= self.end:
            raise ValueError(f"{offset} does not lie between {self.start} and {self.end}")
        self.start = offset
        if self.pieces is None:
            return
        for piece in self.pieces:
            if self.first + piece.size > offset:
                break
            self.first += piece.size
            count += 1
        gone = self.pieces[:count]
        if count == len(self.pieces):
            self.pieces = None
        else:
            del self.pieces[:count]
        for piece in gone:
            self.release(piece)

    cdef int release(self, _Piece piece) except -1:
        cdef _Block block = piece.block
        if block is None:
            if piece is self.copies:
                self.copies = None
            return self.blocks.spend(-piece.paid) if piece.paid else 0
        block.pieces -= 1
        if block.pieces:
            return 0
        if block is self.block:
            self.block = None
        if block is self.reading:
            self.reading = None
        return self.blocks.give_back(block)

    def clear(self):
        """Nothing is sent any more."""
        self.ack(self.end)

    # -- what is sent again

    def read(self, uint64_t offset, uint64_t size):
        """Return size bytes from offset on. ValueError if not all of them are kept."""
        cdef _Piece piece
        cdef uint64_t begin, stop, at = self.first
        cdef bytes out
        cdef uint8_t* p
        if not self.start <= offset <= self.end or size > self.end - offset:
            raise ValueError(f"{size} bytes from {offset} on do not lie between {self.start} and {self.end}")
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        p = <uint8_t*>PyBytes_AS_STRING(out)
        for piece in self.pieces or ():
            if at >= offset + size:
                break
            begin, stop = max(at, offset), min(at + piece.size, offset + size)
            if begin < stop:
                piece.read(p + (begin - offset), <size_t>(begin - at), <size_t>(stop - begin))
            at += piece.size
        return out
