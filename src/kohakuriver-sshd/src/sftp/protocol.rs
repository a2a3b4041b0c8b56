//! What the messages of the protocol are made of: numbers, limits, extensions, and refusals.

use std::io;

use crate::wire::{Malformed, Put};

pub(super) const VERSION: u32 = 3;
pub(super) const LONGEST: u32 = 256 * 1024;
/// The most data in one read or write.
pub(super) const DATA: u32 = LONGEST - 1024;
pub(super) const MOST_HANDLES: usize = 256;
pub(super) const NAMES_AT_ONCE: usize = 128;

pub(super) mod kind {
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

pub(super) mod status {
    pub const OK: u32 = 0;
    pub const EOF: u32 = 1;
    pub const NO_SUCH_FILE: u32 = 2;
    pub const PERMISSION_DENIED: u32 = 3;
    pub const FAILURE: u32 = 4;
    pub const BAD_MESSAGE: u32 = 5;
    pub const UNSUPPORTED: u32 = 8;
}

pub(super) const EXTENSIONS: [(&str, &str); 9] = [
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
    ("expand-path@openssh.com", "1"),
    ("copy-data", "1"),
];

/// Why a request isn't done.
pub(super) enum Refused {
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
    pub(super) fn put(&self, reply: &mut Vec<u8>) {
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
pub(super) type Done = Result<u8, Refused>;

pub(super) fn done(reply: &mut Vec<u8>) -> Done {
    Refused::Status(status::OK, "").put(reply);
    Ok(kind::STATUS)
}

pub(super) fn no_handle() -> Refused {
    Refused::Status(status::FAILURE, "there is no such handle")
}
