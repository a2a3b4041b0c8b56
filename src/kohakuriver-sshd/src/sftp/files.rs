//! Requests about open files and directories (draft-ietf-secsh-filexfer-02 §6.3, §6.4, §6.7).

use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions, ReadDir};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use super::Server;
use super::attributes::{Wanted, put_attributes};
use super::listing::Names;
use super::protocol::{
    DATA, Done, MOST_HANDLES, NAMES_AT_ONCE, Refused, done, kind, no_handle, status,
};
use crate::wire::{Malformed, Put, Reader};

const COPIED_AT_ONCE: usize = 256 << 10;

/// What a client has open.
pub(super) enum Handle {
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

impl Server {
    pub(super) fn open(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        let (path, flags) = (self.path(reader)?, reader.u32()?);
        let mode = Wanted::read(reader)?.mode.unwrap_or(0o666) & 0o7777;
        let file = options(flags).mode(mode).open(path)?;
        if file.metadata()?.file_type().is_fifo() {
            return Err(Refused::Status(status::FAILURE, "a pipe is no file"));
        }
        let append = flags & flag::APPEND != 0;
        self.keep(Handle::File { file, append }, reply)
    }

    pub(super) fn close(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        let id = handle_id(reader)?;
        self.handles.remove(&id).ok_or(no_handle())?;
        done(reply)
    }

    pub(super) fn open_directory(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        let path = self.path(reader)?;
        let entries = fs::read_dir(&path)?;
        let dots = true;
        self.keep(
            Handle::Directory {
                path,
                entries,
                dots,
            },
            reply,
        )
    }

    pub(super) fn read(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
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

    pub(super) fn write(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        let (mut file, append) = self.file(reader)?;
        let (offset, data) = (reader.u64()?, reader.string()?);
        if append {
            file.write_all(data)?;
        } else {
            file.write_all_at(data, offset)?;
        }
        done(reply)
    }

    pub(super) fn read_directory(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
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

    /// Copies from one open file into another, or within one (draft-ietf-secsh-filexfer-extensions-00 §7): 0 bytes are
    /// all that there are.
    pub(super) fn copy_data(&self, reader: &mut Reader<'_>) -> Result<(), Refused> {
        let from = self.file(reader)?.0;
        let (start, wanted) = (reader.u64()?, reader.u64()?);
        let to = self.file(reader)?.0;
        let target = reader.u64()?;
        let (source, destination) = (from.metadata()?, to.metadata()?);
        if !source.is_file() || !destination.is_file() {
            return Err(Refused::Status(status::FAILURE, "only a file is copied"));
        }
        // What is there now: a file that is copied behind its own end would never end.
        let there = source.len().saturating_sub(start);
        let count = if wanted == 0 {
            there
        } else {
            wanted.min(there)
        };
        let is_same = (source.dev(), source.ino()) == (destination.dev(), destination.ino());
        if is_same && start.abs_diff(target) < count {
            return Err(Refused::Status(status::FAILURE, "the two parts overlap"));
        }
        let mut buffer = vec![0; COPIED_AT_ONCE];
        let mut copied = 0;
        while copied < count {
            let most = buffer
                .len()
                .min(usize::try_from(count - copied).unwrap_or(usize::MAX));
            let length = from.read_at(&mut buffer[..most], start.saturating_add(copied))?;
            if length == 0 {
                break;
            }
            to.write_all_at(&buffer[..length], target.saturating_add(copied))?;
            copied += length as u64;
        }
        if copied < wanted {
            return Err(Refused::Status(status::EOF, "end of file"));
        }
        Ok(())
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

    pub(super) fn file(&self, reader: &mut Reader<'_>) -> Result<(&File, bool), Refused> {
        match self.handles.get(&handle_id(reader)?) {
            Some(Handle::File { file, append }) => Ok((file, *append)),
            _ => Err(no_handle()),
        }
    }
}

/// How a file is opened (draft-ietf-secsh-filexfer-02 §6.3).
mod flag {
    pub const READ: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const APPEND: u32 = 4;
    pub const CREATE: u32 = 8;
    pub const TRUNCATE: u32 = 16;
    pub const EXCLUSIVE: u32 = 32;
}

fn options(flags: u32) -> OpenOptions {
    let has = |flag: u32| flags & flag != 0;
    // By hand, as the standard library refuses combinations that clients use.
    let extra = [
        (flag::CREATE, libc::O_CREAT),
        (flag::TRUNCATE, libc::O_TRUNC),
        (flag::EXCLUSIVE, libc::O_EXCL),
    ];
    let extra = extra
        .iter()
        .filter(|(flag, _)| has(*flag))
        .fold(0, |all, (_, flag)| all | flag);
    let mut options = OpenOptions::new();
    options
        .read(has(flag::READ) || !has(flag::WRITE))
        .write(has(flag::WRITE))
        .append(has(flag::APPEND) && has(flag::WRITE))
        // Who waits for the other end of a pipe can't be told that the client is gone.
        .custom_flags(extra | libc::O_NONBLOCK | libc::O_NOCTTY);
    options
}

fn handle_id(reader: &mut Reader<'_>) -> Result<u32, Malformed> {
    reader
        .string()?
        .try_into()
        .map(u32::from_be_bytes)
        .map_err(|_| Malformed)
}

/// OpenSSH's PROTOCOL §4.4.
pub(super) fn file_system(file: &File, reply: &mut Vec<u8>) -> Done {
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
