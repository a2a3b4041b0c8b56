//! The file server behind the `sftp` subsystem: version 3 (draft-ietf-secsh-filexfer-02) with OpenSSH's extensions.
//!
//! It runs in a thread of its own and may wait for a disk; the connection sees it as one more socket.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions, ReadDir};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use crate::wire::{Malformed, Put, Reader};

mod attributes;
mod listing;
mod protocol;

use attributes::{Wanted, put_attributes};
use listing::Names;
use protocol::{
    DATA, Done, EXTENSIONS, LONGEST, MOST_HANDLES, NAMES_AT_ONCE, Refused, VERSION, done, kind,
    no_handle, status,
};

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
        // Who waits for the other end of a pipe can't be told that the client is gone.
        options
            .custom_flags(extra | libc::O_NONBLOCK | libc::O_NOCTTY)
            .mode(wanted.mode.unwrap_or(0o666) & 0o7777);
        let file = options.open(path)?;
        if file.metadata()?.file_type().is_fifo() {
            return Err(Refused::Status(status::FAILURE, "a pipe is no file"));
        }
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

fn handle_id(reader: &mut Reader<'_>) -> Result<u32, Malformed> {
    reader
        .string()?
        .try_into()
        .map(u32::from_be_bytes)
        .map_err(|_| Malformed)
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

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
}
