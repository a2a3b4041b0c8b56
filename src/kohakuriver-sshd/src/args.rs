//! The command line.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use lexopt::prelude::*;

use crate::algorithms::{ALL, Algorithms};

/// What `--help` prints.
pub const HELP: &str = "\
An SSH server for a task whose image has none. Everything runs as the user that starts it.

Usage: tunnel-sshd --listen ADDRESS:PORT --host-key FILE --authorized-keys FILE [OPTIONS]

Options:
  --listen ADDRESS:PORT   where to listen; port 0 is any free one
  --host-key FILE         its key, made (Ed25519) if the file is missing; can be given again for
                          one of another kind: ECDSA on P-256, for clients under FIPS 140
  --authorized-keys FILE  the public keys that are let in; read again at every login
  --algorithms all|newest which ones are offered: newest has ML-KEM and authenticated ciphers alone,
                          as OpenSSH 9.9 and newer have them [all]
  --shell PATH            the shell, instead of the first of $SHELL, the one in /etc/passwd,
                          /bin/bash, /bin/ash and /bin/sh
  --login NAME            a login name that is let in beside the user's own and root;
                          can be given more than once
  --max-sessions N        how many connections, and how many sessions, at most [64]
  --rekey-bytes N         new keys after so many bytes [1073741824]
  --version, --help

Once it listens, it prints one line of JSON: {\"event\":\"ready\",\"address\":…,\"host_key\":…}
";

const MOST: usize = 64;
/// RFC 4253 §9.
const REKEY_BYTES: u64 = 1 << 30;
/// Less would exchange keys all the time.
const LEAST_REKEY_BYTES: u64 = 64 * 1024;

/// What the process is to do.
#[derive(Debug)]
pub struct Options {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Hold the host keys, at least one.
    pub host_keys: Vec<PathBuf>,
    /// Holds the users' keys.
    pub authorized_keys: PathBuf,
    /// What is offered in an exchange of keys.
    pub algorithms: &'static Algorithms,
    /// The shell that was asked for.
    pub shell: Option<PathBuf>,
    /// More login names.
    pub logins: Vec<String>,
    /// Connections, and sessions, at most.
    pub most: usize,
    /// New keys after so many bytes.
    pub rekey_bytes: u64,
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Request {
    /// To work.
    Work(Options),
    /// To print this text.
    Print(String),
}

/// Reads arguments, of which the first is the program's name; an error is one sentence.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Request, String> {
    let mut parser = lexopt::Parser::from_iter(args);
    let (mut listen, mut authorized_keys, mut shell) = (None, None, None);
    let (mut host_keys, mut logins) = (Vec::new(), Vec::new());
    let (mut most, mut rekey_bytes) = (MOST, REKEY_BYTES);
    let mut algorithms = &ALL;
    while let Some(argument) = parser.next().map_err(text)? {
        match argument {
            Long("listen") => listen = Some(parsed(&mut parser, "an address and a port")?),
            Long("host-key") => host_keys.push(path(&mut parser)?),
            Long("authorized-keys") => authorized_keys = Some(path(&mut parser)?),
            Long("algorithms") => algorithms = parsed(&mut parser, "all or newest")?,
            Long("shell") => shell = Some(path(&mut parser)?),
            Long("login") => logins.push(parsed(&mut parser, "a login name")?),
            Long("max-sessions") => most = parsed(&mut parser, "a number")?,
            Long("rekey-bytes") => rekey_bytes = parsed(&mut parser, "a number of bytes")?,
            Short('h') | Long("help") => return Ok(Request::Print(HELP.into())),
            Short('V') | Long("version") => {
                return Ok(Request::Print(
                    concat!("tunnel-sshd ", env!("CARGO_PKG_VERSION"), "\n").into(),
                ));
            }
            other => return Err(text(other.unexpected())),
        }
    }
    let listen = listen.ok_or("--listen is missing")?;
    if host_keys.is_empty() {
        return Err("--host-key is missing".into());
    }
    Ok(Request::Work(Options {
        listen,
        host_keys,
        authorized_keys: authorized_keys.ok_or("--authorized-keys is missing")?,
        algorithms,
        shell,
        logins,
        most,
        rekey_bytes: rekey_bytes.max(LEAST_REKEY_BYTES),
    }))
}

fn path(parser: &mut lexopt::Parser) -> Result<PathBuf, String> {
    parser.value().map(PathBuf::from).map_err(text)
}

fn parsed<T: std::str::FromStr>(parser: &mut lexopt::Parser, what: &str) -> Result<T, String> {
    let word = parser
        .value()
        .and_then(|value| value.string())
        .map_err(text)?;
    word.parse().map_err(|_| format!("{word:?} is not {what}"))
}

fn text(error: lexopt::Error) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::NEWEST;

    const BASE: [&str; 7] = [
        "tunnel-sshd",
        "--listen",
        "127.0.0.1:0",
        "--host-key",
        "/k",
        "--authorized-keys",
        "/a",
    ];

    #[test]
    fn a_bad_command_line_is_told_in_one_sentence() {
        for words in [
            &["--listen", "somewhere"][..],
            &["--max-sessions", "-1"],
            &["--algorithms", "old"],
            &["--no-such"],
            &["word"],
        ] {
            let error = parse([&BASE, words].concat().iter().map(OsString::from)).unwrap_err();
            assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        }
        assert_eq!(
            parse(["tunnel-sshd".into()]).unwrap_err(),
            "--listen is missing"
        );
    }

    #[test]
    fn all_options_have_their_effect() {
        let more = [
            "--algorithms",
            "newest",
            "--shell",
            "/s",
            "--login",
            "a",
            "--login",
            "b",
            "--max-sessions",
            "3",
            "--rekey-bytes",
            "1",
        ];
        let Ok(Request::Work(options)) =
            parse([&BASE[..], &more].concat().iter().map(OsString::from))
        else {
            panic!("a good command line");
        };
        assert_eq!((options.shell, options.most), (Some("/s".into()), 3));
        assert_eq!(options.algorithms, &NEWEST);
        assert_eq!(
            (options.logins, options.rekey_bytes),
            (vec!["a".to_owned(), "b".to_owned()], LEAST_REKEY_BYTES)
        );
    }
}
