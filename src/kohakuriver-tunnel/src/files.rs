//! Files: a folder of the container, read or written for its user as the far end of a stream (docs/protocol.md §6,
//! "Files").
//!
//! A stream has a thread of its own, which answers its requests one after the other. A user who copies has several such
//! streams. All paths are below what the stream was opened with, and no symbolic link below it is ever followed.

mod list;
mod tree;
mod wire;

use std::ffi::OsString;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;

use tree::{Root, Tree};
use wire::{New, Request, Taken, reply, tag};

/// Large enough that small requests and answers share system calls.
const BUFFER: usize = 256 << 10;

/// What a stream may do with its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It reads them.
    From,
    /// It writes them.
    To,
}

/// Answers what comes over the line, until that ends. `asked` is what stands in the place of a command: `from` or `to`,
/// a path, and for `to` perhaps `folder`.
pub fn serve(asked: &[OsString], workdir: &OsString, line: &UnixStream) -> io::Result<()> {
    let mut answers = BufWriter::with_capacity(BUFFER, line);
    let opened = open(asked, workdir);
    let (access, mut tree) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            reply(&mut answers, tag::ERROR, wire::sentence(&error).as_bytes())?;
            return answers.flush();
        }
    };
    let hello = [
        &[u8::from(tree.only().is_none())][..],
        tree.only().unwrap_or_default(),
    ]
    .concat();
    reply(&mut answers, tag::HELLO, &hello)?;
    answers.flush()?;
    let mut requests = BufReader::with_capacity(BUFFER, line);
    let mut frame = Vec::new();
    while let Some(kind) = next(&mut requests, &mut answers, &mut frame)? {
        let answered = match Request::parse(kind, &frame) {
            Some(request) if request.writes() && access == Access::From => {
                Err(io::Error::from_raw_os_error(libc::EROFS))
            }
            Some(request) => answer(&mut tree, request, &mut answers)?,
            None => return Err(io::ErrorKind::InvalidData.into()),
        };
        if let Err(error) = answered {
            reply(&mut answers, tag::ERROR, wire::sentence(&error).as_bytes())?;
        }
    }
    answers.flush()
}

fn open(asked: &[OsString], workdir: &OsString) -> io::Result<(Access, Tree)> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let (access, path, folder) = match asked {
        [access, path] => (access, path, false),
        [access, path, folder] if folder == "folder" => (access, path, true),
        _ => return Err(invalid()),
    };
    let access = match access.as_bytes() {
        b"from" => Access::From,
        b"to" => Access::To,
        _ => return Err(invalid()),
    };
    let root = Root::find(workdir, path)?;
    let tree = match access {
        Access::From => root.existing()?,
        Access::To => root.wanted(folder)?,
    };
    Ok((access, tree))
}

/// The tag of the next request, whose payload is in `frame`; `None` at the end. Before anything is waited for, what was
/// answered goes out.
fn next(
    requests: &mut BufReader<&UnixStream>,
    answers: &mut BufWriter<&UnixStream>,
    frame: &mut Vec<u8>,
) -> io::Result<Option<u8>> {
    let mut head = [0; wire::HEAD];
    if requests.buffer().len() < wire::HEAD {
        answers.flush()?;
    }
    match requests.read_exact(&mut head) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let (kind, length) = wire::parse_head(head);
    if length > wire::LONGEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    if requests.buffer().len() < length {
        answers.flush()?;
    }
    frame.resize(length, 0);
    requests.read_exact(frame)?;
    Ok(Some(kind))
}

/// Does what is asked for. The outer error is that of the line, the inner one that of the files.
fn answer(
    tree: &mut Tree,
    request: Request,
    answers: &mut impl Write,
) -> io::Result<io::Result<()>> {
    let done = match request {
        Request::List(path) => return list::list(tree, path, answers),
        Request::Read(path, offset, length) => match tree.read(path, offset, length) {
            Ok(read) => return data(answers, read).map(Ok),
            Err(error) => Err(error),
        },
        Request::Map(path, offset) => match tree.map(path, offset) {
            Ok(segments) => return reply(answers, tag::MAP, &segments).map(Ok),
            Err(error) => Err(error),
        },
        Request::Sums(path, offset, length) => match tree.sums(path, offset, length) {
            Ok(sums) => return reply(answers, tag::SUMS, &sums).map(Ok),
            Err(error) => Err(error),
        },
        Request::Put(files, beside) => {
            return reply(answers, tag::RESULTS, &put(tree, &files, beside)).map(Ok);
        }
        Request::Get(files) => return data(answers, tree.get(&files)).map(Ok),
        Request::Write(path, offset, data) => tree.write(path, offset, data).map(|()| Taken::All),
        Request::Part(path, size) => tree.part(path, size),
        Request::Finish(path, to, attributes) => tree.finish(path, to, &attributes),
        Request::Folder(path) => tree.folder(path).map(|()| Taken::All),
        Request::Symlink(path, target, attributes) => tree.symlink(path, target, &attributes),
        Request::Link(path, existing) => tree.link(path, existing).map(|()| Taken::All),
        Request::Attributes(path, attributes) => tree.attributes(path, &attributes),
        Request::Remove(path, folder) => tree.remove(path, folder).map(|()| Taken::All),
    };
    match done {
        Ok(taken) => reply(answers, tag::DONE, &[taken as u8]).map(Ok),
        Err(error) => Ok(Err(error)),
    }
}

fn data(answers: &mut impl Write, (sum, data): (u32, &[u8])) -> io::Result<()> {
    wire::head(answers, tag::DATA, 4 + data.len())?;
    answers.write_all(&sum.to_be_bytes())?;
    answers.write_all(data)
}

/// Writes whole files; what became of each. One that can't be written holds up no other.
fn put(tree: &mut Tree, files: &[New], beside: bool) -> Vec<u8> {
    let mut results = Vec::with_capacity(files.len());
    for file in files {
        let Some(data) = file.data else {
            results.push(Taken::Before as u8);
            continue;
        };
        match tree.put(file.path, &file.attributes, data, beside) {
            Ok(taken) => results.push(taken as u8),
            Err(error) => {
                results.push(wire::FAILED);
                results.extend(wire::reason(&error));
            }
        }
    }
    results
}
