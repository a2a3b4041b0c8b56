//! What runs for a session: a shell or a command, in a terminal or on pipes.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use crate::sys;
use crate::terminal::Asked;
use crate::user::User;
use crate::words::{Letter, plain, split};

/// Where programs are looked for where the server was told nothing else.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is known of a session before and after its program was started.
#[derive(Default)]
pub struct Session {
    /// The terminal that was asked for.
    pub asked: Option<Asked>,
    /// Variables that were set.
    pub variables: BTreeMap<String, OsString>,
    /// Was a program started? Only one may be.
    pub started: bool,
    /// The leader of the program's group, while it runs.
    pub leader: Option<u32>,
    /// The end of a terminal that is resized.
    pub master: Option<Arc<OwnedFd>>,
    /// Counted against the limit of sessions, until this goes.
    _place: Option<Arc<()>>,
    /// Has the program ended?
    pub ended: bool,
}

impl Session {
    /// One that nothing was asked for yet.
    pub fn holding(place: Arc<()>) -> Self {
        Self {
            _place: Some(place),
            ..Self::default()
        }
    }
}

/// May the client set this variable?
pub fn is_allowed_variable(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    matches!(name, "LANG" | "LANGUAGE" | "TERM" | "COLORTERM")
        || name.starts_with("LC_") && name.bytes().all(is_plain)
}

/// What to start.
pub struct Order<'a> {
    /// The user's facts.
    pub user: &'a User,
    /// The command line; None for a shell.
    pub command: Option<&'a [u8]>,
    /// Variables beside those of this server.
    pub variables: &'a BTreeMap<String, OsString>,
    /// The terminal to run in.
    pub asked: Option<&'a Asked>,
    /// How many files the program may open.
    pub files: libc::rlimit,
}

/// A program that runs.
pub struct Started {
    /// The leader of its process group.
    pub child: Child,
    /// Where input goes; None with a terminal.
    pub stdin: Option<OwnedFd>,
    /// Where output and errors come from, apart; none with a terminal.
    pub outputs: Vec<OwnedFd>,
}

/// Starts it. The error is a sentence for the user.
pub fn start(order: &Order<'_>) -> Result<Started, String> {
    let failed = |error: io::Error| format!("can't start the program: {error}");
    let mut command = command(order)?;
    describe(order, &mut command);
    let (stdin, outputs) = connect(order.asked, &mut command).map_err(failed)?;
    let (files, in_terminal) = (order.files, order.asked.is_some());
    // SAFETY: the closure only makes system calls that are safe in a child that has not started its program yet.
    unsafe {
        command.pre_exec(move || {
            sys::reset_signals();
            sys::lead_session(in_terminal)?;
            sys::set_file_limit(files)
        });
    }
    let name = PathBuf::from(command.get_program());
    let child = command
        .spawn()
        .map_err(|error| format!("can't start {}: {error}", name.display()))?;
    Ok(Started {
        child,
        stdin,
        outputs,
    })
}

/// Gives a program its terminal, or pipes of which this is our side: where input goes, and where output and errors come from.
fn connect(
    asked: Option<&Asked>,
    command: &mut Command,
) -> io::Result<(Option<OwnedFd>, Vec<OwnedFd>)> {
    if let Some(asked) = asked {
        let slave = || asked.terminal.slave.try_clone().map(Stdio::from);
        command.stdin(slave()?).stdout(slave()?).stderr(slave()?);
        return Ok((None, Vec::new()));
    }
    let (reader, writer) = io::pipe()?;
    let stdin = OwnedFd::from(writer);
    sys::set_nonblocking(stdin.as_raw_fd())?;
    command.stdin(OwnedFd::from(reader));
    let mut outputs = Vec::new();
    for stream in [Command::stdout::<Stdio>, Command::stderr::<Stdio>] {
        let (reader, writer) = io::pipe()?;
        let output = OwnedFd::from(reader);
        sys::set_nonblocking(output.as_raw_fd())?;
        outputs.push(output);
        stream(command, Stdio::from(OwnedFd::from(writer)));
    }
    Ok((Some(stdin), outputs))
}

fn command(order: &Order<'_>) -> Result<Command, String> {
    match (&order.user.shell, order.command) {
        (Some(shell), None) => {
            let mut command = Command::new(shell);
            let mut name = OsString::from("-");
            name.push(shell.file_name().unwrap_or(shell.as_os_str()));
            command.arg0(name);
            Ok(command)
        }
        (Some(shell), Some(line)) => {
            let mut command = Command::new(shell);
            command.arg("-c").arg(OsStr::from_bytes(line));
            Ok(command)
        }
        (None, None) => Err(
            "this task has no shell ($SHELL, /bin/bash, /bin/ash and /bin/sh are missing); \
             commands with the full path of a program still work"
                .into(),
        ),
        (None, Some(line)) => {
            let words = words(line);
            match words.first() {
                Some(program) if program.as_bytes().starts_with(b"/") => {
                    let mut command = Command::new(program);
                    command.args(&words[1..]);
                    Ok(command)
                }
                _ => Err("this task has no shell, so a command has to begin with the full path of a program".into()),
            }
        }
    }
}

/// Where a program runs and what it finds in its environment.
fn describe(order: &Order<'_>, command: &mut Command) {
    let user = order.user;
    command.current_dir(&user.home);
    if std::env::var_os("PATH").is_none() {
        command.env("PATH", DEFAULT_PATH);
    }
    command
        .env("HOME", &user.home)
        .env("USER", &user.name)
        .env("LOGNAME", &user.name);
    if let Some(shell) = &user.shell {
        command.env("SHELL", shell);
    }
    command.envs(order.variables);
    if let Some(asked) = order.asked {
        command
            .env("SSH_TTY", &asked.terminal.name)
            .env("TERM", &asked.kind);
    }
}

/// The words of a command line, where there is no shell: what only a shell can do has no meaning then.
fn words(line: &[u8]) -> Vec<OsString> {
    let found = split(line, |_, _| false).unwrap_or_default();
    let word = |word: &Vec<Letter>| OsString::from_vec(plain(word));
    found.words.iter().map(word).collect()
}

/// How a program ended, for the client.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this code.
    Exit(u32),
    /// By a signal: its name (RFC 4254 §6.10), and whether there is a core file.
    Signal(String, bool),
}

const SIGNALS: [(&str, i32); 16] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("TERM", libc::SIGTERM),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("TSTP", libc::SIGTSTP),
    ("CONT", libc::SIGCONT),
    ("WINCH", libc::SIGWINCH),
];

impl From<ExitStatus> for End {
    fn from(status: ExitStatus) -> Self {
        match status.signal() {
            None => Self::Exit(status.code().unwrap_or(0) as u32),
            Some(signal) => {
                let name = SIGNALS.iter().find(|(_, number)| *number == signal);
                let name = name.map_or_else(
                    || format!("SIG{signal}@kohakuriver"),
                    |(name, _)| (*name).to_owned(),
                );
                Self::Signal(name, status.core_dumped())
            }
        }
    }
}

/// The number of a signal that a client may send.
pub fn signal_number(name: &str) -> Option<i32> {
    SIGNALS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_without_a_shell_is_split_at_spaces_outside_of_quotes() {
        let line = br#" /bin/echo  'a b' "c\"d"e \ f '' "a\n" x|y "#;
        let split = ["/bin/echo", "a b", "c\"de", " f", "", "a\\n", "x|y"];
        assert_eq!(words(line), split);
    }

    proptest::proptest! {
        #[test]
        fn command_lines_of_any_content_are_survived(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        ) {
            let length: usize = words(&bytes).iter().map(|word| word.len()).sum();
            proptest::prop_assert!(length <= bytes.len());
        }
    }

    #[test]
    fn a_client_may_set_its_language_and_nothing_that_loads_code() {
        assert!(is_allowed_variable("LC_ALL") && is_allowed_variable("LANG"));
        for name in ["LD_PRELOAD", "PATH", "LC_A=B", "LC_\n", ""] {
            assert!(!is_allowed_variable(name), "{name:?}");
        }
    }
}
