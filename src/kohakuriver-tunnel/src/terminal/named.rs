//! Terminals with a name, each of one user: they outlive their streams, and any stream of that user can have them next.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use super::control::{Attachment, Control};
use super::frames::tag;
use super::output::Output;
use crate::protocol::Mark;

/// For who comes when it is over.
const ENDED: &[u8] = b"EAGAIN: the session has just ended; try again";

type Name = (Mark, String);

struct Session {
    control: Arc<Control>,
    since: Instant,
    /// That of whoever has it: it goes with the stream and the line.
    attached: Weak<AtomicBool>,
}

/// All of them.
#[derive(Clone, Default)]
pub struct Named(Arc<Mutex<HashMap<Name, Session>>>);

/// One that can be found by its name, until it is dropped.
pub struct Registered {
    named: Named,
    name: Name,
    control: Arc<Control>,
}

impl Named {
    fn table(&self) -> MutexGuard<'_, HashMap<Name, Session>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the session of this name go on over a line, if there is one; else the line is given back.
    pub fn attach(
        &self,
        mark: &Mark,
        name: &str,
        at: Attachment,
    ) -> Result<Arc<Control>, Attachment> {
        match self.table().get_mut(&(*mark, name.to_owned())) {
            Some(session) => {
                session.attached = Arc::downgrade(&at.attended);
                session.control.offer(at);
                Ok(Arc::clone(&session.control))
            }
            None => Err(at),
        }
    }

    /// Has a new one found, unless this user has `most` of them.
    pub fn register(
        &self,
        mark: &Mark,
        name: &str,
        at: &Attachment,
        control: &Arc<Control>,
        most: usize,
    ) -> Option<Registered> {
        let mut table = self.table();
        if table.keys().filter(|(of, _)| of == mark).count() >= most {
            return None;
        }
        let name = (*mark, name.to_owned());
        let session = Session {
            control: Arc::clone(control),
            since: Instant::now(),
            attached: Arc::downgrade(&at.attended),
        };
        table.insert(name.clone(), session);
        Some(Registered {
            named: self.clone(),
            name,
            control: Arc::clone(control),
        })
    }

    /// Those of one user, a line each: its name, whether somebody has it, and for how many seconds it has been there.
    pub fn listed(&self, mark: &Mark) -> String {
        let table = self.table();
        let mut own: Vec<_> = table.iter().filter(|((of, _), _)| of == mark).collect();
        own.sort_by_key(|((_, name), _)| name.as_str());
        let mut lines = String::new();
        for ((_, name), session) in own {
            let state = if session.attached.strong_count() > 0 {
                "attached"
            } else {
                "detached"
            };
            let _ = writeln!(
                lines,
                "{name} {state} {}",
                session.since.elapsed().as_secs()
            );
        }
        lines
    }

    /// Ends those of one user.
    pub fn revoke(&self, mark: &Mark) {
        for ((of, _), session) in self.table().iter() {
            if of == mark {
                session.control.revoke();
            }
        }
    }
}

impl Registered {
    /// Nobody finds it any more; false if a line has come that was not taken yet.
    pub fn retire(&self) -> bool {
        let mut table = self.named.table();
        let over = !self.control.is_offered();
        if over {
            self.remove(&mut table);
        }
        over
    }

    /// By now another one may have its name.
    fn remove(&self, table: &mut HashMap<Name, Session>) {
        if let Some(session) = table.get(&self.name)
            && Arc::ptr_eq(&session.control, &self.control)
        {
            table.remove(&self.name);
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.remove(&mut self.named.table());
        if let Some(late) = self.control.next() {
            late.part(&Output::default(), tag::FAILED, ENDED);
        }
    }
}
