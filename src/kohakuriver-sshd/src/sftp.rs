//! The file server behind the `sftp` subsystem: version 3 (draft-ietf-secsh-filexfer-02) with OpenSSH's extensions.
//!
//! It runs in a thread of its own and may wait for a disk; the connection sees it as one more socket.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, File, Metadata, OpenOptions, Permissions, ReadDir};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::wire::{Malformed, Put, Reader};

const VERSION: u32 = 3;
const LONGEST: u32 = 256 * 1024;
/// The most data in one read or write.
const DATA: u32 = LONGEST - 1024;
const MOST_HANDLES: usize = 256;
const NAMES_AT_ONCE: usize = 128;

mod kind {
    pub const INIT: u8 = 1;
    pub const VERSION: u8 = 2;
    pub const OPEN: u8 = 3;
    pub const CLOSE: u8 = 4;
    pub const READ: u8 = 5;
    pub const WRITE: u8 = 6;
    pub const LSTAT: u8 = 7;
    pub const FSTAT: u8 = 8;
    pub const SETSTAT: u8 = 9;
    pub const FSETSTAT: u8 = 10;
    pub const OPENDIR: u8 = 11;
    pub const READDIR: u8 = 12;
    pub const REMOVE: u8 = 13;
    pub const MKDIR: u8 = 14;
    pub const RMDIR: u8 = 15;
    pub const REALPATH: u8 = 16;
    pub const STAT: u8 = 17;
    pub const RENAME: u8 = 18;
    pub const READLINK: u8 = 19;
    pub const SYMLINK: u8 = 20;
    pub const STATUS: u8 = 101;
    pub const HANDLE: u8 = 102;
    pub const DATA: u8 = 103;
    pub const NAME: u8 = 104;
    pub const ATTRS: u8 = 105;
    pub const EXTENDED: u8 = 200;
    pub const EXTENDED_REPLY: u8 = 201;
}

mod status {
    pub const OK: u32 = 0;
    pub const EOF: u32 = 1;
    pub const NO_SUCH_FILE: u32 = 2;
    pub const PERMISSION_DENIED: u32 = 3;
    pub const FAILURE: u32 = 4;
    pub const BAD_MESSAGE: u32 = 5;
    pub const UNSUPPORTED: u32 = 8;
}

const EXTENSIONS: [(&str, &str); 8] = [
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
    ("expand-path@openssh.com", "1"),
];

/// Starts a server; gives the socket to reach it by. Relative paths begin at `home`. Calls `ended` in the end.
pub fn start(home: PathBuf, ended: impl FnOnce() + Send + 'static) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let serve = move || {
        // The end of the socket is the normal end, and any other is told by closing it.
        let _ = Server {
            home,
            handles: HashMap::new(),
            next: 0,
            users: Names::default(),
        }
        .serve(&theirs);
        drop(theirs);
        ended();
    };
    thread::Builder::new()
        .name("sftp".into())
        .stack_size(512 * 1024)
        .spawn(serve)?;
    Ok(ours.into())
}

enum Handle {
    File {
        file: File,
        append: bool,
    },
    Directory {
        path: PathBuf,
        entries: ReadDir,
        dots: bool,
    },
}

/// Why a request isn't done.
enum Refused {
    Status(u32, &'static str),
    Io(io::Error),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Malformed> for Refused {
    fn from(_: Malformed) -> Self {
        Self::Status(status::BAD_MESSAGE, "the request is malformed")
    }
}

impl Refused {
    fn put(&self, reply: &mut Vec<u8>) {
        let (code, sentence) = match self {
            Self::Status(code, sentence) => (*code, (*sentence).to_owned()),
            Self::Io(error) => {
                let code = match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => status::NO_SUCH_FILE,
                    io::ErrorKind::PermissionDenied => status::PERMISSION_DENIED,
                    io::ErrorKind::Unsupported => status::UNSUPPORTED,
                    _ => status::FAILURE,
                };
                (code, error.to_string())
            }
        };
        reply.put_u32(code);
        reply.put_string(sentence.as_bytes());
        reply.put_string(b"");
    }
}

/// The kind of a reply; its content has been appended.
type Done = Result<u8, Refused>;

struct Server {
    home: PathBuf,
    handles: HashMap<u32, Handle>,
    next: u32,
    users: Names,
}

impl Server {
    fn serve(mut self, socket: &UnixStream) -> io::Result<()> {
        let mut input = BufReader::with_capacity(128 * 1024, socket);
        let (mut request, mut reply) = (Vec::new(), Vec::new());
        loop {
            let mut head = [0; 4];
            input.read_exact(&mut head)?;
            let length = u32::from_be_bytes(head);
            if length == 0 || length > LONGEST {
                return Err(io::ErrorKind::InvalidData.into());
            }
            request.resize(length as usize, 0);
            input.read_exact(&mut request)?;
            reply.clear();
            self.answer(&request, &mut reply)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
            let length = (reply.len() - 4) as u32;
            reply[..4].copy_from_slice(&length.to_be_bytes());
            (&*socket).write_all(&reply)?;
        }
    }

    fn answer(&mut self, request: &[u8], reply: &mut Vec<u8>) -> Result<(), Malformed> {
        let mut reader = Reader::new(request);
        let number = reader.u8()?;
        reply.put_raw(&[0; 5]);
        if number == kind::INIT {
            reply[4] = kind::VERSION;
            reply.put_u32(VERSION);
            for (name, version) in EXTENSIONS {
                reply.put_string(name.as_bytes());
                reply.put_string(version.as_bytes());
            }
            return Ok(());
        }
        reply.put_u32(reader.u32()?);
        let start = reply.len();
        reply[4] = match self.request(number, &mut reader, reply) {
            Ok(made) => made,
            Err(refused) => {
                reply.truncate(start);
                refused.put(reply);
                kind::STATUS
            }
        };
        Ok(())
    }

    fn request(&mut self, number: u8, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        match number {
            kind::OPEN => self.open(reader, reply),
            kind::CLOSE => {
                let id = handle_id(reader)?;
                self.handles.remove(&id).ok_or(no_handle())?;
                done(reply)
            }
            kind::READ => self.read(reader, reply),
            kind::WRITE => self.write(reader, reply),
            kind::LSTAT => attributes(&fs::symlink_metadata(self.path(reader)?)?, reply),
            kind::STAT => attributes(&fs::metadata(self.path(reader)?)?, reply),
            kind::FSTAT => attributes(&self.file(reader)?.0.metadata()?, reply),
            kind::SETSTAT => {
                let path = self.path(reader)?;
                Wanted::read(reader)?.apply(&path, true)?;
                done(reply)
            }
            kind::FSETSTAT => {
                let file = self.file(reader)?.0;
                Wanted::read(reader)?.apply_to_file(file)?;
                done(reply)
            }
            kind::OPENDIR => {
                let path = self.path(reader)?;
                let entries = fs::read_dir(&path)?;
                self.keep(
                    Handle::Directory {
                        path,
                        entries,
                        dots: true,
                    },
                    reply,
                )
            }
            kind::READDIR => self.read_directory(reader, reply),
            kind::REMOVE => {
                fs::remove_file(self.path(reader)?)?;
                done(reply)
            }
            kind::MKDIR => {
                let path = self.path(reader)?;
                let mode = Wanted::read(reader)?.mode.unwrap_or(0o777);
                fs::DirBuilder::new().mode(mode & 0o7777).create(path)?;
                done(reply)
            }
            kind::RMDIR => {
                fs::remove_dir(self.path(reader)?)?;
                done(reply)
            }
            kind::REALPATH => {
                let path = real_path(&self.path(reader)?)?;
                one_name(&path, reply)
            }
            kind::RENAME => {
                let (from, to) = (self.path(reader)?, self.path(reader)?);
                if fs::symlink_metadata(&to).is_ok() {
                    return Err(Refused::Status(
                        status::FAILURE,
                        "there is something of that name already",
                    ));
                }
                fs::rename(from, to)?;
                done(reply)
            }
            kind::READLINK => one_name(&fs::read_link(self.path(reader)?)?, reply),
            kind::SYMLINK => {
                // OpenSSH's order, not the draft's: what it points to comes first.
                let target = PathBuf::from(OsStr::from_bytes(reader.string()?));
                std::os::unix::fs::symlink(target, self.path(reader)?)?;
                done(reply)
            }
            kind::EXTENDED => self.extended(reader, reply),
            _ => Err(Refused::Status(
                status::UNSUPPORTED,
                "there is no such request",
            )),
        }
    }

    fn extended(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        match reader.string()? {
            b"posix-rename@openssh.com" => fs::rename(self.path(reader)?, self.path(reader)?)?,
            b"hardlink@openssh.com" => fs::hard_link(self.path(reader)?, self.path(reader)?)?,
            b"fsync@openssh.com" => self.file(reader)?.0.sync_all()?,
            b"lsetstat@openssh.com" => {
                let path = self.path(reader)?;
                Wanted::read(reader)?.apply(&path, false)?;
            }
            b"statvfs@openssh.com" => {
                let file = OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_PATH)
                    .open(self.path(reader)?)?;
                return file_system(&file, reply);
            }
            b"fstatvfs@openssh.com" => return file_system(self.file(reader)?.0, reply),
            b"limits@openssh.com" => {
                for limit in [LONGEST, DATA, DATA, MOST_HANDLES as u32] {
                    reply.put_u64(limit.into());
                }
                return Ok(kind::EXTENDED_REPLY);
            }
            b"expand-path@openssh.com" => {
                let path = self.expand(reader.string()?)?;
                return one_name(&real_path(&path)?, reply);
            }
            _ => {
                return Err(Refused::Status(
                    status::UNSUPPORTED,
                    "there is no such extension",
                ));
            }
        }
        done(reply)
    }

    /// The next string as a path; relative ones begin at home.
    fn path(&self, reader: &mut Reader<'_>) -> Result<PathBuf, Malformed> {
        Ok(self.home.join(OsStr::from_bytes(reader.string()?)))
    }

    /// `~` is home, as a shell has it; other users' homes aren't known here.
    fn expand(&self, path: &[u8]) -> Result<PathBuf, Refused> {
        match path {
            b"~" => Ok(self.home.clone()),
            [b'~', b'/', rest @ ..] => Ok(self.home.join(OsStr::from_bytes(rest))),
            [b'~', ..] => Err(Refused::Status(
                status::FAILURE,
                "the home of another user isn't known",
            )),
            _ => Ok(self.home.join(OsStr::from_bytes(path))),
        }
    }

    fn keep(&mut self, handle: Handle, reply: &mut Vec<u8>) -> Done {
        if self.handles.len() >= MOST_HANDLES {
            return Err(Refused::Status(status::FAILURE, "too many files are open"));
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.handles.insert(id, handle);
        reply.put_string(&id.to_be_bytes());
        Ok(kind::HANDLE)
    }

    fn file(&self, reader: &mut Reader<'_>) -> Result<(&File, bool), Refused> {
        match self.handles.get(&handle_id(reader)?) {
            Some(Handle::File { file, append }) => Ok((file, *append)),
            _ => Err(no_handle()),
        }
    }

    fn open(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        const READ: u32 = 1;
        const WRITE: u32 = 2;
        const APPEND: u32 = 4;
        const CREATE: u32 = 8;
        const TRUNCATE: u32 = 16;
        const EXCLUSIVE: u32 = 32;
        let (path, flags) = (self.path(reader)?, reader.u32()?);
        let wanted = Wanted::read(reader)?;
        let has = |flag: u32| flags & flag != 0;
        let mut options = OpenOptions::new();
        // By hand, as the standard library refuses combinations that clients use.
        let extra = [
            (CREATE, libc::O_CREAT),
            (TRUNCATE, libc::O_TRUNC),
            (EXCLUSIVE, libc::O_EXCL),
        ];
        let extra = extra
            .iter()
            .filter(|(flag, _)| has(*flag))
            .fold(0, |all, (_, flag)| all | flag);
        options
            .read(has(READ) || !has(WRITE))
            .write(has(WRITE))
            .append(has(APPEND) && has(WRITE));
        options
            .custom_flags(extra)
            .mode(wanted.mode.unwrap_or(0o666) & 0o7777);
        let file = options.open(path)?;
        self.keep(
            Handle::File {
                file,
                append: has(APPEND),
            },
            reply,
        )
    }

    fn read(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        let file = self.file(reader)?.0;
        let (offset, length) = (reader.u64()?, reader.u32()?.min(DATA) as usize);
        let place = reply.len();
        reply.put_u32(0);
        let start = reply.len();
        reply.resize(start + length, 0);
        let count = file.read_at(&mut reply[start..], offset)?;
        if count == 0 && length > 0 {
            return Err(Refused::Status(status::EOF, "end of file"));
        }
        reply.truncate(start + count);
        reply[place..start].copy_from_slice(&(count as u32).to_be_bytes());
        Ok(kind::DATA)
    }

    fn write(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        let (mut file, append) = self.file(reader)?;
        let (offset, data) = (reader.u64()?, reader.string()?);
        if append {
            file.write_all(data)?;
        } else {
            file.write_all_at(data, offset)?;
        }
        done(reply)
    }

    fn read_directory(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        let id = handle_id(reader)?;
        let Some(Handle::Directory {
            path,
            entries,
            dots,
        }) = self.handles.get_mut(&id)
        else {
            return Err(no_handle());
        };
        let place = reply.len();
        reply.put_u32(0);
        let mut count = 0u32;
        if std::mem::take(dots) {
            for name in [".", ".."] {
                if let Ok(meta) = fs::metadata(path.join(name)) {
                    put_entry(OsStr::new(name), &meta, &mut self.users, reply);
                    count += 1;
                }
            }
        }
        for entry in entries.by_ref().take(NAMES_AT_ONCE) {
            let entry = entry?;
            // What was removed meanwhile isn't there any more.
            if let Ok(meta) = entry.metadata() {
                put_entry(&entry.file_name(), &meta, &mut self.users, reply);
                count += 1;
            }
        }
        if count == 0 {
            return Err(Refused::Status(status::EOF, "no more names"));
        }
        reply[place..place + 4].copy_from_slice(&count.to_be_bytes());
        Ok(kind::NAME)
    }
}

fn no_handle() -> Refused {
    Refused::Status(status::FAILURE, "there is no such handle")
}

fn handle_id(reader: &mut Reader<'_>) -> Result<u32, Malformed> {
    reader
        .string()?
        .try_into()
        .map(u32::from_be_bytes)
        .map_err(|_| Malformed)
}

fn done(reply: &mut Vec<u8>) -> Done {
    Refused::Status(status::OK, "").put(reply);
    Ok(kind::STATUS)
}

fn attributes(meta: &Metadata, reply: &mut Vec<u8>) -> Done {
    put_attributes(meta, reply);
    Ok(kind::ATTRS)
}

fn one_name(path: &Path, reply: &mut Vec<u8>) -> Done {
    let name = path.as_os_str().as_bytes();
    reply.put_u32(1);
    reply.put_string(name);
    reply.put_string(name);
    reply.put_u32(0);
    Ok(kind::NAME)
}

/// The full path without links. The last part may be missing: clients ask before they create it.
fn real_path(path: &Path) -> io::Result<PathBuf> {
    match (path.canonicalize(), path.parent(), path.file_name()) {
        (Err(error), Some(parent), Some(name)) if error.kind() == io::ErrorKind::NotFound => {
            Ok(parent.canonicalize()?.join(name))
        }
        (result, ..) => result,
    }
}

const HAS_SIZE: u32 = 1;
const HAS_OWNER: u32 = 2;
const HAS_MODE: u32 = 4;
const HAS_TIMES: u32 = 8;

fn put_attributes(meta: &Metadata, reply: &mut Vec<u8>) {
    reply.put_u32(HAS_SIZE | HAS_OWNER | HAS_MODE | HAS_TIMES);
    reply.put_u64(meta.len());
    for value in [
        meta.uid(),
        meta.gid(),
        meta.mode(),
        short_time(meta.atime()),
        short_time(meta.mtime()),
    ] {
        reply.put_u32(value);
    }
}

/// The protocol counts seconds in 32 bits.
fn short_time(seconds: i64) -> u32 {
    u32::try_from(seconds.max(0)).unwrap_or(u32::MAX)
}

/// Attributes that a client wants a file to have.
#[derive(Debug, Default)]
struct Wanted {
    size: Option<u64>,
    owner: Option<(u32, u32)>,
    mode: Option<u32>,
    times: Option<(u32, u32)>,
}

impl Wanted {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let flags = reader.u32()?;
        let mut wanted = Self::default();
        if flags & HAS_SIZE != 0 {
            wanted.size = Some(reader.u64()?);
        }
        if flags & HAS_OWNER != 0 {
            wanted.owner = Some((reader.u32()?, reader.u32()?));
        }
        if flags & HAS_MODE != 0 {
            wanted.mode = Some(reader.u32()?);
        }
        if flags & HAS_TIMES != 0 {
            wanted.times = Some((reader.u32()?, reader.u32()?));
        }
        Ok(wanted)
    }

    /// Size, owner, mode, then times: each would change what comes after it, the other way round.
    fn apply_to_file(&self, file: &File) -> io::Result<()> {
        if let Some(size) = self.size {
            file.set_len(size)?;
        }
        if let Some((user, group)) = self.owner {
            std::os::unix::fs::fchown(file, Some(user), Some(group))?;
        }
        if let Some(mode) = self.mode {
            file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        }
        if let Some((accessed, modified)) = self.times {
            let times = fs::FileTimes::new()
                .set_accessed(moment(accessed))
                .set_modified(moment(modified));
            file.set_times(times)?;
        }
        Ok(())
    }

    fn apply(&self, path: &Path, follow: bool) -> io::Result<()> {
        if let Some(size) = self.size {
            if !follow {
                return Err(io::ErrorKind::Unsupported.into());
            }
            OpenOptions::new().write(true).open(path)?.set_len(size)?;
        }
        if let Some((user, group)) = self.owner {
            let change = if follow {
                std::os::unix::fs::chown
            } else {
                std::os::unix::fs::lchown
            };
            change(path, Some(user), Some(group))?;
        }
        // A link has no mode of its own.
        let is_link = !follow && fs::symlink_metadata(path)?.is_symlink();
        if let Some(mode) = self.mode.filter(|_| !is_link) {
            fs::set_permissions(path, Permissions::from_mode(mode & 0o7777))?;
        }
        self.times
            .map_or(Ok(()), |times| set_times(path, times, follow))
    }
}

fn moment(seconds: u32) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds.into())
}

fn set_times(path: &Path, (accessed, modified): (u32, u32), follow: bool) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let time = |seconds: u32| libc::timespec {
        tv_sec: seconds.into(),
        tv_nsec: 0,
    };
    let times = [time(accessed), time(modified)];
    let flags = if follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW };
    // SAFETY: the path ends in a zero, and the call reads two timespecs.
    let result = unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), flags) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// OpenSSH's PROTOCOL §4.4.
fn file_system(file: &File, reply: &mut Vec<u8>) -> Done {
    // SAFETY: statvfs is plain numbers, for which zeros are values; the call writes one.
    let facts = unsafe {
        let mut facts = std::mem::zeroed::<libc::statvfs>();
        if libc::fstatvfs(file.as_raw_fd(), &mut facts) != 0 {
            return Err(io::Error::last_os_error().into());
        }
        facts
    };
    let flags = facts.f_flag & (libc::ST_RDONLY | libc::ST_NOSUID);
    let values = [
        facts.f_bsize,
        facts.f_frsize,
        facts.f_blocks,
        facts.f_bfree,
        facts.f_bavail,
        facts.f_files,
        facts.f_ffree,
        facts.f_favail,
        facts.f_fsid,
        flags,
        facts.f_namemax,
    ];
    values.iter().for_each(|value| reply.put_u64(*value));
    Ok(kind::EXTENDED_REPLY)
}

fn put_entry(name: &OsStr, meta: &Metadata, users: &mut Names, reply: &mut Vec<u8>) {
    reply.put_string(name.as_bytes());
    let mut line = users.describe(meta).into_bytes();
    line.push(b' ');
    line.extend_from_slice(name.as_bytes());
    reply.put_string(&line);
    put_attributes(meta, reply);
}

/// What `ls -l` shows in a client: the protocol has the server write it.
#[derive(Default)]
struct Names {
    users: Option<HashMap<u32, String>>,
    groups: Option<HashMap<u32, String>>,
}

impl Names {
    fn describe(&mut self, meta: &Metadata) -> String {
        let users = self.users.get_or_insert_with(|| ids("/etc/passwd"));
        let user = users
            .get(&meta.uid())
            .cloned()
            .unwrap_or_else(|| meta.uid().to_string());
        let groups = self.groups.get_or_insert_with(|| ids("/etc/group"));
        let group = groups
            .get(&meta.gid())
            .cloned()
            .unwrap_or_else(|| meta.gid().to_string());
        let (mode, links, size) = (mode_text(meta.mode()), meta.nlink(), meta.len());
        format!(
            "{mode} {links:4} {user:8} {group:8} {size:8} {}",
            date_text(meta.mtime())
        )
    }
}

/// Names by number, of a file such as `/etc/passwd`.
fn ids(path: &str) -> HashMap<u32, String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let entry = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        Some((fields.nth(1)?.parse().ok()?, name))
    };
    text.lines().filter_map(entry).collect()
}

fn mode_text(mode: u32) -> String {
    let first = match mode & libc::S_IFMT {
        libc::S_IFDIR => 'd',
        libc::S_IFLNK => 'l',
        libc::S_IFCHR => 'c',
        libc::S_IFBLK => 'b',
        libc::S_IFIFO => 'p',
        libc::S_IFSOCK => 's',
        _ => '-',
    };
    let mut text = String::from(first);
    for (shift, special, mark) in [
        (6, libc::S_ISUID, 's'),
        (3, libc::S_ISGID, 's'),
        (0, libc::S_ISVTX, 't'),
    ] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, false) => mark.to_ascii_uppercase(),
            (true, true) => mark,
        });
    }
    text
}

/// Day and time of this half year, day and year of any other; UTC.
fn date_text(seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    const HALF_YEAR: i64 = 182 * 86400;
    let (year, month, day) = civil(seconds.div_euclid(86400));
    let month = MONTHS[month as usize - 1];
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs() as i64);
    if (now - HALF_YEAR..=now).contains(&seconds) {
        let minutes = seconds.rem_euclid(86400) / 60;
        format!("{month} {day:2} {:02}:{:02}", minutes / 60, minutes % 60)
    } else {
        format!("{month} {day:2}  {year}")
    }
}

/// Year, month and day of a day counted from 1970-01-01. Years begin in March here, so that the leap day is their last.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn requests_of_any_content_are_answered_within_bounds(
            requests in vec((prop_oneof![3..21u8, any::<u8>()], 0..2 * EXTENSIONS.len(), request_body()), 1..8),
        ) {
            let home = std::env::temp_dir().join(format!("sftp-{:016x}", u64::from_be_bytes(crate::crypto::random())));
            fs::create_dir(&home).unwrap();
            fs::write(home.join("a"), b"content").unwrap();
            let mut server = Server { home: home.clone(), handles: HashMap::new(), next: 0, users: Names::default() };
            let mut longest = 0;
            for (number, extension, body) in requests {
                // Nothing that leads out of the directory: these requests are really done.
                if body.iter().any(|byte| b"/.~".contains(byte)) {
                    continue;
                }
                let mut request = vec![number, 0, 0, 0, 9];
                if let Some((name, _)) = EXTENSIONS.get(extension) {
                    request[0] = kind::EXTENDED;
                    request.put_string(name.as_bytes());
                }
                request.put_raw(&body);
                let mut reply = Vec::new();
                let _ = server.answer(&request, &mut reply);
                longest = longest.max(reply.len());
            }
            drop(server);
            // A request may have removed the home itself, and another one made a file of it.
            if home.is_dir() {
                fs::set_permissions(&home, Permissions::from_mode(0o700)).unwrap();
                fs::remove_dir_all(&home).unwrap();
            } else {
                let _ = fs::remove_file(&home);
            }
            prop_assert!(longest <= LONGEST as usize);
        }
    }

    /// What follows a request's number: strings that mean something here, numbers, and noise.
    fn request_body() -> impl Strategy<Value = Vec<u8>> {
        let string = |bytes: &[u8]| {
            let mut made = Vec::new();
            made.put_string(bytes);
            made
        };
        let known = [
            &b"a"[..],
            b"b",
            b"",
            &[0; 4],
            &[0, 0, 0, 1],
            b"fsync@openssh",
        ]
        .map(string);
        let part = prop_oneof![
            proptest::sample::select(known.to_vec()),
            any::<u32>().prop_map(|number| number.to_be_bytes().to_vec()),
            (0..64u32).prop_map(|number| number.to_be_bytes().to_vec()),
            vec(any::<u8>(), 0..12),
        ];
        vec(part, 0..6).prop_map(|parts| parts.concat())
    }

    #[test]
    fn days_become_dates_also_around_leap_days() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (-1, (1969, 12, 31)),
            (20_514, (2026, 3, 2)),
        ] {
            assert_eq!(civil(days), date, "{days}");
        }
    }

    #[test]
    fn modes_read_as_ls_writes_them() {
        assert_eq!(mode_text(libc::S_IFREG | 0o644), "-rw-r--r--");
        assert_eq!(mode_text(libc::S_IFDIR | 0o1777), "drwxrwxrwt");
        assert_eq!(mode_text(libc::S_IFREG | 0o4654), "-rwSr-xr--");
    }
}
