# Where the streams of a WebSocket lead that many sessions share (docs/architecture.md).

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
