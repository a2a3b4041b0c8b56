//! What all connections have in common: settings, keys, and the counts that bound them.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::algorithms::Algorithms;
use crate::keys::HostKeys;
use crate::user::User;

/// How many clients may be there that have not logged in.
const MOST_STRANGERS: usize = 64;

/// What all connections have in common.
pub struct Shared {
    /// What the server proves itself with.
    pub host_keys: Arc<HostKeys>,
    /// What is offered in an exchange of keys.
    pub algorithms: &'static Algorithms,
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
    pub fn is_login(&self, name: &[u8]) -> bool {
        let mut known = self.logins.iter().chain([&self.user.name]);
        name == b"root" || known.any(|login| login.as_bytes() == name)
    }

    /// A place for one more session.
    pub fn take_place(&self) -> Option<Arc<()>> {
        self.sessions.take(self.most)
    }
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
    pub fn admit(self: &Arc<Self>, stream: &TcpStream) -> io::Result<Stranger> {
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

/// Counts what holds a place, by who still has one.
#[derive(Default)]
pub struct Places(Mutex<Vec<Weak<()>>>);

impl Places {
    /// A place, unless `most` are taken. It is free again when what this gives is dropped.
    pub fn take(&self, most: usize) -> Option<Arc<()>> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|place| place.strong_count() > 0);
        (places.len() < most).then(|| {
            let place = Arc::new(());
            places.push(Arc::downgrade(&place));
            place
        })
    }
}
