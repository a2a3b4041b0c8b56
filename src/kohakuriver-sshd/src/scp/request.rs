//! The command line by which a client asks for a copy, read as a shell would read it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::Times;
use crate::user::is_executable;
use crate::words::{Letter, plain, split};

/// Which way files go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// `-t`
    FromClient,
    /// `-f`
    ToClient,
}

/// What is to be copied.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub(super) direction: Direction,
    pub(super) recursive: bool,
    pub(super) preserve: bool,
    pub(super) target_is_directory: bool,
    paths: Vec<Vec<Letter>>,
}

impl Request {
    /// The request in a command line, if that is the remote half of a copy and no program in `path` (as in `$PATH`) can do
    /// it. None for all that only a shell understands.
    pub fn for_missing_program(line: &[u8], path: &OsStr) -> Option<Self> {
        let words = words(line)?;
        let (name, words) = words.split_first()?;
        let program = PathBuf::from(OsStr::from_bytes(&plain(name)));
        let is_there = match program.components().count() {
            1 => std::env::split_paths(path).any(|each| is_executable(&each.join(&program))),
            _ => is_executable(&program),
        };
        if is_there || program.file_name() != Some(OsStr::new("scp")) {
            return None;
        }
        Self::from_words(words)
    }

    fn from_words(words: &[Vec<Letter>]) -> Option<Self> {
        let (mut to, mut from) = (false, false);
        let (mut recursive, mut preserve, mut target_is_directory) = (false, false, false);
        let mut rest = words;
        while let Some((word, more)) = rest.split_first() {
            let word = plain(word);
            let Some(letters) = word.strip_prefix(b"-").filter(|some| !some.is_empty()) else {
                break;
            };
            rest = more;
            if letters == b"-" {
                break;
            }
            for letter in letters {
                match letter {
                    b't' => to = true,
                    b'f' => from = true,
                    b'r' => recursive = true,
                    b'p' => preserve = true,
                    b'd' => target_is_directory = true,
                    b'v' | b'q' => {}
                    _ => return None,
                }
            }
        }
        let direction = match (to, from) {
            (true, false) => Direction::FromClient,
            (false, true) => Direction::ToClient,
            _ => return None,
        };
        (!rest.is_empty()).then(|| Self {
            direction,
            recursive,
            preserve,
            target_is_directory,
            paths: rest.to_vec(),
        })
    }

    /// The paths, with `~` and wildcards resolved; relative ones begin at `home`.
    pub(super) fn expand(&self, home: &Path) -> Vec<PathBuf> {
        self.paths
            .iter()
            .flat_map(|path| expand(path, home))
            .collect()
    }
}

/// The words of a command line; None where it has what only a shell can do.
fn words(line: &[u8]) -> Option<Vec<Vec<Letter>>> {
    let only_a_shell_can = |byte, quote| match quote {
        None => b"|&;<>()\n$`".contains(&byte),
        Some(quote) => quote == b'"' && b"$`".contains(&byte),
    };
    let found = split(line, only_a_shell_can)?;
    found.is_complete.then_some(found.words)
}

fn expand(word: &[Letter], home: &Path) -> Vec<PathBuf> {
    let (base, word) = match word {
        [(b'~', true)] => (home, &word[1..]),
        [(b'~', true), (b'/', _), ..] => (home, &word[2..]),
        [(b'/', _), ..] => (Path::new("/"), word),
        _ => (home, word),
    };
    let literal = base.join(OsStr::from_bytes(&plain(word)));
    let mut found = vec![base.to_owned()];
    for part in word
        .split(|(byte, _)| *byte == b'/')
        .filter(|part| !part.is_empty())
    {
        found = if part
            .iter()
            .any(|letter| matches!(letter, (b'*' | b'?' | b'[', true)))
        {
            found.iter().flat_map(|each| matching(each, part)).collect()
        } else {
            let name = plain(part);
            found
                .iter()
                .map(|each| each.join(OsStr::from_bytes(&name)))
                .collect()
        };
    }
    let wild = word
        .iter()
        .any(|letter| matches!(letter, (b'*' | b'?' | b'[', true)));
    found.retain(|path| wild && path.symlink_metadata().is_ok());
    // As a shell does: what matches nothing is the name of a file, which is then missing.
    if found.is_empty() {
        vec![literal]
    } else {
        found
    }
}

fn matching(directory: &Path, pattern: &[Letter]) -> Vec<PathBuf> {
    let shows_hidden = pattern.first().is_some_and(|first| first.0 == b'.');
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<Vec<u8>> = entries
        .map(|entry| entry.file_name().into_vec())
        .filter(|name| (shows_hidden || name[0] != b'.') && matches(pattern, name))
        .collect();
    names.sort_unstable();
    let join = |name: &Vec<u8>| directory.join(OsStr::from_bytes(name));
    names.iter().map(join).collect()
}

/// Does the name match? At most one place is kept to come back to, so that the time is bounded by the product of lengths.
fn matches(pattern: &[Letter], name: &[u8]) -> bool {
    let (mut at, mut place, mut again) = (0, 0, None);
    while place < name.len() {
        if pattern.get(at) == Some(&(b'*', true)) {
            at += 1;
            again = Some((at, place));
        } else if let Some(length) = matches_one(&pattern[at..], name[place]) {
            (at, place) = (at + length, place + 1);
        } else if let Some((star, from)) = again {
            again = Some((star, from + 1));
            (at, place) = (star, from + 1);
        } else {
            return false;
        }
    }
    pattern[at..].iter().all(|letter| *letter == (b'*', true))
}

/// How much of the pattern the byte matches, if it does.
fn matches_one(pattern: &[Letter], byte: u8) -> Option<usize> {
    match pattern.first()? {
        (b'?', true) => Some(1),
        (b'[', true) => {
            let Some(end) = pattern.iter().skip(2).position(|each| each.0 == b']') else {
                return (byte == b'[').then_some(1);
            };
            let class = &pattern[1..end + 2];
            let negated = matches!(class[0], (b'!' | b'^', true));
            let mut class = &class[usize::from(negated)..];
            let mut inside = false;
            while let Some((first, _)) = class.first() {
                let last = match class {
                    [_, (b'-', true), (last, _), ..] => *last,
                    _ => *first,
                };
                inside |= (*first..=last).contains(&byte);
                class = &class[if last == *first { 1 } else { 3 }..];
            }
            (inside != negated).then_some(end + 3)
        }
        (other, _) => (*other == byte).then_some(1),
    }
}

/// `MODIFIED MICROSECONDS ACCESSED MICROSECONDS`
pub(super) fn times(line: &[u8]) -> Option<Times> {
    let text = std::str::from_utf8(line).ok()?;
    let numbers: Option<Vec<u64>> = text.split(' ').map(|part| part.parse().ok()).collect();
    match numbers?[..] {
        [modified, _, accessed, _] => Some((accessed, modified)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(line: &str) -> Option<Request> {
        Request::for_missing_program(line.as_bytes(), OsStr::new("/nowhere"))
    }

    #[test]
    fn only_a_plain_copy_is_taken_from_the_shell() {
        for line in [
            "scp -t /x",
            "scp -v -r -p -d -t -- '/a b'",
            "/no/such/scp -pf ~/x*",
        ] {
            assert!(request(line).is_some(), "{line}");
        }
        for line in [
            "scp a b",
            "scp -t",
            "scp -tf x",
            "scp -t $X",
            "scp -t x; id",
            "scp -t \"`id`\"",
            "scp -S x -t y",
            "cat x",
            "scp -t 'x",
        ] {
            assert!(request(line).is_none(), "{line}");
        }
    }

    #[test]
    fn wildcards_match_as_in_a_shell() {
        let check = |pattern: &str, name: &str| {
            matches(&words(pattern.as_bytes()).unwrap()[0], name.as_bytes())
        };
        for (pattern, name) in [
            ("*.t?t", "a.b.txt"),
            ("a[b-d]e", "ace"),
            ("[!x]", "y"),
            ("'*'", "*"),
            ("*", "abc"),
            ("[a", "[a"),
        ] {
            assert!(check(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("*.t?t", "a.tt"),
            ("[!x]", "x"),
            ("'*'", "a"),
            ("a*b*c", "abx"),
        ] {
            assert!(!check(pattern, name), "{pattern} {name}");
        }
    }
}
