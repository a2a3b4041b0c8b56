//! The attributes of files, as they stand in messages and as a client wants them to be.

use std::ffi::CString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::wire::{Malformed, Put, Reader};

pub(super) const HAS_SIZE: u32 = 1;
pub(super) const HAS_OWNER: u32 = 2;
pub(super) const HAS_MODE: u32 = 4;
pub(super) const HAS_TIMES: u32 = 8;

pub(super) fn put_attributes(meta: &Metadata, reply: &mut Vec<u8>) {
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
pub(super) fn short_time(seconds: i64) -> u32 {
    u32::try_from(seconds.max(0)).unwrap_or(u32::MAX)
}

/// Attributes that a client wants a file to have.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) size: Option<u64>,
    pub(super) owner: Option<(u32, u32)>,
    pub(super) mode: Option<u32>,
    pub(super) times: Option<(u32, u32)>,
}

impl Wanted {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
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
    pub(super) fn apply_to_file(&self, file: &File) -> io::Result<()> {
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

    pub(super) fn apply(&self, path: &Path, follow: bool) -> io::Result<()> {
        if let Some(size) = self.size {
            if !follow {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let file = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)?;
            file.set_len(size)?;
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

pub(super) fn moment(seconds: u32) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds.into())
}

pub(super) fn set_times(
    path: &Path,
    (accessed, modified): (u32, u32),
    follow: bool,
) -> io::Result<()> {
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
