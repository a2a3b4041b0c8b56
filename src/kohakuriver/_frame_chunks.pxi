# Chunked bodies of HTTP (RFC 9112 section 7.1): the chunks that are there whole, one after the other.
#
# A chunk may have one byte, so that a read of 1 MiB has 170,000 of them. What is not plain is left to
# gateway/chunks.py, which says what is wrong with it.


cdef inline int hex_digit(uint8_t byte) noexcept nogil:
    if 48 <= byte <= 57:
        return byte - 48
    byte |= 32
    return byte - 87 if 97 <= byte <= 102 else -1


cdef Py_ssize_t whole_chunk(const uint8_t *data, Py_ssize_t at, Py_ssize_t stop) noexcept nogil:
    """Where the chunk that begins at `at` ends; `at` where it is the last, not there whole, or not plain."""
    cdef Py_ssize_t begin = at
    cdef uint64_t size = 0
    cdef int digit
    while at < stop and at - begin < C_CHUNK_DIGITS:
        digit = hex_digit(data[at])
        if digit < 0:
            break
        size = size << 4 | <uint64_t>digit
        at += 1
    if at == begin or not size:
        return begin
    if at < stop and data[at] == 59:  # an extension
        at += 1
        while at < stop and at - begin < C_CHUNK_LINE and (data[at] == 9 or data[at] >= 32 and data[at] != 127):
            at += 1
    if stop - at < 4 or at - begin + 2 > C_CHUNK_LINE or data[at] != 13 or data[at + 1] != 10:
        return begin
    at += 2
    if size > <uint64_t>(stop - at) or <uint64_t>(stop - at) - size < 2:
        return begin
    at += <Py_ssize_t>size
    return at + 2 if data[at] == 13 and data[at + 1] == 10 else begin


def whole_chunks(buf, Py_ssize_t start):
    """Where the last of the plain, whole chunks ends that lie behind `start`; `start` if there is none.

    The one of size 0 is not among them.
    """
    cdef Py_buffer view
    cdef Py_ssize_t at, end
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
    try:
        if start < 0 or start > view.len:
            raise ValueError("start is outside of the buffer")
        at = start
        with nogil:
            while True:
                end = whole_chunk(<const uint8_t *>view.buf, at, view.len)
                if end == at:
                    break
                at = end
        return at
    finally:
        PyBuffer_Release(&view)


def chunk_data(buf, Py_ssize_t start, Py_ssize_t stop):
    """What is in the chunks from `start` to `stop`, as `whole_chunks` has found them; bytes."""
    cdef Py_buffer view
    cdef Py_ssize_t at, end, line, size, used = 0
    cdef const uint8_t *data
    cdef bytearray out
    cdef uint8_t *into
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
    try:
        if start < 0 or stop > view.len or start > stop:
            raise ValueError("the chunks are outside of the buffer")
        out = bytearray(stop - start)
        into = out
        data = <const uint8_t *>view.buf
        with nogil:
            at = start
            while at < stop:
                end = whole_chunk(data, at, stop)
                if end == at:
                    break
                line = at
                while data[line] != 10:
                    line += 1
                size = end - 2 - (line + 1)
                memcpy(into + used, data + line + 1, size)
                used += size
                at = end
        return bytes(memoryview(out)[:used])
    finally:
        PyBuffer_Release(&view)
