//! What a terminal is opened with: the part of CONNECT behind the mark (docs/protocol.md §6).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::protocol::take;

/// Without this flag the command has three pipes.
const ON_TERMINAL: u8 = 1;
/// The terminal has a name, which stands behind all else.
const NAMED: u8 = 2;
/// Nothing is started: the user's sessions are told.
const LIST: u8 = 4;
/// Nothing is started: files are read or written, which the command says.
const FILES: u8 = 8;
/// Nothing is started: a connection leads beyond the task, as the command says.
const BEYOND: u8 = 16;
const LONGEST_NAME: usize = 64;
/// Of a start that is for files or leads beyond the task: the host writes down all of it that says what, or where to.
const LONGEST_FOR_FILES: usize = 16 << 10;

/// What is to be run.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Start {
    pub on_terminal: bool,
    /// Only the names of the sessions that there are.
    pub list: bool,
    /// No command: what stands in its place says which files are read or written.
    pub files: bool,
    /// No command: what stands in its place says where a connection leads to, or which port it is waited for at.
    pub beyond: bool,
    pub rows: u16,
    pub cols: u16,
    /// `NAME`, `NUMBER`, either with `:GROUP`, or nothing for the client's own.
    pub user: OsString,
    /// Absolute, or nothing for the client's own.
    pub workdir: OsString,
    /// The program and its arguments, or nothing for the best shell.
    pub command: Vec<OsString>,
    /// `NAME=VALUE`, in addition to the client's own environment.
    pub env: Vec<OsString>,
    /// The name of the session that this is, or nothing: letters, digits, `.`, `_` and `-`, 64 of them at most.
    pub session: String,
}

impl Start {
    /// What these bytes say; `None` where they say nothing.
    pub fn parse(mut bytes: &[u8]) -> Option<Self> {
        let size = bytes.len();
        let rest = &mut bytes;
        let [flags] = take(rest)?;
        let alone = flags & (FILES | BEYOND);
        if flags & !(ON_TERMINAL | NAMED | LIST | FILES | BEYOND) != 0
            || (alone != 0 && flags != FILES && flags != BEYOND)
        {
            return None;
        }
        let start = Self {
            on_terminal: flags & ON_TERMINAL != 0,
            list: flags & LIST != 0,
            files: flags & FILES != 0,
            beyond: flags & BEYOND != 0,
            rows: u16::from_be_bytes(take(rest)?),
            cols: u16::from_be_bytes(take(rest)?),
            user: text(rest)?,
            workdir: text(rest)?,
            command: texts(rest)?,
            env: texts(rest)?,
            session: if flags & NAMED == 0 {
                String::new()
            } else {
                name(rest)?
            },
        };
        let good = alone == 0
            || (start.user.is_empty() && start.env.is_empty() && size <= LONGEST_FOR_FILES);
        (rest.is_empty() && good).then_some(start)
    }
}

fn text(rest: &mut &[u8]) -> Option<OsString> {
    let length = u32::from_be_bytes(take(rest)?) as usize;
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    (!head.contains(&0)).then(|| OsString::from_vec(head.to_vec()))
}

fn name(rest: &mut &[u8]) -> Option<String> {
    let name = text(rest)?.into_string().ok()?;
    let plain = |each: u8| each.is_ascii_alphanumeric() || b"._-".contains(&each);
    let good = (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(plain);
    good.then_some(name)
}

fn texts(rest: &mut &[u8]) -> Option<Vec<OsString>> {
    let count = u32::from_be_bytes(take(rest)?);
    (0..count).map(|_| text(rest)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(text: &[u8]) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes()[..], text].concat()
    }

    fn for_files(user: &[u8], path: &[u8], env: &[&[u8]]) -> Vec<u8> {
        let env: Vec<u8> = env.iter().flat_map(|each| packed(each)).collect();
        [
            &[FILES, 0, 24, 0, 80][..],
            &packed(user),
            &packed(b"/etc"),
            &[0, 0, 0, 2],
            &packed(b"from"),
            &packed(path),
            &[0, 0, 0, u8::from(!env.is_empty())],
            &env,
        ]
        .concat()
    }

    fn bytes() -> Vec<u8> {
        [
            &[1, 0, 24, 0, 80][..],
            &packed(b"me"),
            &packed(b""),
            &[0, 0, 0, 2],
            &packed(b"ls"),
            &packed(b"\xff"),
            &[0; 4],
        ]
        .concat()
    }

    #[test]
    fn a_start_holds_bytes_that_are_no_text() {
        let start = Start::parse(&bytes()).unwrap();
        assert_eq!((start.rows, start.cols, start.on_terminal), (24, 80, true));
        assert_eq!((start.user, start.env), ("me".into(), vec![]));
        assert_eq!(start.command, ["ls".into(), OsString::from_vec(vec![0xff])]);
        assert_eq!((start.session.as_str(), start.list), ("", false));
    }

    #[test]
    fn a_session_has_a_name_that_any_line_can_hold() {
        let named = |name: &[u8]| {
            let mut bytes = [&bytes()[..], &packed(name)].concat();
            bytes[0] |= NAMED;
            Start::parse(&bytes).map(|start| start.session)
        };
        assert_eq!(named(b"train-1.a_B"), Some("train-1.a_B".into()));
        for wrong in [&b""[..], b"a b", b"a\n", b"\xff", b"\xc3\xa4", &[b'a'; 65]] {
            assert_eq!(named(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn files_are_no_terminal_and_no_session() {
        let flagged = |flags: u8| {
            let mut bytes = for_files(b"", b".", &[]);
            bytes[0] = flags;
            Start::parse(&bytes).map(|start| start.files)
        };
        assert_eq!(flagged(FILES), Some(true));
        assert_eq!(flagged(BEYOND), Some(false));
        assert_eq!(flagged(0), Some(false));
        for other in [ON_TERMINAL, NAMED, LIST, BEYOND, 32] {
            assert_eq!(flagged(FILES | other), None, "{other}");
        }
    }

    #[test]
    fn a_start_for_files_has_nothing_to_hide_its_path_behind() {
        let fits = |bytes: &[u8]| Start::parse(bytes).is_some();
        let longest = LONGEST_FOR_FILES - for_files(b"", b"", &[]).len();
        assert!(fits(&for_files(b"", &vec![b'x'; longest], &[])));
        assert!(!fits(&for_files(b"", &vec![b'x'; longest + 1], &[])));
        assert!(!fits(&for_files(b"me", b".", &[])));
        assert!(!fits(&for_files(b"", b".", &[b"A=1"])));
    }

    #[test]
    fn a_start_that_is_cut_short_or_too_long_or_has_a_nul_is_none() {
        let whole = bytes();
        for end in 0..whole.len() {
            assert_eq!(Start::parse(&whole[..end]), None, "{end}");
        }
        assert_eq!(Start::parse(&[&whole[..], &[0]].concat()), None);
        let mut many = whole.clone();
        many[15..19].copy_from_slice(&[0xff; 4]);
        assert_eq!(Start::parse(&many), None);
        let nul = whole
            .iter()
            .map(|byte| if *byte == b'l' { 0 } else { *byte });
        assert_eq!(Start::parse(&nul.collect::<Vec<_>>()), None);
    }
}
