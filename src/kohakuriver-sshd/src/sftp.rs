//! The file server behind the `sftp` subsystem: version 3 (draft-ietf-secsh-filexfer-02) with OpenSSH's extensions.
//!
//! It runs in a thread of its own and may wait for a disk; the connection sees it as one more socket.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use crate::wire::{Malformed, Put, Reader};

mod attributes;
mod files;
mod listing;
mod paths;
mod protocol;

use attributes::{Wanted, put_attributes};
use files::{Handle, file_system};
use listing::Names;
use paths::{one_name, real_path};
use protocol::{
    DATA, Done, EXTENSIONS, LONGEST, MOST_HANDLES, Refused, VERSION, done, kind, status,
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
            kind::OPEN => return self.open(reader, reply),
            kind::CLOSE => return self.close(reader, reply),
            kind::READ => return self.read(reader, reply),
            kind::WRITE => return self.write(reader, reply),
            kind::LSTAT => return attributes(&fs::symlink_metadata(self.path(reader)?)?, reply),
            kind::STAT => return attributes(&fs::metadata(self.path(reader)?)?, reply),
            kind::FSTAT => return attributes(&self.file(reader)?.0.metadata()?, reply),
            kind::OPENDIR => return self.open_directory(reader, reply),
            kind::READDIR => return self.read_directory(reader, reply),
            kind::REALPATH => return one_name(&real_path(&self.path(reader)?)?, reply),
            kind::READLINK => return one_name(&fs::read_link(self.path(reader)?)?, reply),
            kind::EXTENDED => return self.extended(reader, reply),
            _ => self.change(number, reader)?,
        }
        done(reply)
    }

    /// Requests that are answered by how they went.
    fn change(&self, number: u8, reader: &mut Reader<'_>) -> Result<(), Refused> {
        match number {
            kind::SETSTAT => self.set_attributes(reader, true)?,
            kind::FSETSTAT => {
                let file = self.file(reader)?.0;
                Wanted::read(reader)?.apply_to_file(file)?;
            }
            kind::REMOVE => fs::remove_file(self.path(reader)?)?,
            kind::MKDIR => self.make_directory(reader)?,
            kind::RMDIR => fs::remove_dir(self.path(reader)?)?,
            kind::RENAME => self.rename(reader)?,
            kind::SYMLINK => self.link(reader)?,
            _ => {
                return Err(Refused::Status(
                    status::UNSUPPORTED,
                    "there is no such request",
                ));
            }
        }
        Ok(())
    }

    fn extended(&mut self, reader: &mut Reader<'_>, reply: &mut Vec<u8>) -> Done {
        match reader.string()? {
            b"posix-rename@openssh.com" => fs::rename(self.path(reader)?, self.path(reader)?)?,
            b"hardlink@openssh.com" => fs::hard_link(self.path(reader)?, self.path(reader)?)?,
            b"fsync@openssh.com" => self.file(reader)?.0.sync_all()?,
            b"copy-data" => self.copy_data(reader)?,
            b"lsetstat@openssh.com" => self.set_attributes(reader, false)?,
            b"statvfs@openssh.com" => return file_system(&self.place(reader)?, reply),
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
}

fn attributes(meta: &Metadata, reply: &mut Vec<u8>) -> Done {
    put_attributes(meta, reply);
    Ok(kind::ATTRS)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn asked(server: &mut Server, request: &[u8]) -> Vec<u8> {
        let mut reply = Vec::new();
        server.answer(request, &mut reply).unwrap();
        reply.split_off(9)
    }

    #[test]
    fn a_part_of_a_file_is_copied_over_another_part_unless_they_overlap() {
        let home = std::env::temp_dir().join(format!(
            "sftp-{:016x}",
            u64::from_be_bytes(crate::crypto::random())
        ));
        fs::create_dir(&home).unwrap();
        fs::write(home.join("a"), b"0123456789").unwrap();
        let mut server = Server {
            home: home.clone(),
            handles: HashMap::new(),
            next: 0,
            users: Names::default(),
        };
        let mut open = vec![kind::OPEN, 0, 0, 0, 1];
        open.put_string(b"a");
        open.put_u32(3); // to read and to write
        open.put_u32(0); // no attributes
        let handle = Reader::new(&asked(&mut server, &open))
            .string()
            .unwrap()
            .to_vec();
        let mut copied = |from: u64, length: u64, to: u64| {
            let mut request = vec![kind::EXTENDED, 0, 0, 0, 2];
            request.put_string(b"copy-data");
            request.put_string(&handle);
            request.put_u64(from);
            request.put_u64(length);
            request.put_string(&handle);
            request.put_u64(to);
            let answer = asked(&mut server, &request);
            (
                Reader::new(&answer).u32().unwrap(),
                fs::read(home.join("a")).unwrap(),
            )
        };
        assert_eq!(copied(0, 3, 5), (status::OK, b"0123401289".to_vec()));
        assert_eq!(copied(0, 3, 2), (status::FAILURE, b"0123401289".to_vec()));
        assert_eq!(copied(0, 0, 4), (status::FAILURE, b"0123401289".to_vec()));
        assert_eq!(copied(8, 0, 10), (status::OK, b"012340128989".to_vec()));
        assert_eq!(copied(10, 9, 0), (status::EOF, b"892340128989".to_vec()));
        assert_eq!(copied(99, 0, 0), (status::OK, b"892340128989".to_vec()));
        assert_eq!(copied(u64::MAX, 1, u64::MAX).0, status::EOF);
        assert_eq!(copied(0, 1, u64::MAX).0, status::FAILURE);
        drop(server);
        fs::remove_dir_all(&home).unwrap();
    }

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
