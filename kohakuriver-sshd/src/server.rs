//! Accepts clients, each in a thread of its own.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::connection::{Connection, Places};
use crate::keys::HostKey;
use crate::log;
use crate::session::User;

/// Before trying again where the system gives no more descriptors or threads.
const PAUSE: Duration = Duration::from_millis(200);

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
    /// How many connections there may be, and how many sessions on all of them.
    pub most: usize,
    /// The connections that there are.
    pub connections: Places,
    /// The connections that are being refused.
    pub refusals: Places,
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
    let connection = Connection::new(stream, shared.clone())?;
    // Who is refused has a place too, for the moment that it takes to say so.
    let (place, serve): (_, fn(Connection)) = match shared.connections.take(shared.most) {
        Some(place) => (place, Connection::run),
        None => match shared.refusals.take(shared.most) {
            Some(place) => (place, Connection::refuse),
            None => return Ok(()),
        },
    };
    thread::Builder::new()
        .name("client".into())
        .spawn(move || {
            serve(connection);
            drop(place);
        })?;
    Ok(())
}
