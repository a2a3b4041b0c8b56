//! The remote half of the old `scp` protocol (rcp's), for clients that don't copy by `sftp`: OpenSSH's before 9, and `scp -O`.
//!
//! One line announces what comes: `C` a file, `D` a directory, `E` its end, `T` the times of the next one. Each line, and
//! each file's content, is answered by a zero byte, or by a 1 and a sentence. It runs in a thread of its own and may wait
//! for a disk; the connection sees it as one more socket.

use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::sys;

mod request;

pub use request::{Direction, Request};

/// A line names one file, whose name is at most 255 bytes; a message has a path in it.
const LONGEST_LINE: u64 = 16 * 1024;
const BLOCK: usize = 128 * 1024;
/// More would only be a way to exhaust the thread's stack.
const DEEPEST: usize = 256;
const FAILED: u32 = 1;

/// Starts to serve a request; gives the socket to reach it by. Paths begin at `home`. Calls `ended` with an exit code.
pub fn start(
    request: Request,
    home: PathBuf,
    ended: impl FnOnce(u32) + Send + 'static,
) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let serve = move || {
        let code = Copy::over(&theirs, &request).serve(&home);
        drop(theirs);
        ended(code);
    };
    thread::Builder::new()
        .name("scp".into())
        .stack_size(1024 * 1024)
        .spawn(serve)?;
    Ok(ours.into())
}

/// Times of access and of modification, in seconds since 1970.
type Times = (u64, u64);

/// A file or a directory that the client announced.
struct Announced<'a> {
    mode: u32,
    size: u64,
    name: &'a OsStr,
}

struct Copy<'a> {
    input: BufReader<&'a UnixStream>,
    output: &'a UnixStream,
    request: &'a Request,
    block: Vec<u8>,
    failed: bool,
}

impl<'a> Copy<'a> {
    fn over(socket: &'a UnixStream, request: &'a Request) -> Self {
        Self {
            input: BufReader::with_capacity(BLOCK, socket),
            output: socket,
            request,
            block: vec![0; BLOCK],
            failed: false,
        }
    }

    fn serve(mut self, home: &Path) -> u32 {
        let paths = self.request.expand(home);
        let done = match self.request.direction {
            Direction::FromClient => self.receive_into(&paths),
            Direction::ToClient => self.send_all(&paths),
        };
        // The end of the socket is the client's going away; any other failure was told.
        if done.is_err() || self.failed {
            FAILED
        } else {
            0
        }
    }

    fn acknowledge(&mut self) -> io::Result<()> {
        self.output.write_all(&[0])
    }

    /// Tells the client what failed; the copy goes on with what comes next.
    fn complain(&mut self, what: &Path, why: &str) -> io::Result<()> {
        self.failed = true;
        let mut line = b"\x01scp: ".to_vec();
        line.extend(one_line(what.as_os_str().as_bytes()));
        line.extend_from_slice(format!(": {why}\n").as_bytes());
        self.output.write_all(&line)
    }

    /// Tells the client what failed, and gives up.
    fn give_up<T>(&mut self, what: &Path, why: &str) -> io::Result<T> {
        self.complain(what, why)?;
        Err(io::ErrorKind::InvalidData.into())
    }

    /// The client's answer: true where it wants what was announced.
    fn answer(&mut self) -> io::Result<bool> {
        let mut byte = [0];
        self.input.read_exact(&mut byte)?;
        if byte[0] == 0 {
            return Ok(true);
        }
        self.line()?;
        self.failed = true;
        match byte[0] {
            1 => Ok(false),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The rest of a line, without its end.
    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        (&mut self.input)
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut line)?;
        match line.pop() {
            Some(b'\n') => Ok(line),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn receive_into(&mut self, paths: &[PathBuf]) -> io::Result<()> {
        let [target] = paths else {
            return self.give_up(Path::new("target"), "it has to be one path");
        };
        if self.request.target_is_directory && !target.is_dir() {
            return self.give_up(target, "Not a directory");
        }
        self.receive(target, 0)
    }

    /// Receives into `target` until the end of the directory, or of everything.
    fn receive(&mut self, target: &Path, depth: usize) -> io::Result<()> {
        self.acknowledge()?;
        let mut times = None;
        loop {
            let mut kind = [0];
            if self.input.read(&mut kind)? == 0 {
                return Ok(());
            }
            let line = self.line()?;
            match kind[0] {
                // What the client could not read.
                1 => self.failed = true,
                b'E' => return self.acknowledge(),
                b'T' => match request::times(&line) {
                    Some(given) => {
                        times = Some(given);
                        self.acknowledge()?;
                    }
                    None => return self.give_up(target, "the times make no sense"),
                },
                b'C' | b'D' => {
                    let Some(announced) = announced(&line) else {
                        let why = "a name or a size that can't be taken";
                        return self.give_up(target, why);
                    };
                    let path = if target.is_dir() {
                        target.join(announced.name)
                    } else {
                        target.to_owned()
                    };
                    let times = times.take();
                    if kind[0] == b'C' {
                        self.receive_file(&path, &announced, times)?;
                    } else {
                        self.receive_directory(&path, &announced, times, depth)?;
                    }
                }
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    fn receive_directory(
        &mut self,
        path: &Path,
        announced: &Announced<'_>,
        times: Option<Times>,
        depth: usize,
    ) -> io::Result<()> {
        if !self.request.recursive {
            return self.give_up(path, "a directory came, without -r");
        }
        if depth >= DEEPEST {
            return self.give_up(path, "the directories are too deep");
        }
        let is_new = !path.exists();
        // Its owner has to be able to fill it; what it may do in the end is set in the end.
        let made = if is_new {
            let mode = announced.mode | 0o700;
            fs::DirBuilder::new().mode(mode).create(path)
        } else if path.is_dir() {
            Ok(())
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        };
        if let Err(error) = made {
            return self.give_up(path, &sentence(&error));
        }
        self.receive(path, depth + 1)?;
        let finished = self.finish_directory(path, announced.mode, is_new, times);
        finished.or_else(|error| self.complain(path, &sentence(&error)))
    }

    fn finish_directory(
        &self,
        path: &Path,
        mode: u32,
        is_new: bool,
        times: Option<Times>,
    ) -> io::Result<()> {
        let directory = File::open(path)?;
        if let Some(times) = times {
            directory.set_times(file_times(times))?;
        }
        if self.request.preserve {
            directory.set_permissions(Permissions::from_mode(mode))?;
        } else if is_new && mode & 0o700 != 0o700 {
            let made = directory.metadata()?.mode() & 0o7777;
            directory.set_permissions(Permissions::from_mode(made & (mode | 0o077)))?;
        }
        Ok(())
    }

    fn receive_file(
        &mut self,
        path: &Path,
        announced: &Announced<'_>,
        times: Option<Times>,
    ) -> io::Result<()> {
        let is_new = !path.exists();
        let (file, is_regular) = match open_target(path, announced.mode) {
            Ok(opened) => opened,
            Err(error) => return self.complain(path, &sentence(&error)),
        };
        self.acknowledge()?;
        let written = self.receive_content(&file, announced.size)?;
        // Where the client could not read all of its file, it says so itself.
        self.answer()?;
        let finish = || match is_regular {
            true => self.finish_file(&file, announced, is_new, times),
            // A device is everybody's: it keeps its mode and its times.
            false => Ok(()),
        };
        match written.and_then(|()| finish()) {
            Ok(()) => self.acknowledge(),
            Err(error) => self.complain(path, &sentence(&error)),
        }
    }

    /// Takes `size` bytes, also those that can't be written: the client sends them all.
    fn receive_content(&mut self, file: &File, size: u64) -> io::Result<io::Result<()>> {
        let (mut left, mut written) = (size, Ok(()));
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
            let count = self.input.read(&mut self.block[..most])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= count as u64;
            if written.is_ok() {
                written = self.write(file, &self.block[..count]);
            }
        }
        Ok(written)
    }

    /// Writes all of it. A pipe or a terminal may have it wait, but not for longer than the client is there.
    fn write(&self, mut file: &File, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            match file.write(data) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => data = &data[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut both = [
                        sys::interest(file.as_raw_fd(), libc::POLLOUT),
                        sys::interest(self.output.as_raw_fd(), 0),
                    ];
                    sys::wait(&mut both, None)?;
                    if both[1].revents != 0 {
                        return Err(io::ErrorKind::ConnectionAborted.into());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn finish_file(
        &self,
        file: &File,
        announced: &Announced<'_>,
        is_new: bool,
        times: Option<Times>,
    ) -> io::Result<()> {
        // The file was not emptied before: it may have been longer.
        file.set_len(announced.size)?;
        if let Some(times) = times {
            file.set_times(file_times(times))?;
        }
        if self.request.preserve {
            file.set_permissions(Permissions::from_mode(announced.mode))?;
        } else if is_new && announced.mode & 0o200 == 0 {
            let made = file.metadata()?.mode() & 0o7777;
            file.set_permissions(Permissions::from_mode(made & !0o200))?;
        }
        Ok(())
    }

    fn send_all(&mut self, paths: &[PathBuf]) -> io::Result<()> {
        self.answer()?;
        paths.iter().try_for_each(|path| self.send(path, 0))
    }

    fn send(&mut self, path: &Path, depth: usize) -> io::Result<()> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .and_then(|file| Ok((file.metadata()?, file)));
        match opened {
            Err(error) => self.complain(path, &sentence(&error)),
            Ok((meta, file)) if meta.is_file() => self.send_file(path, &file, &meta),
            Ok((meta, _)) if meta.is_dir() && self.request.recursive && depth < DEEPEST => {
                self.send_directory(path, &meta, depth)
            }
            Ok(_) => self.complain(path, "not a regular file"),
        }
    }

    /// Announces a file or a directory; false where the client doesn't want it.
    fn announce(&mut self, kind: char, path: &Path, meta: &Metadata) -> io::Result<bool> {
        if self.request.preserve {
            let (modified, accessed) = (meta.mtime().max(0), meta.atime().max(0));
            let line = format!("T{modified} 0 {accessed} 0\n");
            self.output.write_all(line.as_bytes())?;
            if !self.answer()? {
                return Ok(false);
            }
        }
        let size = if meta.is_dir() { 0 } else { meta.len() };
        let mut line = format!("{kind}{:04o} {size} ", meta.mode() & 0o7777).into_bytes();
        let whole = path.as_os_str().as_bytes();
        let name = whole
            .rsplit(|byte| *byte == b'/')
            .find(|part| !part.is_empty());
        line.extend(one_line(name.unwrap_or(b".")));
        line.push(b'\n');
        self.output.write_all(&line)?;
        self.answer()
    }

    fn send_file(&mut self, path: &Path, mut file: &File, meta: &Metadata) -> io::Result<()> {
        if !self.announce('C', path, meta)? {
            return Ok(());
        }
        let (mut left, mut wrong) = (meta.len(), None);
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
            let mut count = 0;
            if wrong.is_none() {
                match file.read(&mut self.block[..most]) {
                    Ok(0) => wrong = Some("it became shorter meanwhile".to_owned()),
                    Ok(more) => count = more,
                    Err(error) => wrong = Some(sentence(&error)),
                }
            }
            // The client waits for what was announced, whatever happens to the file.
            if wrong.is_some() {
                count = most;
                self.block[..count].fill(0);
            }
            self.output.write_all(&self.block[..count])?;
            left -= count as u64;
        }
        match wrong {
            None => self.acknowledge()?,
            Some(why) => self.complain(path, &why)?,
        }
        self.answer().map(drop)
    }

    fn send_directory(&mut self, path: &Path, meta: &Metadata, depth: usize) -> io::Result<()> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) => return self.complain(path, &sentence(&error)),
        };
        if !self.announce('D', path, meta)? {
            return Ok(());
        }
        for entry in entries {
            match entry {
                Ok(entry) => self.send(&entry.path(), depth + 1)?,
                Err(error) => self.complain(path, &sentence(&error))?,
            }
        }
        self.output.write_all(b"E\n")?;
        self.answer().map(drop)
    }
}

/// Opens what the content of a file goes to; true for a regular file. A device takes it too, and a pipe that is read.
fn open_target(path: &Path, mode: u32) -> io::Result<(File, bool)> {
    let opened = OpenOptions::new()
        .write(true)
        // Nobody could tell an open that waits for a pipe's reader that the client is gone. And what names a terminal must
        // not make it this server's own.
        .custom_flags(libc::O_CREAT | libc::O_NONBLOCK | libc::O_NOCTTY)
        .mode(mode | 0o200)
        .open(path);
    match opened {
        Ok(file) => {
            let is_regular = file.metadata()?.is_file();
            Ok((file, is_regular))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) && is_pipe(path) => {
            Err(io::Error::other("nobody reads from this pipe"))
        }
        Err(error) => Err(error),
    }
}

fn is_pipe(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo())
}

/// `MODE SIZE NAME`; None where it is anything else, or the name leads out of the directory.
fn announced(line: &[u8]) -> Option<Announced<'_>> {
    let mut parts = line.splitn(3, |byte| *byte == b' ');
    let mut part = || std::str::from_utf8(parts.next()?).ok();
    let mode = u32::from_str_radix(part()?, 8).ok()?;
    let size = part()?
        .parse()
        .ok()
        .filter(|size| *size <= i64::MAX as u64)?;
    let name = parts.next()?;
    let leads_out = matches!(name, b"" | b"." | b"..") || name.contains(&b'/') || name.contains(&0);
    (!leads_out).then(|| Announced {
        mode: mode & 0o7777,
        size,
        name: OsStr::from_bytes(name),
    })
}

fn file_times((accessed, modified): Times) -> FileTimes {
    let moment = |seconds: u64| UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    let moment = |seconds| moment(seconds).unwrap_or_else(SystemTime::now);
    FileTimes::new()
        .set_accessed(moment(accessed))
        .set_modified(moment(modified))
}

/// A name as it may stand in a line.
fn one_line(name: &[u8]) -> impl Iterator<Item = u8> {
    name.iter().map(|byte| match byte {
        b'\n' | b'\r' => b'?',
        other => *other,
    })
}

/// What went wrong, as other programs say it.
fn sentence(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn an_announcement_of_any_content_names_one_entry_of_the_directory_or_nothing(
            mode in prop_oneof!["[0-7]{1,5}", "[0-9+-]{0,4}"],
            size in prop_oneof![any::<u64>().prop_map(|size| size.to_string()), "[0-9+-]{0,22}".boxed()],
            name in vec(prop_oneof![Just(b'.'), Just(b'/'), Just(0), Just(b' '), any::<u8>()], 0..6),
        ) {
            let line = [format!("{mode} {size} ").as_bytes(), &name].concat();
            if let Some(announced) = announced(&line) {
                let target = Path::new("/target");
                let path = target.join(announced.name);
                prop_assert_eq!(path.parent(), Some(target));
                prop_assert_eq!(path.file_name(), Some(OsStr::from_bytes(&name)));
                prop_assert!(announced.mode <= 0o7777 && announced.size <= i64::MAX as u64);
            }
        }

        #[test]
        fn an_honest_announcement_is_taken_as_it_is(
            mode in 0..=0o7777u32, size in 0..=i64::MAX as u64, name in "[a-z .]{1,8}x",
        ) {
            let line = format!("{mode:04o} {size} {name}").into_bytes();
            let announced = announced(&line).unwrap();
            prop_assert_eq!((announced.mode, announced.size), (mode, size));
            prop_assert_eq!(announced.name, OsStr::new(&name));
        }

        #[test]
        fn lines_of_any_content_are_survived(line in vec(any::<u8>(), 0..64)) {
            let _ = announced(&line);
            let _ = request::times(&line);
        }
    }
}
