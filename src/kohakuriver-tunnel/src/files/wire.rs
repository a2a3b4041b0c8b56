//! Requests and answers, as bytes (docs/protocol.md §6, "Files").

use std::io::{self, Write};

use crate::protocol::take;

/// Tag and length.
pub const HEAD: usize = 5;
/// The most that one request may have, and one read.
pub const PIECE: usize = 1 << 20;
/// The longest payload of a request: a piece, two paths, and what goes with them.
pub const LONGEST: usize = PIECE + (16 << 10);
/// What one request for sums may cover.
pub const SUMMED: u64 = 64 << 20;
/// What a file among many counts for beside its bytes, and how many of both may be asked for together.
const EACH: usize = 128;
const TOGETHER: usize = PIECE + (4 << 10);
/// What contents have in the place of a size where there are none, and how long the reason may be.
pub const NO_CONTENTS: u32 = u32::MAX;
const REASON: usize = 96;
/// The longest path, and the longest target of a symbolic link.
pub const LONGEST_PATH: usize = 4096;

/// What answers are.
#[allow(missing_docs)]
pub mod tag {
    pub const DONE: u8 = 0x41;
    pub const ENTRIES: u8 = 0x42;
    pub const DATA: u8 = 0x43;
    pub const MAP: u8 = 0x44;
    pub const SUMS: u8 = 0x45;
    pub const RESULTS: u8 = 0x46;
    pub const HELLO: u8 = 0x47;
    pub const ERROR: u8 = 0x4f;
}

/// What DONE says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Taken {
    All = 0,
    /// But not the owner, which may not be given away.
    NotOwner = 1,
    /// A part of the file was there before; of one among many, nothing came to be written.
    Before = 2,
}

/// What RESULTS has for a file that could not be written, before the reason.
pub const FAILED: u8 = 3;

/// What a file is given beside its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Attributes {
    pub mode: u32,
    pub owner: Option<(u32, u32)>,
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// A whole file that is to be written; without data where its reader had none.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct New<'a> {
    pub path: &'a [u8],
    pub attributes: Attributes,
    pub data: Option<&'a [u8]>,
}

/// One request. Paths are those that stand in it, and nothing is known of them yet.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Request<'a> {
    List(&'a [u8]),
    Read(&'a [u8], u64, usize),
    Map(&'a [u8], u64),
    Sums(&'a [u8], u64, u64),
    /// Files, and whether each is written beside what its name is, even where that is free.
    Put(Vec<New<'a>>, bool),
    Write(&'a [u8], u64, &'a [u8]),
    Part(&'a [u8], u64),
    Finish(&'a [u8], &'a [u8], Attributes),
    Folder(&'a [u8]),
    Symlink(&'a [u8], &'a [u8], Attributes),
    Link(&'a [u8], &'a [u8]),
    Attributes(&'a [u8], Attributes),
    Remove(&'a [u8], bool),
    /// Files, with the sizes that they had.
    Get(Vec<(&'a [u8], u32)>),
}

impl<'a> Request<'a> {
    /// What these bytes ask for; `None` where that makes no sense, or its checksum is wrong.
    pub fn parse(kind: u8, mut bytes: &'a [u8]) -> Option<Self> {
        let rest = &mut bytes;
        match kind {
            0x25 => return put(rest),
            0x2e => return get(rest),
            _ => {}
        }
        let path = text(rest)?;
        let request = match kind {
            0x21 => Self::List(path),
            0x22 => {
                let (offset, length) = (number(rest)?, u32::from_be_bytes(take(rest)?) as usize);
                (length <= PIECE).then_some(Self::Read(path, offset, length))?
            }
            0x23 => Self::Map(path, number(rest)?),
            0x24 => {
                let (offset, length) = (number(rest)?, number(rest)?);
                (length <= SUMMED).then_some(Self::Sums(path, offset, length))?
            }
            0x26 => {
                let offset = number(rest)?;
                Self::Write(path, offset, data(rest)?)
            }
            0x27 => Self::Part(path, number(rest)?),
            0x28 => Self::Finish(path, text(rest)?, attributes(rest)?),
            0x29 => Self::Folder(path),
            0x2a => Self::Symlink(path, text(rest)?, attributes(rest)?),
            0x2b => Self::Link(path, text(rest)?),
            0x2c => Self::Attributes(path, attributes(rest)?),
            0x2d => {
                let [folder] = take(rest)?;
                Self::Remove(path, folder != 0)
            }
            _ => return None,
        };
        rest.is_empty().then_some(request)
    }

    /// Whether it changes anything.
    pub fn writes(&self) -> bool {
        !matches!(
            self,
            Self::List(..) | Self::Read(..) | Self::Map(..) | Self::Sums(..) | Self::Get(..)
        )
    }
}

/// Many whole files: all heads, and then all contents.
fn put<'a>(rest: &mut &'a [u8]) -> Option<Request<'a>> {
    let sum = u32::from_be_bytes(take(rest)?);
    if crc32fast::hash(rest) != sum {
        return None;
    }
    let [beside] = take(rest)?;
    let length = u32::from_be_bytes(take(rest)?) as usize;
    let (mut heads, mut contents) = rest.split_at_checked(length)?;
    let mut files = Vec::new();
    while !heads.is_empty() {
        files.push(New {
            path: text(&mut heads)?,
            attributes: attributes(&mut heads)?,
            data: content(&mut contents)?,
        });
    }
    contents
        .is_empty()
        .then_some(Request::Put(files, beside != 0))
}

/// One file's bytes, or none, and why, which its reader was told.
fn content<'a>(rest: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    let length = u32::from_be_bytes(take(rest)?);
    let (length, is_there) = match length {
        NO_CONTENTS => (u16::from_be_bytes(take(rest)?) as usize, false),
        length => (length as usize, true),
    };
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(is_there.then_some(head))
}

/// Many whole files that are asked for, which fit in one answer.
fn get<'a>(rest: &mut &'a [u8]) -> Option<Request<'a>> {
    let mut files = Vec::new();
    let mut together = 0;
    while !rest.is_empty() {
        let (path, size) = (text(rest)?, u32::from_be_bytes(take(rest)?));
        together += size as usize + EACH;
        if together > TOGETHER {
            return None;
        }
        files.push((path, size));
    }
    Some(Request::Get(files))
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    take(rest).map(u64::from_be_bytes)
}

fn text<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u16::from_be_bytes(take(rest)?) as usize;
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    (length <= LONGEST_PATH && !head.contains(&0)).then_some(head)
}

/// All that is left, behind its checksum.
fn data<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let sum = u32::from_be_bytes(take(rest)?);
    let data = std::mem::take(rest);
    (data.len() <= PIECE && crc32fast::hash(data) == sum).then_some(data)
}

fn attributes(rest: &mut &[u8]) -> Option<Attributes> {
    let mode = u32::from_be_bytes(take(rest)?);
    let [owned] = take(rest)?;
    let owner = (
        u32::from_be_bytes(take(rest)?),
        u32::from_be_bytes(take(rest)?),
    );
    let (seconds, nanoseconds) = (
        i64::from_be_bytes(take(rest)?),
        u32::from_be_bytes(take(rest)?),
    );
    (mode & !0o7777 == 0 && nanoseconds < 1_000_000_000).then_some(Attributes {
        mode,
        owner: (owned != 0).then_some(owner),
        seconds,
        nanoseconds,
    })
}

/// What these bytes say a request, or its length, is.
pub fn parse_head(head: [u8; HEAD]) -> (u8, usize) {
    let [kind, length @ ..] = head;
    (kind, u32::from_be_bytes(length) as usize)
}

/// The beginning of an answer whose payload has this length.
pub fn head(to: &mut impl Write, kind: u8, length: usize) -> io::Result<()> {
    let [a, b, c, d] = (length as u32).to_be_bytes();
    to.write_all(&[kind, a, b, c, d])
}

/// A whole answer.
pub fn reply(to: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    head(to, kind, payload.len())?;
    to.write_all(payload)
}

/// A length and why something failed with one among many files.
pub fn reason(error: &io::Error) -> Vec<u8> {
    let said = sentence(error);
    let said = &said.as_bytes()[..said.len().min(REASON)];
    [&(said.len() as u16).to_be_bytes(), said].concat()
}

/// `ECODE: why`, as the user reads it.
pub fn sentence(error: &io::Error) -> String {
    let code = match error.raw_os_error() {
        Some(libc::ENOENT) => "ENOENT",
        Some(libc::EACCES) => "EACCES",
        Some(libc::EPERM) => "EPERM",
        Some(libc::EEXIST) => "EEXIST",
        Some(libc::ENOTEMPTY) => "ENOTEMPTY",
        Some(libc::ENOTDIR) => "ENOTDIR",
        Some(libc::EISDIR) => "EISDIR",
        Some(libc::ELOOP) => "ELOOP",
        Some(libc::ENOSPC) => "ENOSPC",
        Some(libc::EDQUOT) => "EDQUOT",
        Some(libc::EROFS) => "EROFS",
        Some(libc::EFBIG) => "EFBIG",
        Some(libc::EINVAL) => "EINVAL",
        Some(libc::ENAMETOOLONG) => "ENAMETOOLONG",
        _ => "EIO",
    };
    let said = error.to_string();
    // The library adds the number.
    let said = said.split(" (os error").next().unwrap_or_default();
    format!("{code}: {said}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(path: &[u8], rest: &[u8]) -> Vec<u8> {
        [&(path.len() as u16).to_be_bytes()[..], path, rest].concat()
    }

    #[test]
    fn a_path_may_be_bytes_that_are_no_text_but_has_no_nul() {
        assert_eq!(
            Request::parse(0x21, &packed(b"a/\xff", b"")),
            Some(Request::List(b"a/\xff"))
        );
        assert_eq!(Request::parse(0x21, &packed(b"a\0b", b"")), None);
        assert_eq!(Request::parse(0x21, &packed(&[b'a'; 4097], b"")), None);
    }

    #[test]
    fn data_with_a_wrong_checksum_is_no_request() {
        let write = |sum: u32| {
            let rest = [&7u64.to_be_bytes()[..], &sum.to_be_bytes(), b"data"].concat();
            packed(b"f", &rest)
        };
        let right = crc32fast::hash(b"data");
        assert_eq!(
            Request::parse(0x26, &write(right)),
            Some(Request::Write(b"f", 7, b"data"))
        );
        assert_eq!(Request::parse(0x26, &write(right ^ 1)), None);
    }

    #[test]
    fn a_request_that_is_cut_short_or_too_long_or_asks_for_too_much_is_none() {
        let read = packed(b"f", &[&[0; 8][..], &(PIECE as u32).to_be_bytes()].concat());
        assert!(Request::parse(0x22, &read).is_some());
        for end in 0..read.len() {
            assert_eq!(Request::parse(0x22, &read[..end]), None, "{end}");
        }
        assert_eq!(Request::parse(0x22, &[&read[..], b"x"].concat()), None);
        let more = packed(
            b"f",
            &[&[0; 8][..], &(PIECE as u32 + 1).to_be_bytes()].concat(),
        );
        assert_eq!(Request::parse(0x22, &more), None);
        assert_eq!(Request::parse(0x20, &packed(b"f", b"")), None);
    }
}
