//! Which processes have a socket: `/proc/PID/fd` names it by its inode, as the kernel's tables do (proc(5)).

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Scope;

/// A look at processes takes no longer than this.
const LONGEST: Duration = Duration::from_secs(1);
/// Of an environment, or another file of a process, no more is read.
const MOST_BYTES: u64 = 2 << 20;
/// Of a process no more descriptors are looked at.
const MOST_DESCRIPTORS: usize = 100_000;
/// Of a program's name.
const LONGEST_NAME: usize = 64;

/// Whose the sockets are.
#[derive(Default)]
pub struct Owners {
    /// By inode: the name of a program that has it, of those in the scope that could be looked at.
    pub programs: HashMap<u64, Vec<u8>>,
    /// Those of this process.
    pub ours: HashSet<u64>,
    /// All processes were looked at, or all that matter.
    pub whole: bool,
}

/// Looks for the owners of these sockets. Of processes that may not be looked into nothing is known.
pub fn of(sockets: &HashSet<u64>, scope: &Scope) -> Owners {
    let until = Instant::now() + LONGEST;
    let mut owners = Owners {
        ours: descriptors(Path::new("/proc/self"), sockets),
        ..Owners::default()
    };
    let wanted: HashSet<_> = sockets.difference(&owners.ours).copied().collect();
    let own_session = session(Path::new("/proc/self"));
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes.filter(|entry| is_number(&entry.file_name())) {
        if owners.programs.len() == wanted.len() {
            break;
        }
        if Instant::now() >= until {
            // Names that are missing are no loss.
            owners.whole = *scope == Scope::Network;
            return owners;
        }
        let process = process.path();
        if let Scope::Own(mark) = scope
            && !(own_session.is_some() && session(&process) == own_session)
            && !has_mark(&process, mark)
        {
            continue;
        }
        add(&mut owners, &process, &wanted);
    }
    owners.whole = true;
    owners
}

fn is_number(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
}

/// Notes what one process has; the first that has a socket gives it its name.
fn add(owners: &mut Owners, process: &Path, wanted: &HashSet<u64>) {
    let mut theirs = descriptors(process, wanted);
    theirs.retain(|inode| !owners.programs.contains_key(inode));
    if theirs.is_empty() {
        return;
    }
    let mut name = read(&process.join("comm"));
    name.truncate(name.trim_ascii_end().len().min(LONGEST_NAME));
    let named = theirs.into_iter().map(|inode| (inode, name.clone()));
    owners.programs.extend(named);
}

/// Which of these sockets a process has open.
fn descriptors(process: &Path, wanted: &HashSet<u64>) -> HashSet<u64> {
    let open = fs::read_dir(process.join("fd"));
    let links = open.into_iter().flatten().flatten();
    links
        .take(MOST_DESCRIPTORS)
        .filter_map(|link| socket(fs::read_link(link.path()).ok()?.to_str()?))
        .filter(|inode| wanted.contains(inode))
        .collect()
}

/// The inode in `socket:[4711]`.
fn socket(link: &str) -> Option<u64> {
    let number = link.strip_prefix("socket:[")?.strip_suffix(']')?;
    number.parse().ok()
}

fn session(process: &Path) -> Option<Vec<u8>> {
    session_in(&read(&process.join("stat")))
}

/// The fourth field behind the name, which may hold anything.
fn session_in(stat: &[u8]) -> Option<Vec<u8>> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let fields = stat[name_end + 1..].split(u8::is_ascii_whitespace);
    let field = fields.filter(|field| !field.is_empty()).nth(3)?;
    Some(field.to_vec())
}

fn has_mark(process: &Path, mark: &[u8]) -> bool {
    let environment = read(&process.join("environ"));
    environment.split(|byte| *byte == 0).any(|one| one == mark)
}

/// Nothing where it may not be read, or the process has ended.
fn read(file: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let opened = File::open(file);
    let _ = opened.and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_found_behind_a_name_that_looks_like_more_fields() {
        let stat = b"12 (a) S 1 (b c) R 1 12 777 0 -1 4194560";
        assert_eq!(session_in(stat), Some(b"777".to_vec()));
        for wrong in [&b""[..], b"12 S 1 2 3", b"12 (a) S 1 2"] {
            assert_eq!(session_in(wrong), None);
        }
    }

    #[test]
    fn a_descriptor_that_is_no_socket_has_no_inode() {
        assert_eq!(socket("socket:[4711]"), Some(4711));
        for other in ["socket:[]", "socket:[-1]", "socket:[1", "pipe:[1]", "/a"] {
            assert_eq!(socket(other), None, "{other}");
        }
    }
}
