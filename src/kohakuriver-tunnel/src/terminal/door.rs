//! Where programs of the container connect to be led to a user: a port of the loopback, or a Unix socket.

use std::fs::{self, Metadata};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::sys;

/// As many may wait to be taken.
const BACKLOG: i32 = 128;

/// A socket that listens there.
#[derive(Debug)]
pub struct Door {
    sock: Socket,
    /// Of a Unix socket its path, and which file it is there.
    made: Option<(PathBuf, Metadata)>,
}

impl Door {
    /// A port of 127.0.0.1. The error is the text of an ERROR.
    pub fn at_port(port: u16) -> Result<Self, String> {
        let listens = || -> io::Result<Socket> {
            let sock = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            sock.set_reuse_address(true)?;
            sock.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
            waiting(sock)
        };
        let sock = listens().map_err(|error| {
            let place = format!("port {port}");
            not_taken(&error, &place)
        })?;
        Ok(Self { sock, made: None })
    }

    /// A Unix socket for the tunnel client's own user, which goes with this. One that is left of a program that has gone
    /// is replaced where it is that user's.
    pub fn at_path(path: &Path) -> Result<Self, String> {
        let at = address(path)?;
        let listens = || -> io::Result<Self> {
            make_room(path, &at)?;
            let sock = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            sys::for_its_user_alone(&sock)?;
            sock.bind(&at)?;
            let made = Some((path.to_owned(), fs::symlink_metadata(path)?));
            let sock = waiting(sock)?;
            Ok(Self { sock, made })
        };
        listens().map_err(|error| not_taken(&error, &path.display().to_string()))
    }

    /// Whoever came; the error is `WouldBlock` where nobody has.
    pub fn accept(&self) -> io::Result<Socket> {
        let (sock, _) = self.sock.accept()?;
        sock.set_nonblocking(false)?;
        if self.made.is_none() {
            sock.set_tcp_nodelay(true)?;
        }
        Ok(sock)
    }
}

impl AsRawFd for Door {
    fn as_raw_fd(&self) -> RawFd {
        self.sock.as_raw_fd()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some((path, made)) = &self.made
            && fs::symlink_metadata(path).is_ok_and(|now| is_same(&now, made))
        {
            // It may have gone meanwhile, which is what is wanted.
            let _ = fs::remove_file(path);
        }
    }
}

/// The address of a Unix socket. The error is the text of an ERROR.
pub fn address(path: &Path) -> Result<SockAddr, String> {
    SockAddr::unix(path).map_err(|_| {
        let path = path.display();
        format!("ENAMETOOLONG: {path} can't be the path of a socket, which has 107 bytes at most")
    })
}

fn waiting(sock: Socket) -> io::Result<Socket> {
    sock.set_nonblocking(true)?;
    sock.listen(BACKLOG)?;
    Ok(sock)
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Takes away what a program has left there that has gone. Whatever else there is, is for `bind` to find.
fn make_room(path: &Path, at: &SockAddr) -> io::Result<()> {
    let Ok(there) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !there.file_type().is_socket() || there.uid() != sys::user() {
        return Ok(());
    }
    let asks = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    asks.set_nonblocking(true)?;
    match asks.connect(at) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}

fn not_taken(error: &io::Error, place: &str) -> String {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => format!("EADDRINUSE: {place} is in use in the task"),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            format!("EACCES: the task's tunnel client may not listen on {place}")
        }
        Some(libc::ENOENT | libc::ENOTDIR) => {
            format!("ENOENT: the folder of {place} is not there in the task")
        }
        _ => format!("EIO: {place} of the task can't be listened on: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    /// A folder of a test's own, until it is dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("door-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn a_socket_is_for_its_user_alone_and_goes_with_its_door() {
        let folder = Folder::new("alone");
        let path = folder.0.join("x.sock");
        let door = Door::at_path(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let came = UnixStream::connect(&path);
        assert!(came.is_ok() && door.accept().is_ok());
        drop(door);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_program_has_left_is_replaced_and_what_is_used_is_not() {
        let folder = Folder::new("left");
        let path = folder.0.join("x.sock");
        let other = UnixListener::bind(&path).unwrap();
        let text = Door::at_path(&path).unwrap_err();
        assert_eq!(
            text,
            format!("EADDRINUSE: {} is in use in the task", path.display())
        );
        drop(other);
        assert!(Door::at_path(&path).is_ok());
        assert!(!path.exists());
        fs::write(&path, b"a file").unwrap();
        assert!(Door::at_path(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }

    #[test]
    fn what_has_taken_its_place_meanwhile_stays() {
        let folder = Folder::new("place");
        let path = folder.0.join("x.sock");
        let door = Door::at_path(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(door);
        assert!(path.exists());
    }

    #[test]
    fn a_path_that_can_not_be_had_is_told_in_a_sentence() {
        let folder = Folder::new("none");
        let missing = folder.0.join("none/x.sock");
        assert!(
            Door::at_path(&missing)
                .unwrap_err()
                .starts_with("ENOENT: the folder of ")
        );
        let long = folder.0.join("x".repeat(120));
        assert!(
            Door::at_path(&long)
                .unwrap_err()
                .starts_with("ENAMETOOLONG: ")
        );
    }
}
