//! The socket by which programs reach the client's agent.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A directory with a socket that leads to the client's agent; both are removed when it is dropped.
pub struct AgentSocket {
    directory: PathBuf,
    listener: UnixListener,
}

impl AgentSocket {
    /// Makes the socket in a new directory that only this user may enter.
    pub fn new(home: &Path) -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        let name = format!(
            "ssh-agent-{:016x}",
            u64::from_be_bytes(crate::crypto::random())
        );
        // An image may have no /tmp, or one that can't be written.
        for parent in [
            &std::env::temp_dir(),
            Path::new("/run"),
            Path::new("/dev/shm"),
            home,
        ] {
            let directory = parent.join(&name);
            match fs::DirBuilder::new().mode(0o700).create(&directory) {
                Ok(()) => {
                    let listener = UnixListener::bind(directory.join("agent"));
                    let listener = listener.inspect_err(|_| drop(fs::remove_dir(&directory)))?;
                    listener.set_nonblocking(true)?;
                    return Ok(Self {
                        directory,
                        listener,
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The next program that wants the agent.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream.into())
    }

    /// What to wait for.
    pub fn fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// The value for SSH_AUTH_SOCK.
    pub fn path(&self) -> PathBuf {
        self.directory.join("agent")
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path());
        let _ = fs::remove_dir(&self.directory);
    }
}
