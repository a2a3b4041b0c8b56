# cython: language_level=3, auto_pickle=False, infer_types=False
"""What a copy of many small files does for each of them: entries, and batches of files read and written.

A thread lets go of the interpreter for a batch at a time, not for each file. Nothing here follows a link, opens a
folder or knows a path: names are looked up in a folder that is open. Sources: docs/protocol.md §6, "Files".
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, strlen

cimport cython

import os

cdef extern from *:
    """
    #include <errno.h>
    #include <inttypes.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <string.h>

    typedef struct {
        char kind;
        int sparse;
        uint32_t mode, uid, gid, nanoseconds, links;
        int64_t seconds;
        uint64_t size, device, number;
    } kr_about;

    typedef struct {
        const char *name;
        char *data;
        uint32_t size, mode, uid, gid, nanoseconds;
        int64_t seconds;
        int owned, not_owner, failed;
    } kr_file;

    #define KR_NO_FILE (-1)
    #define KR_CHANGED (-2)
    #define KR_PART ".kohakuriver-"

    #ifdef _WIN32
    /* Copies need a Unix system; the rest of the package does not. */
    static void *kr_opened(int folder) { errno = ENOSYS; return NULL; }
    static long kr_names(void *listed, char *into, size_t room) { return -ENOSYS; }
    static void kr_closed(void *listed) {}
    static int kr_stat(int folder, const char *name, kr_about *about) { return ENOSYS; }
    static void kr_read(int folder, kr_file *file) { file->failed = ENOSYS; }
    static void kr_write(int folder, kr_file *file, int beside) { file->failed = ENOSYS; }
    #else
    #include <dirent.h>
    #include <fcntl.h>
    #include <sys/stat.h>
    #include <unistd.h>

    #ifdef __APPLE__
    #define KR_MTIME st_mtimespec
    #else
    #define KR_MTIME st_mtim
    #endif

    static void *kr_opened(int folder) {
        int own = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        DIR *listed = own < 0 ? NULL : fdopendir(own);
        int why = errno;
        if (own >= 0 && listed == NULL)
            close(own);
        errno = why;
        return listed;
    }

    /* Names, each with `d` before it where it is a folder and a NUL behind it: how many bytes; 0 at the end; minus
       errno. */
    static long kr_names(void *listed, char *into, size_t room) {
        size_t used = 0;
        struct stat st;
        while (room - used > 1024) {
            errno = 0;
            struct dirent *each = readdir((DIR *) listed);
            if (each == NULL) {
                if (errno)
                    return -(long) errno;
                break;
            }
            if (strcmp(each->d_name, ".") == 0 || strcmp(each->d_name, "..") == 0)
                continue;
            size_t length = strlen(each->d_name) + 1;
            if (length > 1023)
                return -(long) ENAMETOOLONG;
            into[used] = each->d_type == DT_DIR ? 'd' : '-';
            if (each->d_type == DT_UNKNOWN && !fstatat(dirfd((DIR *) listed), each->d_name, &st, AT_SYMLINK_NOFOLLOW))
                into[used] = S_ISDIR(st.st_mode) ? 'd' : '-';
            memcpy(into + used + 1, each->d_name, length);
            used += 1 + length;
        }
        return (long) used;
    }

    static void kr_closed(void *listed) { closedir((DIR *) listed); }

    static int kr_stat(int folder, const char *name, kr_about *about) {
        struct stat st;
        if (fstatat(folder, name, &st, AT_SYMLINK_NOFOLLOW))
            return errno;
        about->kind = S_ISREG(st.st_mode) ? 'f' : S_ISDIR(st.st_mode) ? 'd' : S_ISLNK(st.st_mode) ? 'l' : 'o';
        about->sparse = (uint64_t) st.st_blocks * 512 < (uint64_t) st.st_size;
        about->mode = st.st_mode & 07777;
        about->uid = st.st_uid;
        about->gid = st.st_gid;
        about->seconds = st.KR_MTIME.tv_sec;
        about->nanoseconds = (uint32_t) st.KR_MTIME.tv_nsec;
        about->size = (uint64_t) st.st_size;
        about->links = (uint32_t) st.st_nlink;
        about->device = (uint64_t) st.st_dev;
        about->number = (uint64_t) st.st_ino;
        return 0;
    }

    /* All bytes of a file that has `size` of them. */
    static void kr_read(int folder, kr_file *file) {
        /* Without waiting: what is a pipe by now would never be opened. */
        int opened = openat(folder, file->name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        struct stat st;
        uint32_t done = 0;
        file->failed = 0;
        if (opened < 0) {
            file->failed = errno;
            return;
        }
        if (fstat(opened, &st))
            file->failed = errno;
        else if (!S_ISREG(st.st_mode))
            file->failed = KR_NO_FILE;
        else if ((uint64_t) st.st_size != file->size)
            file->failed = KR_CHANGED;
        while (!file->failed && done < file->size) {
            ssize_t got = read(opened, file->data + done, file->size - done);
            if (got > 0)
                done += (uint32_t) got;
            else if (got == 0)
                file->failed = KR_CHANGED;
            else if (errno != EINTR)
                file->failed = errno;
        }
        close(opened);
    }

    /* A new file of this name. EEXIST where there is something of that, which is left as it is. */
    static void kr_make(int folder, kr_file *file, const char *name) {
        int opened = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        uint32_t done = 0, mode = file->mode;
        struct timespec times[2];
        file->failed = file->not_owner = 0;
        if (opened < 0) {
            file->failed = errno;
            return;
        }
        while (!file->failed && done < file->size) {
            ssize_t put = write(opened, file->data + done, file->size - done);
            if (put >= 0)
                done += (uint32_t) put;
            else if (errno != EINTR)
                file->failed = errno;
        }
        /* The owner first: who gives a file away takes its special bits. */
        if (!file->failed && file->owned && fchown(opened, file->uid, file->gid)) {
            file->not_owner = 1;
            mode &= 01777;
        }
        times[0].tv_sec = times[1].tv_sec = (time_t) file->seconds;
        times[0].tv_nsec = times[1].tv_nsec = (long) file->nanoseconds;
        if (!file->failed && (fchmod(opened, (mode_t) mode) || futimens(opened, times)))
            file->failed = errno;
        /* Some file systems tell only now that the disk is full. */
        if (close(opened) && !file->failed && errno != EINTR)
            file->failed = errno;
        if (file->failed)
            unlinkat(folder, name, 0);
    }

    /* What a file is called until it takes its place. Other threads write others, whose long names may begin alike. */
    static void kr_beside(const char *name, char *into, size_t room) {
        uint64_t sum = 14695981039346656037u; /* FNV-1a */
        for (const char *at = name; *at; at++)
            sum = (sum ^ (uint8_t) *at) * 1099511628211u;
        snprintf(into, room, ".%.200s" KR_PART "%016" PRIx64 "-new", name, sum);
    }

    /* A file. Where there is something of its name, and with `beside` in any case, it has another until it is whole. */
    static void kr_write(int folder, kr_file *file, int beside) {
        char made[256];
        if (!beside) {
            kr_make(folder, file, file->name);
            if (file->failed != EEXIST)
                return;
        }
        kr_beside(file->name, made, sizeof made);
        unlinkat(folder, made, 0); /* of a copy that was killed */
        kr_make(folder, file, made);
        if (!file->failed && renameat(folder, made, folder, file->name)) {
            file->failed = errno;
            unlinkat(folder, made, 0);
        }
    }
    #endif

    #ifdef __GLIBC__
    #include <malloc.h>
    static void kr_keep_memory(void) {
        mallopt(M_MMAP_THRESHOLD, 16 << 20);
        mallopt(M_TRIM_THRESHOLD, 32 << 20);
    }
    #else
    static void kr_keep_memory(void) {}
    #endif
    """
    void kr_keep_memory() nogil
    ctypedef struct kr_about:
        char kind
        int sparse
        uint32_t mode, uid, gid, nanoseconds, links
        int64_t seconds
        uint64_t size, device, number
    ctypedef struct kr_file:
        const char *name
        char *data
        uint32_t size, mode, uid, gid, nanoseconds
        int64_t seconds
        int owned, not_owner, failed
    int KR_NO_FILE, KR_CHANGED
    const char *KR_PART
    void *kr_opened(int folder) nogil
    long kr_names(void *listed, char *into, size_t room) nogil
    void kr_closed(void *listed) nogil
    int kr_stat(int folder, const char *name, kr_about *about) nogil
    void kr_read(int folder, kr_file *file) nogil
    void kr_write(int folder, kr_file *file, int beside) nogil

from libc.errno cimport ENOENT, errno

NO_FILE = KR_NO_FILE
CHANGED = KR_CHANGED
PART = <bytes> KR_PART

cdef enum:
    LONGEST_PATH = 4096
    LONGEST_NAME = 255
    SECOND = 1000000000
    ENTRY = 52  # bytes of an entry before its path
    ATTRIBUTES = 25
    SPARSE = 1
    TOGETHER = 512  # names that are looked at together
    NAMES = 64 << 10
    FAILED = 0xffffffff

cdef dict KINDS = {ord(each): each for each in "fdloe"}


def keep_memory():
    """Keep what this process frees, up to 32 MiB, for what it allocates next. Only glibc does otherwise: it gives the
    memory of each large read back to the kernel, which has to find and clear pages for the next one. Source:
    mallopt(3).
    """
    kr_keep_memory()


# -- entries -------------------------------------------------------------------------------------------------------


@cython.final
cdef class Entry:
    """One name in a tree.

    `kind` is `f` a file, `d` a folder, `l` a symbolic link, `o` something else, `e` what can't be read. `mtime` is in
    ns since the epoch. `link` is what all names of one file have in common, or None where there is one. `target` is a
    link's, or why nothing can be read.
    """

    cdef readonly bytes path
    cdef readonly str kind
    cdef readonly uint32_t mode
    cdef readonly uint32_t uid
    cdef readonly uint32_t gid
    cdef int64_t seconds
    cdef uint32_t nanoseconds
    cdef readonly uint64_t size
    cdef readonly bint sparse
    cdef uint64_t device
    cdef uint64_t number
    cdef readonly bytes target

    def __init__(
        self, bytes path not None, str kind not None, uint32_t mode=0, uint32_t uid=0, uint32_t gid=0, mtime=0,
        uint64_t size=0, bint sparse=False, link=None, bytes target not None=b"",
    ):
        self.path, self.kind, self.mode, self.uid, self.gid = path, kind, mode, uid, gid
        self.seconds, self.nanoseconds = divmod(mtime, SECOND)
        self.size, self.sparse, self.target = size, sparse, target
        if link is not None:
            self.device, self.number = link

    @property
    def mtime(self):
        return <object> self.seconds * SECOND + self.nanoseconds

    @property
    def link(self):
        return (self.device, self.number) if self.device or self.number else None

    def _all(self):
        return (
            self.path, self.kind, self.mode, self.uid, self.gid, self.mtime, self.size, self.sparse, self.link,
            self.target,
        )

    def __eq__(self, other):
        return self._all() == (<Entry> other)._all() if isinstance(other, Entry) else NotImplemented

    def __hash__(self):
        return hash(self._all())

    def __repr__(self):
        return f"Entry{self._all()}"


cdef inline uint16_t two(const uint8_t *at) noexcept nogil:
    return <uint16_t> (at[0] << 8 | at[1])


cdef inline uint32_t four(const uint8_t *at) noexcept nogil:
    return <uint32_t> at[0] << 24 | <uint32_t> at[1] << 16 | <uint32_t> at[2] << 8 | at[3]


cdef inline uint64_t eight(const uint8_t *at) noexcept nogil:
    return <uint64_t> four(at) << 32 | four(at + 4)


cdef inline void put_two(uint8_t *at, uint32_t value) noexcept nogil:
    at[0], at[1] = value >> 8 & 0xff, value & 0xff


cdef inline void put_four(uint8_t *at, uint32_t value) noexcept nogil:
    put_two(at, value >> 16)
    put_two(at + 2, value)


cdef bint safe_name(const char *name, size_t length) noexcept nogil:
    """Whether this is a name in a folder, and of nothing else."""
    if not 1 <= length <= LONGEST_NAME or memchr(name, 0, length) != NULL or memchr(name, c"/", length) != NULL:
        return False
    return not (name[0] == c"." and (length == 1 or (length == 2 and name[1] == c".")))


cdef bint safe_path(const char *path, size_t length) noexcept nogil:
    cdef const char *slash
    if length > LONGEST_PATH:
        return False
    while True:
        slash = <const char *> memchr(path, c"/", length)
        if slash == NULL:
            return safe_name(path, length)
        if not safe_name(path, slash - path):
            return False
        length -= slash - path + 1
        path = slash + 1


def is_safe(bytes path not None):
    """Whether a path that a peer says stays below where it begins, by its names."""
    return bool(safe_path(PyBytes_AS_STRING(path), PyBytes_GET_SIZE(path)))


cdef Entry entry_at(const uint8_t *at, size_t left, size_t *used):
    """The entry that begins there. Raises ValueError."""
    cdef Entry entry
    cdef size_t named, said
    cdef const uint8_t *path
    if left < ENTRY + 2:
        raise ValueError("an entry that is cut off")
    named = two(at + ENTRY - 2)
    path = at + ENTRY
    if left < ENTRY + named + 2:
        raise ValueError("an entry that is cut off")
    said = two(path + named)
    used[0] = ENTRY + named + 2 + said
    kind = KINDS.get(at[0])
    # The root itself has no name here.
    named_well = safe_path(<const char *> path, named) or (named == 0 and (at[0] == c"d" or at[0] == c"e"))
    if (
        left < used[0] or kind is None or not named_well or memchr(path + named + 2, 0, said) != NULL
        or four(at + 22) >= SECOND or eight(at + 26) >> 62
    ):
        raise ValueError("an entry that is none")
    entry = Entry.__new__(Entry)
    entry.path = PyBytes_FromStringAndSize(<const char *> path, named)
    entry.kind = kind
    entry.mode, entry.uid, entry.gid = four(at + 2) & 0o7777, four(at + 6), four(at + 10)
    entry.seconds, entry.nanoseconds = <int64_t> eight(at + 14), four(at + 22)
    entry.size, entry.sparse = eight(at + 26), at[1] & SPARSE != 0
    entry.device, entry.number = eight(at + 34), eight(at + 42)
    entry.target = PyBytes_FromStringAndSize(<const char *> path + named + 2, said)
    return entry


def entries_in(payload):
    """The entries of one answer. Raises ValueError where it makes no sense, or a path leads away."""
    cdef Py_buffer view
    cdef size_t at = 0, used = 0
    cdef list found = []
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    try:
        while at < <size_t> view.len:
            found.append(entry_at(<const uint8_t *> view.buf + at, view.len - at, &used))
            at += used
    finally:
        PyBuffer_Release(&view)
    return found


def names_in(int folder):
    """The names in a folder that is open, in order, and those of them that are folders. Raises OSError."""
    cdef char *names
    cdef void *listed
    cdef long used, at
    cdef list found = [], folders = []
    with nogil:
        listed = kr_opened(folder)
    if listed == NULL:
        raise OSError(errno, os.strerror(errno))
    names = <char *> malloc(NAMES)
    try:
        if names == NULL:
            raise MemoryError
        while True:
            with nogil:
                used = kr_names(listed, names, NAMES)
            if used < 0:
                raise OSError(-used, os.strerror(-used))
            if used == 0:
                break
            at = 0
            while at < used:
                name = <bytes> (names + at + 1)
                found.append(name)
                if names[at] == c"d":
                    folders.append(name)
                at += PyBytes_GET_SIZE(name) + 2
    finally:
        free(names)
        kr_closed(listed)
    found.sort()
    folders.sort()
    return found, folders


def entries_of(int folder, bytes prefix not None, list names not None):
    """What some names in a folder are, their paths beginning with `prefix`; what is gone by now is left out."""
    cdef Py_ssize_t count = len(names), number
    cdef kr_about *about = <kr_about *> malloc(TOGETHER * sizeof(kr_about))
    cdef const char **named = <const char **> malloc(TOGETHER * sizeof(char *))
    cdef int *failed = <int *> malloc(TOGETHER * sizeof(int))
    cdef list found = []
    try:
        if count > TOGETHER:
            raise ValueError("more names than are looked at together")
        if about == NULL or named == NULL or failed == NULL:
            raise MemoryError
        for number in range(count):
            named[number] = PyBytes_AS_STRING(<bytes?> names[number])
        with nogil:
            for number in range(count):
                failed[number] = kr_stat(folder, named[number], about + number)
        for number in range(count):
            if failed[number] == 0:
                found.append(entry_of(about + number, folder, prefix, names[number]))
            elif failed[number] != ENOENT:
                found.append(Entry(prefix + names[number], "e", target=os.fsencode(os.strerror(failed[number]))))
    finally:
        free(about)
        free(named)
        free(failed)
    return found


cdef Entry entry_of(const kr_about *about, int folder, bytes prefix, bytes name):
    cdef Entry entry = Entry.__new__(Entry)
    entry.path = prefix + name
    entry.kind = KINDS[about.kind]
    entry.mode, entry.uid, entry.gid = about.mode, about.uid, about.gid
    entry.seconds, entry.nanoseconds = about.seconds, about.nanoseconds
    entry.target = b""
    if about.kind == c"f":
        entry.size, entry.sparse = about.size, about.sparse != 0
        if about.links > 1:
            entry.device, entry.number = about.device, about.number
    elif about.kind == c"l":
        try:
            entry.target = os.readlink(name, dir_fd=folder)
        except OSError as error:
            return Entry(entry.path, "e", target=os.fsencode(error.strerror or str(error)))
    return entry


# -- batches of small files ----------------------------------------------------------------------------------------
#
# A batch is a list of pairs: an Entry, and the path that it has at the other end. Contents are, for each file of a
# batch, u32 size and its bytes, or 0xffffffff, u16 length and why there are none.


def pack_wanted(list batch not None):
    """What a request for a batch's contents has: paths, and the sizes that they had."""
    cdef Entry entry
    cdef uint8_t *to
    cdef Py_ssize_t size = 0
    for entry, _ in batch:
        size += 2 + PyBytes_GET_SIZE(entry.path) + 4
    packed = PyBytes_FromStringAndSize(NULL, size)
    to = <uint8_t *> PyBytes_AS_STRING(packed)
    for entry, _ in batch:
        to = put_path(to, entry.path)
        put_four(to, <uint32_t> entry.size)
        to += 4
    return packed


def pack_heads(list batch not None, bint owner):
    """What stands before a batch's contents where it is written: paths and attributes. `owner` is kept or not."""
    cdef Entry entry
    cdef bytes path
    cdef uint8_t *to
    cdef Py_ssize_t size = 0
    for _, path in batch:
        size += 2 + PyBytes_GET_SIZE(path) + ATTRIBUTES
    packed = PyBytes_FromStringAndSize(NULL, size)
    to = <uint8_t *> PyBytes_AS_STRING(packed)
    for entry, path in batch:
        to = put_path(to, path)
        put_four(to, mode_of(entry, owner))
        to[4] = owner
        put_four(to + 5, entry.uid if owner else 0)
        put_four(to + 9, entry.gid if owner else 0)
        put_four(to + 13, <uint32_t> (<uint64_t> entry.seconds >> 32))
        put_four(to + 17, <uint32_t> (<uint64_t> entry.seconds & 0xffffffff))
        put_four(to + 21, entry.nanoseconds)
        to += ATTRIBUTES
    return packed


cdef inline uint32_t mode_of(Entry entry, bint owner) noexcept:
    """The bits that lend an owner's rights are kept with the owner alone."""
    return entry.mode if owner else entry.mode & 0o1777


cdef inline uint8_t *put_path(uint8_t *to, bytes path) noexcept:
    cdef Py_ssize_t length = PyBytes_GET_SIZE(path)
    put_two(to, <uint32_t> length)
    memcpy(to + 2, PyBytes_AS_STRING(path), length)
    return to + 2 + length


cdef Py_ssize_t name_at(bytes path) noexcept:
    """Where the name begins in a path."""
    cdef const char *text = PyBytes_AS_STRING(path)
    cdef Py_ssize_t at = PyBytes_GET_SIZE(path)
    while at > 0 and text[at - 1] != c"/":
        at -= 1
    return at


cdef Py_ssize_t alike(list batch, Py_ssize_t start, bint there) except -1:
    """The end of those from `start` on that are in one folder."""
    cdef bytes first = batch[start][1 if there else 0] if there else (<Entry?> batch[start][0]).path
    cdef bytes path
    cdef Py_ssize_t stop = start + 1, folder = name_at(first), count = len(batch)
    while stop < count:
        path = batch[stop][1] if there else (<Entry?> batch[stop][0]).path
        if name_at(path) != folder or memcmp(PyBytes_AS_STRING(path), PyBytes_AS_STRING(first), folder):
            break
        stop += 1
    return stop


def read_batch(list batch not None, Py_ssize_t start, int folder, buffer, Py_ssize_t at):
    """Read the files of a batch from `start` on that are in one folder; their contents stand in `buffer` from `at` on.
    `folder` is where that is open, or minus the errno why it is not.

    Returns where the next one of another folder is, where its contents begin, and which could not be read: their
    numbers and errno, or NO_FILE or CHANGED. `buffer` has to be large enough, which ValueError says.
    """
    cdef Py_buffer view
    cdef Entry entry
    cdef Py_ssize_t stop = alike(batch, start, False), number, where = at
    cdef kr_file *files = <kr_file *> malloc((stop - start) * sizeof(kr_file))
    cdef kr_file *file
    cdef uint8_t *to
    cdef list failed = []
    if files == NULL:
        raise MemoryError
    try:
        for number in range(start, stop):
            entry = batch[number][0]
            where += 6 + entry.size
            file = files + (number - start)
            file.name = PyBytes_AS_STRING(entry.path) + name_at(entry.path)
            file.size = <uint32_t> entry.size
            if entry.size >= FAILED or not safe_name(file.name, PyBytes_GET_SIZE(entry.path) - name_at(entry.path)):
                raise ValueError("no small file, or no name")
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            if at < 0 or where > view.len:
                raise ValueError("more than there is room for")
            to = <uint8_t *> view.buf + at
            with nogil:
                for number in range(stop - start):
                    file = files + number
                    file.data = <char *> to + 4
                    if folder < 0:
                        file.failed = -folder
                    else:
                        kr_read(folder, file)
                    if file.failed:
                        put_four(to, FAILED)
                        put_two(to + 4, 0)
                        to += 6
                    else:
                        put_four(to, file.size)
                        to += 4 + file.size
            at = to - <uint8_t *> view.buf
        finally:
            PyBuffer_Release(&view)
        for number in range(stop - start):
            if files[number].failed:
                failed.append((start + number, files[number].failed))
    finally:
        free(files)
    return stop, at, failed


def write_batch(list batch not None, Py_ssize_t start, int folder, contents, Py_ssize_t at, bint owner, bint beside):
    """Make those of a batch from `start` on that are in one folder at this end. `contents` begin at `at`.
    `folder` is as in `read_batch`. With `beside` no file has its name before it is whole; else those alone that take
    the place of others.

    Returns where the next one of another folder is, where its contents begin, how many could not be given their
    owner, and which could not be made: their numbers and errno. ValueError: what `contents_in` finds wrong with the
    contents, or a name that is none.
    """
    cdef Py_buffer view
    cdef Entry entry
    cdef bytes path
    cdef Py_ssize_t stop = alike(batch, start, True), number, size
    cdef kr_file *files = <kr_file *> malloc((stop - start) * sizeof(kr_file))
    cdef kr_file *file
    cdef int not_owner = 0
    cdef list failed = []
    if files == NULL:
        raise MemoryError
    try:
        PyObject_GetBuffer(contents, &view, PyBUF_SIMPLE)
        try:
            for number in range(start, stop):
                entry, path = batch[number]
                file = files + (number - start)
                file.name = PyBytes_AS_STRING(path) + name_at(path)
                if not safe_name(file.name, PyBytes_GET_SIZE(path) - name_at(path)):
                    raise ValueError("no name")
                at = file_at(&view, at, entry.size, &size)
                file.data = <char *> view.buf + at - size
                file.size = <uint32_t> size
                if size < 0:
                    file.data = NULL
                file.owned, file.mode, file.uid, file.gid = owner, mode_of(entry, owner), entry.uid, entry.gid
                file.seconds, file.nanoseconds = entry.seconds, entry.nanoseconds
            with nogil:
                for number in range(stop - start):
                    file = files + number
                    file.failed = file.not_owner = 0
                    if file.data == NULL:
                        continue
                    if folder < 0:
                        file.failed = -folder
                    else:
                        kr_write(folder, file, beside)
                    not_owner += file.not_owner
            for number in range(stop - start):
                file = files + number
                if file.failed:
                    failed.append((start + number, file.failed))
        finally:
            PyBuffer_Release(&view)
    finally:
        free(files)
    return stop, at, not_owner, failed


cdef Py_ssize_t file_at(const Py_buffer *view, Py_ssize_t at, uint64_t wanted, Py_ssize_t *size) except -1:
    """Where the contents of the file that begins there end, and its size, which is -1 where there is none."""
    cdef const uint8_t *here = <const uint8_t *> view.buf + at
    cdef uint32_t length
    if at < 0 or view.len - at < 4:
        raise ValueError("contents that are cut off")
    length = four(here)
    size[0] = length
    at += 4
    if length == FAILED:
        size[0] = -1
        if view.len - at < 2:
            raise ValueError("contents that are cut off")
        length = two(here + 4)
        at += 2
    elif length != wanted:
        raise ValueError("contents of another size")
    if view.len - at < length:
        raise ValueError("contents that are cut off")
    return at + length


def contents_in(list batch not None, contents):
    """Which files of a batch have no contents, by number, and why, as the other end says it.

    Raises ValueError where these are no contents of the batch.
    """
    cdef Py_buffer view
    cdef Entry entry
    cdef Py_ssize_t at = 0, size, number = 0, start
    cdef list failed = []
    PyObject_GetBuffer(contents, &view, PyBUF_SIMPLE)
    try:
        for entry, _ in batch:
            start = at + 6
            at = file_at(&view, at, entry.size, &size)
            if size < 0:
                failed.append((number, PyBytes_FromStringAndSize(<const char *> view.buf + start, at - start)))
            number += 1
        if at != view.len:
            raise ValueError("more contents than files")
    finally:
        PyBuffer_Release(&view)
    return failed
