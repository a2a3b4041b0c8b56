//! The children beside the one command: who wants to know how they end. All of them are reaped in one place,
//! [`init`](crate::init).

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys::{self, Change};

/// Wants to know how a child ended.
pub trait Watcher: Send + Sync {
    #[allow(missing_docs)]
    fn ended(&self, change: Change);
}

type Table = HashMap<libc::pid_t, Arc<dyn Watcher>>;

static CHILDREN: Mutex<Option<Table>> = Mutex::new(None);

fn table() -> MutexGuard<'static, Option<Table>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a child. It is not reaped before `watcher` is known, nor by anybody else if it could not be started.
pub fn start(
    spawn: impl FnOnce() -> io::Result<u32>,
    watcher: Arc<dyn Watcher>,
) -> io::Result<libc::pid_t> {
    let mut children = table();
    let pid = spawn()? as libc::pid_t;
    children.get_or_insert_default().insert(pid, watcher);
    Ok(pid)
}

/// Sends a signal to a child of [`start`] and to its process group, which it leads; not if it has ended: its number may
/// be another's by now.
pub fn signal(pid: libc::pid_t, signal: libc::c_int) {
    let children = table();
    if children
        .as_ref()
        .is_some_and(|table| table.contains_key(&pid))
    {
        sys::send_signal(-pid, signal);
    }
}

/// Collects one child that has ended, if there is one.
pub fn reap_one() -> Option<(libc::pid_t, Change)> {
    let mut children = table();
    let (pid, change) = sys::reap_one()?;
    if let Some(watcher) = children.as_mut().and_then(|table| table.remove(&pid)) {
        watcher.ended(change);
    }
    Some((pid, change))
}
