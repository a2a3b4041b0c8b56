//! What is done below one folder, and nowhere else: each part of a path is opened by itself and is no symbolic link.

use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    self as sys, AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, Uid,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::wire::{Attributes, NO_CONTENTS, PIECE, Taken, reason};

/// How many folders lie in each other at most: one open file each.
const DEEPEST: usize = 200;
/// Room for what may be asked for at once, and what stands between it.
const CONTENTS: usize = PIECE + (8 << 10);
/// How a file is opened to be read, without waiting: what is a pipe by now would never be opened.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);
/// How many pieces of a file with holes are told at once.
const SEGMENTS: usize = 4096;
/// What is behind a file's name while it is only partly there.
const PART: &[u8] = b".kohakuriver-";
/// What a folder, or a part of a file, has before it is finished.
const OWN: u32 = 0o700;
const PRIVATE: u32 = 0o600;

/// Where a stream's files are, before it is known whether they may be touched.
pub struct Root {
    path: PathBuf,
    slash: bool,
}

impl Root {
    /// The place that this path names, in a folder or in that of this process.
    pub fn find(workdir: &OsStr, path: &OsStr) -> io::Result<Self> {
        let bytes = path.as_bytes();
        let path = match bytes.strip_prefix(b"~") {
            Some(rest) if rest.is_empty() || rest[0] == b'/' => {
                let home = env::var_os("HOME").ok_or(Errno::NOENT)?;
                PathBuf::from(OsString::from_iter([&home, OsStr::from_bytes(rest)]))
            }
            _ if bytes.is_empty() => PathBuf::from("."),
            _ => PathBuf::from(path),
        };
        let slash = bytes.ends_with(b"/");
        Ok(Self {
            path: Path::new(workdir).join(path),
            slash,
        })
    }

    /// A folder or a file that is there, by way of links too: the user has named it.
    pub fn existing(self) -> io::Result<Tree> {
        if fs::metadata(&self.path)?.is_dir() {
            return Tree::of(&self.path, None);
        }
        // What a link leads to is read by its own name.
        let found = fs::canonicalize(&self.path)?;
        Self::beside(&found)
    }

    /// A folder to write in, which is made where that is due, or the name of a file in one.
    pub fn wanted(self, folder: bool) -> io::Result<Tree> {
        match fs::metadata(&self.path) {
            Ok(about) if about.is_dir() => Tree::of(&self.path, None),
            Ok(_) if folder || self.slash => Err(Errno::NOTDIR.into()),
            Ok(_) => Self::beside(&self.path),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Err(_) if folder || self.slash => {
                fs::create_dir(&self.path)?;
                Tree::of(&self.path, None)
            }
            Err(_) => Self::beside(&self.path),
        }
    }

    fn beside(path: &Path) -> io::Result<Tree> {
        let name = path.file_name().ok_or(Errno::ISDIR)?.as_bytes().to_vec();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Tree::of(parent, Some(name))
    }
}

/// A folder, or one name in it, and what of it is open.
pub struct Tree {
    root: OwnedFd,
    only: Option<Vec<u8>>,
    /// The folders on the way to what was used last, each in the one before.
    way: Vec<(Vec<u8>, OwnedFd)>,
    open: Option<(Vec<u8>, bool, File)>,
    buffer: Vec<u8>,
}

impl Tree {
    fn of(path: &Path, only: Option<Vec<u8>>) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            root: sys::open(path, flags, Mode::empty())?,
            only,
            way: Vec::new(),
            open: None,
            buffer: Vec::new(),
        })
    }

    /// The one name that may be used, beside those of its parts.
    pub fn only(&self) -> Option<&[u8]> {
        self.only.as_deref()
    }

    /// The folder that `path` is in, and its name there.
    pub fn place<'a>(&mut self, path: &'a [u8]) -> io::Result<(BorrowedFd<'_>, &'a OsStr)> {
        let (folders, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&path[..0], path),
        };
        check_name(name)?;
        if let Some(only) = &self.only {
            let part = name
                .strip_prefix(b".")
                .and_then(|rest| rest.strip_prefix(&only[..only.len().min(200)]))
                .is_some_and(|rest| rest.starts_with(PART));
            if !folders.is_empty() || (name != only && !part) {
                return Err(Errno::ACCESS.into());
            }
        }
        Ok((self.inside(folders)?, OsStr::from_bytes(name)))
    }

    /// The folder at a path; an empty one is the root.
    pub fn inside(&mut self, path: &[u8]) -> io::Result<BorrowedFd<'_>> {
        let parts: Vec<&[u8]> = match path {
            b"" => Vec::new(),
            path => path.split(|byte| *byte == b'/').collect(),
        };
        if parts.len() > DEEPEST {
            return Err(Errno::NAMETOOLONG.into());
        }
        let same = self.way.iter().zip(&parts);
        let same = same.take_while(|((name, _), part)| name == *part).count();
        self.way.truncate(same);
        for part in &parts[same..] {
            check_name(part)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let folder = sys::openat(self.last(), *part, flags, Mode::empty())?;
            self.way.push((part.to_vec(), folder));
        }
        Ok(self.last())
    }

    fn last(&self) -> BorrowedFd<'_> {
        self.way
            .last()
            .map_or(self.root.as_fd(), |(_, folder)| folder.as_fd())
    }

    // ---- reading -------------------------------------------------------------------------------

    /// A regular file, which stays open until another is asked for.
    fn file(&mut self, path: &[u8], writes: bool) -> io::Result<&File> {
        let is_open = |(name, can, _): &(Vec<u8>, bool, File)| name == path && *can == writes;
        if !self.open.as_ref().is_some_and(is_open) {
            self.open = None;
            let access = if writes { OFlags::RDWR } else { OFlags::RDONLY };
            // Without waiting: what is a pipe by now would never be opened.
            let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let (folder, name) = self.place(path)?;
            let file = sys::openat(folder, name, flags, Mode::empty())?;
            if FileType::from_raw_mode(sys::fstat(&file)?.st_mode) != FileType::RegularFile {
                return Err(Errno::INVAL.into());
            }
            self.open = Some((path.to_vec(), writes, file.into()));
        }
        match &self.open {
            Some((_, _, file)) => Ok(file),
            None => Err(Errno::NOENT.into()),
        }
    }

    /// Bytes of a file, fewer where it ends, and their checksum.
    pub fn read(&mut self, path: &[u8], offset: u64, length: usize) -> io::Result<(u32, &[u8])> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(CONTENTS, 0);
        let read = self
            .file(path, false)
            .and_then(|file| read_all(file, &mut buffer[..length], offset));
        self.buffer = buffer;
        let data = &self.buffer[..read?];
        Ok((crc32fast::hash(data), data))
    }

    /// The contents of many whole files, in the order in which they are asked for, and their checksum.
    pub fn get(&mut self, files: &[(&[u8], u32)]) -> (u32, &[u8]) {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(CONTENTS, 0);
        let mut used = 0;
        for (path, size) in files {
            let (start, length) = (used + 4, *size as usize);
            match self.whole(path, &mut buffer[start..start + length]) {
                Ok(()) => {
                    buffer[used..start].copy_from_slice(&size.to_be_bytes());
                    used = start + length;
                }
                Err(error) => {
                    let none = [&NO_CONTENTS.to_be_bytes()[..], &reason(&error)].concat();
                    buffer[used..used + none.len()].copy_from_slice(&none);
                    used += none.len();
                }
            }
        }
        self.buffer = buffer;
        let data = &self.buffer[..used];
        (crc32fast::hash(data), data)
    }

    /// All of a regular file that has as many bytes as there is room for.
    fn whole(&mut self, path: &[u8], into: &mut [u8]) -> io::Result<()> {
        let (folder, name) = self.place(path)?;
        let file = sys::openat(folder, name, READ, Mode::empty())?;
        let about = sys::fstat(&file)?;
        if FileType::from_raw_mode(about.st_mode) != FileType::RegularFile {
            return Err(Errno::INVAL.into());
        }
        if about.st_size as u64 != into.len() as u64
            || read_all(&file.into(), into, 0)? != into.len()
        {
            return Err(io::Error::other("It changed while it was copied"));
        }
        Ok(())
    }

    /// Where a file has data from an offset on: pairs of offset and length.
    pub fn map(&mut self, path: &[u8], mut offset: u64) -> io::Result<Vec<u8>> {
        let file = self.file(path, false)?;
        let mut segments = Vec::new();
        while segments.len() < SEGMENTS * 16 {
            let data = match sys::seek(file, SeekFrom::Data(offset)) {
                Err(Errno::NXIO) => break,
                found => found?,
            };
            let hole = sys::seek(file, SeekFrom::Hole(data))?;
            segments.extend_from_slice(&data.to_be_bytes());
            segments.extend_from_slice(&hole.saturating_sub(data).to_be_bytes());
            if hole <= offset {
                break;
            }
            offset = hole;
        }
        Ok(segments)
    }

    /// The checksum of each piece of a file.
    pub fn sums(&mut self, path: &[u8], mut offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let end = offset.saturating_add(length);
        let mut sums = Vec::new();
        while offset < end {
            let piece = (end - offset).min(PIECE as u64) as usize;
            let (sum, data) = self.read(path, offset, piece)?;
            if data.is_empty() {
                break;
            }
            sums.extend_from_slice(&sum.to_be_bytes());
            offset += piece as u64;
        }
        Ok(sums)
    }

    // ---- writing -------------------------------------------------------------------------------

    /// A whole file. It is written under its own name where that is free, else, or always, beside what has it.
    pub fn put(
        &mut self,
        path: &[u8],
        attributes: &Attributes,
        data: &[u8],
        always_beside: bool,
    ) -> io::Result<Taken> {
        let (folder, name) = self.place(path)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = |name: &OsStr| sys::openat(folder, name, flags, Mode::from_raw_mode(PRIVATE));
        let first = match always_beside {
            true => Err(Errno::EXIST),
            false => made(name),
        };
        let (file, beside) = match first {
            Err(Errno::EXIST) => {
                let beside = beside(name.as_bytes());
                let _ = sys::unlinkat(folder, &beside, AtFlags::empty());
                (made(&beside)?, Some(beside))
            }
            file => (file?, None),
        };
        let file = File::from(file);
        let filled = file
            .write_all_at(data, 0)
            .and_then(|()| give(&file, attributes))
            .and_then(|taken| {
                if let Some(beside) = &beside {
                    sys::renameat(folder, beside, folder, name)?;
                }
                Ok(taken)
            });
        if filled.is_err() {
            let _ = sys::unlinkat(folder, beside.as_deref().unwrap_or(name), AtFlags::empty());
        }
        filled
    }

    /// A file that is written in pieces, of this size.
    pub fn part(&mut self, path: &[u8], size: u64) -> io::Result<Taken> {
        let taken = if self.has_part(path)? {
            Taken::Before
        } else {
            let (folder, name) = self.place(path)?;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            sys::openat(folder, name, flags, Mode::from_raw_mode(PRIVATE))?;
            Taken::All
        };
        self.file(path, true)?.set_len(size)?;
        Ok(taken)
    }

    /// Whether there is one that is ours alone. Another user's, who would go on having it, is taken away.
    fn has_part(&mut self, path: &[u8]) -> io::Result<bool> {
        let about = match self.file(path, true) {
            Ok(file) => sys::fstat(file)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if about.st_uid == geteuid().as_raw() && about.st_nlink == 1 {
            return Ok(true);
        }
        self.open = None;
        let (folder, name) = self.place(path)?;
        sys::unlinkat(folder, name, AtFlags::empty())?;
        Ok(false)
    }

    /// One piece of it.
    pub fn write(&mut self, path: &[u8], offset: u64, data: &[u8]) -> io::Result<()> {
        self.file(path, true)?.write_all_at(data, offset)
    }

    /// It is whole: it gets its attributes and its name.
    pub fn finish(&mut self, path: &[u8], to: &[u8], attributes: &Attributes) -> io::Result<Taken> {
        let taken = give(self.file(path, true)?, attributes)?;
        self.open = None;
        if path.rsplitn(2, |byte| *byte == b'/').nth(1)
            != to.rsplitn(2, |byte| *byte == b'/').nth(1)
        {
            return Err(Errno::INVAL.into());
        }
        let (_, new) = self.place(to)?;
        let (folder, part) = self.place(path)?;
        sys::renameat(folder, part, folder, new)?;
        Ok(taken)
    }

    /// A folder, in the place of what is none.
    pub fn folder(&mut self, path: &[u8]) -> io::Result<()> {
        let (folder, name) = self.place(path)?;
        let mode = Mode::from_raw_mode(OWN);
        match sys::mkdirat(folder, name, mode) {
            Err(Errno::EXIST) => {}
            made => return Ok(made?),
        }
        let about = sys::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(about.st_mode) != FileType::Directory {
            sys::unlinkat(folder, name, AtFlags::empty())?;
            return Ok(sys::mkdirat(folder, name, mode)?);
        }
        if about.st_mode & OWN != OWN {
            // Else nothing could be written there; it gets its own mode at the end.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match sys::openat(folder, name, flags, Mode::empty()) {
                Ok(opened) => {
                    sys::fchmod(&opened, Mode::from_raw_mode(about.st_mode & 0o7777 | OWN))?
                }
                Err(_) => sys::chmodat(folder, name, mode, AtFlags::empty())?,
            }
        }
        Ok(())
    }

    /// A symbolic link, whatever it leads to.
    pub fn symlink(
        &mut self,
        path: &[u8],
        target: &[u8],
        attributes: &Attributes,
    ) -> io::Result<Taken> {
        let (folder, name) = self.place(path)?;
        let target = CString::new(target)?;
        match sys::symlinkat(&target, folder, name) {
            Err(Errno::EXIST) => {
                sys::unlinkat(folder, name, AtFlags::empty())?;
                sys::symlinkat(&target, folder, name)?;
            }
            made => made?,
        }
        let mut taken = Taken::All;
        if let Some((uid, gid)) = attributes.owner {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            if sys::chownat(folder, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).is_err() {
                taken = Taken::NotOwner;
            }
        }
        let _ = sys::utimensat(folder, name, &times(attributes), AtFlags::SYMLINK_NOFOLLOW);
        Ok(taken)
    }

    /// Another name of a file that is there.
    pub fn link(&mut self, path: &[u8], existing: &[u8]) -> io::Result<()> {
        let (folder, file) = self.place(existing)?;
        let folder = folder.try_clone_to_owned()?;
        let about = sys::statat(&folder, file, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(about.st_mode) != FileType::RegularFile {
            return Err(Errno::INVAL.into());
        }
        let (to, name) = self.place(path)?;
        match sys::linkat(&folder, file, to, name, AtFlags::empty()) {
            Err(Errno::EXIST) => {
                let there = sys::statat(to, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if (there.st_dev, there.st_ino) == (about.st_dev, about.st_ino) {
                    return Ok(());
                }
                sys::unlinkat(to, name, AtFlags::empty())?;
                Ok(sys::linkat(&folder, file, to, name, AtFlags::empty())?)
            }
            made => Ok(made?),
        }
    }

    /// Mode, times and owner of a folder or a file; of an empty path, those of the root, unless it only has one name.
    pub fn attributes(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<Taken> {
        if path.is_empty() && self.only.is_some() {
            return Err(Errno::ACCESS.into());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = if path.is_empty() {
            self.inside(path)?.try_clone_to_owned()?
        } else {
            let (folder, name) = self.place(path)?;
            sys::openat(folder, name, flags, Mode::empty())?
        };
        give(&opened, attributes)
    }

    /// Takes a name away. A folder has to be empty.
    pub fn remove(&mut self, path: &[u8], is_folder: bool) -> io::Result<()> {
        self.open = None;
        let (folder, name) = self.place(path)?;
        let flags = if is_folder {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        Ok(sys::unlinkat(folder, name, flags)?)
    }
}

/// What a whole file is called until it takes the place of what has its name. Another stream may write a file whose long
/// name begins like this one.
fn beside(name: &[u8]) -> OsString {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let mine = format!("{:016x}-new", hasher.finish());
    let short = &name[..name.len().min(200)];
    OsString::from_iter([b".", short, PART, mine.as_bytes()].map(OsStr::from_bytes))
}

/// Nothing that leads anywhere else.
fn check_name(name: &[u8]) -> io::Result<()> {
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL.into()),
        name if name.contains(&b'/') => Err(Errno::INVAL.into()),
        _ => Ok(()),
    }
}

fn read_all(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(length) => done += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn times(attributes: &Attributes) -> Timestamps {
    let then = Timespec {
        tv_sec: attributes.seconds,
        tv_nsec: attributes.nanoseconds.into(),
    };
    Timestamps {
        last_access: then,
        last_modification: then,
    }
}

/// The owner first: who gives a file away takes its special bits.
fn give(file: impl AsFd, attributes: &Attributes) -> io::Result<Taken> {
    let mut taken = Taken::All;
    let mut mode = attributes.mode;
    if let Some((uid, gid)) = attributes.owner {
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        if sys::fchown(&file, uid, gid).is_err() {
            taken = Taken::NotOwner;
            mode &= 0o1777;
        }
    }
    sys::fchmod(&file, Mode::from_raw_mode(mode))?;
    sys::futimens(&file, &times(attributes))?;
    Ok(taken)
}
