//! Accepts clients, each in a thread of its own.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::connection::{Connection, Places};
use crate::keys::HostKey;
use crate::log;
use crate::session::User;

/// Before trying again where the system gives no more descriptors or threads.
const PAUSE: Duration = Duration::from_millis(200);

/// How many clients may be there that have not logged in.
const MOST_STRANGERS: usize = 64;

/// What all connections have in common.
pub struct Shared {
    /// What the server proves itself with.
    pub host_key: Arc<HostKey>,
    /// The file of keys that are let in.
    pub authorized_keys: PathBuf,
    /// Who everything runs as.
    pub user: User,
    /// Login names beside the user's own and root.
    pub logins: Vec<String>,
    /// How many files a program may open.
    pub files: libc::rlimit,
    /// New keys after so many bytes.
    pub rekey_bytes: u64,
    /// How many connections of users there may be, and how many sessions on all of them.
    pub most: usize,
    /// The connections of clients that have logged in.
    pub connections: Places,
    /// Those of clients that have not, which take no user's place.
    pub strangers: Arc<Strangers>,
    /// The sessions that there are.
    pub sessions: Places,
}

impl Shared {
    /// May this login name be used? Whatever it is, the user is the same.
    pub fn is_login(&self, name: &str) -> bool {
        name == self.user.name || name == "root" || self.logins.iter().any(|login| login == name)
    }

    /// A place for one more session.
    pub fn take_place(&self) -> Option<Arc<()>> {
        self.sessions.take(self.most)
    }
}

/// Serves whoever connects, for ever.
pub fn serve(listener: &TcpListener, shared: &Arc<Shared>) -> ! {
    loop {
        let accepted = listener
            .accept()
            .and_then(|(stream, _)| admit(stream, shared));
        match accepted {
            Ok(()) => {}
            Err(error) if is_clients_own(&error) => {}
            Err(error) => {
                log!("can't take a connection: {error}");
                thread::sleep(PAUSE);
            }
        }
    }
}

fn is_clients_own(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionReset, Interrupted, NotConnected, WouldBlock,
    };
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted | NotConnected | WouldBlock
    )
}

fn admit(stream: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    let stranger = shared.strangers.admit(&stream)?;
    let connection = Connection::new(stream, shared.clone(), stranger)?;
    thread::Builder::new()
        .name("client".into())
        .spawn(move || connection.run())
        .map(drop)
}

/// The sockets of clients that have not logged in, the one that has been waiting for longest first.
#[derive(Default)]
pub struct Strangers(Mutex<(u64, BTreeMap<u64, TcpStream>)>);

/// A client that has not logged in, for as long as this is kept.
pub struct Stranger(Arc<Strangers>, u64);

impl Strangers {
    fn locked(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, TcpStream>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in one more. Where there are too many, who has been waiting for longest has to go: one that logs in is gone
    /// from here in a moment, and nobody keeps it out by connecting and saying nothing.
    fn admit(self: &Arc<Self>, stream: &TcpStream) -> io::Result<Stranger> {
        let copy = stream.try_clone()?;
        let mut locked = self.locked();
        let (next, streams) = &mut *locked;
        *next += 1;
        streams.insert(*next, copy);
        while streams.len() > MOST_STRANGERS {
            if let Some((_, oldest)) = streams.pop_first() {
                // Its thread sees the end of it. A socket that is gone has no end to be told.
                let _ = oldest.shutdown(Shutdown::Both);
            }
        }
        Ok(Stranger(self.clone(), *next))
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.locked().1.remove(&self.1);
    }
}
