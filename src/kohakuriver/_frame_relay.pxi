# What hops 2 and 3 pass on without looking into it.

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
        message that is not DATA, CONNECTED, WINDOW or ACK in one frame (DATA of a TCP stream: in any form), or None; the
        runs come before it. consumed is as for walk(): call again from there until it stands still, after the runs are
        sent or copied, for up to HEADROOM bytes before it may be overwritten. ValueError if start < HEADROOM.
        """
        cdef Py_buffer view
        cdef Found f
        cdef int got, before
        cdef size_t i, frame, pos = <size_t>start
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
                i = table.slot(f.head.client_id)
                if not self.choose_route(&f, table.routes[i].serial) or not (f.stop > f.start or f.flags & C_FIRST):
                    self.skip(&f)
                    pos = f.stop
                    continue
                before = ws_header_size(f.stop - f.start + C_HEADER_SIZE) + C_HEADER_SIZE
                if f.start - before < run_stop:
                    break       # a fragment's new header would overwrite the run before it: that must go first
                self.take(b, &f)
                pos = f.stop
                f.head.client_id = table.routes[i].new_id
                target = table.targets[i]
                frame = place(b, &f, before, run_stop if target is run_target else 0)
                if not run_stop or target is not run_target or frame != run_stop:
                    if run_stop:
                        runs.append((run_target, run_start, run_stop))
                    run_target = target
                    run_start = frame
                run_stop = f.stop
                self.bytes_routed += f.stop - f.start
            if run_stop:
                runs.append((run_target, run_start, run_stop))
            return runs, event, pos
        finally:
            PyBuffer_Release(&view)


cdef inline bint is_routed(const Found* f) noexcept:
    if f.kind == C_DATA and f.head.proto == C_TCP:
        return True
    return not f.piece and f.kind in (C_DATA, C_WINDOW, C_CONNECTED, C_ACK)


cdef size_t place(uint8_t* b, Found* f, int before, size_t border) noexcept:
    """Make what was found a frame of its own, with headers of `before` bytes; return where the frame begins.

    It stays where it lies, unless it is small and a run to the same target ends at `border` (0: there is none): then it
    moves right behind that, and the run goes on.
    """
    cdef size_t size = f.stop - f.start
    if border and before + size <= SMALL:
        memmove(b + border + before, b + f.start, size)
        f.start = border + before
        f.stop = f.start + size
    frame_before(b + f.start, size, &f.head, OP_BINARY, -1)
    return f.start - before


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
                    got = self.refuse(CLOSE_TOO_BIG, f"a text message is not in one frame of at most {C_WHOLE} bytes")
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
