//! What runs for a session: a shell or a command, in a terminal or on pipes.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::sys::{self, Size, Terminal};
use crate::wire::Reader;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SHELLS: [&str; 3] = ["/bin/bash", "/bin/ash", "/bin/sh"];
const NO_SHELLS: [&str; 3] = ["nologin", "false", "sync"];

/// The user that everything runs as: whoever started this server.
#[derive(Debug, Clone)]
pub struct User {
    /// The login name.
    pub name: String,
    /// Where sessions begin; `/` where the user's home is missing.
    pub home: PathBuf,
    /// The shell; None where there is none.
    pub shell: Option<PathBuf>,
}

impl User {
    /// The user of this process. `/etc/passwd` may be missing; `shell` comes before what is found.
    pub fn of_this_process(shell: Option<PathBuf>) -> Self {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let entry = passwd_entry(&passwd, sys::user_id());
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let name = entry.map(|entry| entry.name.to_owned());
        let name = name.or_else(|| variable("USER")?.into_string().ok());
        let home = entry.map(|entry| PathBuf::from(entry.home));
        let home = home.or_else(|| variable("HOME").map(PathBuf::from));
        let login = entry
            .map(|entry| PathBuf::from(entry.shell))
            .filter(|shell| is_login_shell(shell));
        let asked = variable("SHELL").map(PathBuf::from);
        let found = [shell, asked, login]
            .into_iter()
            .flatten()
            .chain(SHELLS.map(PathBuf::from));
        Self {
            name: name.unwrap_or_else(|| if sys::user_id() == 0 { "root" } else { "user" }.into()),
            home: home
                .filter(|home| home.is_absolute() && home.is_dir())
                .unwrap_or_else(|| "/".into()),
            shell: found.into_iter().find(|shell| is_executable(shell)),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    name: &'a str,
    home: &'a str,
    shell: &'a str,
}

fn passwd_entry(passwd: &str, id: u32) -> Option<Entry<'_>> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields[..] {
            [name, _, uid, _, _, home, shell] if uid.parse() == Ok(id) => {
                Some(Entry { name, home, shell })
            }
            _ => None,
        }
    })
}

fn is_login_shell(shell: &Path) -> bool {
    !NO_SHELLS
        .iter()
        .any(|name| shell.file_name() == Some(OsStr::new(name)))
}

fn is_executable(path: &Path) -> bool {
    path.is_absolute()
        && fs::metadata(path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// A terminal that was asked for.
pub struct Asked {
    /// Both ends of it.
    pub terminal: Terminal,
    /// The value for TERM.
    pub kind: String,
}

impl Asked {
    /// Opens a terminal of that size with the client's settings (RFC 4254 §8).
    pub fn open(kind: &str, size: Size, modes: &[u8]) -> io::Result<Self> {
        let terminal = sys::open_terminal()?;
        sys::resize(terminal.master.as_raw_fd(), size);
        sys::change_settings(terminal.slave.as_raw_fd(), |settings| {
            apply_modes(settings, modes)
        })?;
        Ok(Self {
            terminal,
            kind: kind.into(),
        })
    }
}

/// Control characters by opcode, from 1 on (RFC 4254 §8); those that Linux lacks are None.
const CHARACTERS: [Option<usize>; 18] = [
    Some(libc::VINTR),
    Some(libc::VQUIT),
    Some(libc::VERASE),
    Some(libc::VKILL),
    Some(libc::VEOF),
    Some(libc::VEOL),
    Some(libc::VEOL2),
    Some(libc::VSTART),
    Some(libc::VSTOP),
    Some(libc::VSUSP),
    None,
    Some(libc::VREPRINT),
    Some(libc::VWERASE),
    Some(libc::VLNEXT),
    None,
    Some(libc::VSWTC),
    None,
    Some(libc::VDISCARD),
];
const INPUT_FLAGS: [libc::tcflag_t; 13] = [
    libc::IGNPAR,
    libc::PARMRK,
    libc::INPCK,
    libc::ISTRIP,
    libc::INLCR,
    libc::IGNCR,
    libc::ICRNL,
    libc::IUCLC,
    libc::IXON,
    libc::IXANY,
    libc::IXOFF,
    libc::IMAXBEL,
    libc::IUTF8,
];
const LOCAL_FLAGS: [libc::tcflag_t; 13] = [
    libc::ISIG,
    libc::ICANON,
    libc::XCASE,
    libc::ECHO,
    libc::ECHOE,
    libc::ECHOK,
    libc::ECHONL,
    libc::NOFLSH,
    libc::TOSTOP,
    libc::IEXTEN,
    libc::ECHOCTL,
    libc::ECHOKE,
    0, // PENDIN says what is pending, and isn't a wish.
];
const OUTPUT_FLAGS: [libc::tcflag_t; 6] = [
    libc::OPOST,
    libc::OLCUC,
    libc::ONLCR,
    libc::OCRNL,
    libc::ONOCR,
    libc::ONLRET,
];

fn apply_modes(settings: &mut libc::termios, modes: &[u8]) {
    let mut reader = Reader::new(modes);
    // 160 and up have other arguments and end what is understood.
    while let Ok(opcode @ 1..160) = reader.u8() {
        let Ok(value) = reader.u32() else { return };
        let set = |flags: &mut libc::tcflag_t, table: &[libc::tcflag_t], first: u8| {
            if let Some(flag) = table.get(usize::from(opcode - first)) {
                *flags = if value == 0 {
                    *flags & !flag
                } else {
                    *flags | flag
                };
            }
        };
        match opcode {
            1..=18 => {
                if let Some(place) = CHARACTERS[usize::from(opcode - 1)] {
                    // 255 means none, which is 0 here.
                    settings.c_cc[place] = if value == 255 { 0 } else { value as u8 };
                }
            }
            30..=42 => set(&mut settings.c_iflag, &INPUT_FLAGS, 30),
            50..=62 => set(&mut settings.c_lflag, &LOCAL_FLAGS, 50),
            70..=75 => set(&mut settings.c_oflag, &OUTPUT_FLAGS, 70),
            _ => {}
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
    let mut command = command(order)?;
    describe(order, &mut command);
    let files = order.files;
    let in_terminal = order.asked.is_some();
    let (mut stdin, mut outputs) = (None, Vec::new());
    let failed = |error: io::Error| format!("can't start the program: {error}");
    if let Some(asked) = order.asked {
        let slave = || {
            asked
                .terminal
                .slave
                .try_clone()
                .map(Stdio::from)
                .map_err(failed)
        };
        command.stdin(slave()?).stdout(slave()?).stderr(slave()?);
    } else {
        let (reader, writer) = io::pipe().map_err(failed)?;
        stdin = Some(OwnedFd::from(writer));
        command.stdin(OwnedFd::from(reader));
        for stream in [Command::stdout::<Stdio>, Command::stderr::<Stdio>] {
            let (reader, writer) = io::pipe().map_err(failed)?;
            outputs.push(OwnedFd::from(reader));
            stream(&mut command, Stdio::from(OwnedFd::from(writer)));
        }
    }
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
    for fd in stdin.iter().chain(&outputs) {
        sys::set_nonblocking(fd.as_raw_fd()).map_err(failed)?;
    }
    Ok(Started {
        child,
        stdin,
        outputs,
    })
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

/// The words of a command line as a shell would split them: quotes and backslashes, nothing else.
fn words(line: &[u8]) -> Vec<OsString> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut quote = None;
    let mut bytes = line.iter().copied();
    while let Some(byte) = bytes.next() {
        match (quote, byte) {
            (Some(open), _) if byte == open => quote = None,
            (None, b'\'' | b'"') => {
                quote = Some(byte);
                word.get_or_insert_default();
            }
            (None | Some(b'"'), b'\\') => word.get_or_insert_default().extend(bytes.next()),
            (None, b' ' | b'\t' | b'\n') => words.extend(word.take()),
            _ => word.get_or_insert_default().push(byte),
        }
    }
    words.extend(word);
    words.into_iter().map(OsString::from_vec).collect()
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

/// A directory with a socket that leads to the client's agent; both are removed when it is dropped.
pub struct AgentSocket {
    directory: PathBuf,
    listener: UnixListener,
}

impl AgentSocket {
    /// Makes the socket in a new directory that only this user may enter.
    pub fn new(home: &Path) -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        let name = format!(
            "ssh-agent-{:016x}",
            u64::from_be_bytes(crate::crypto::random())
        );
        // An image may have no /tmp, or one that can't be written.
        for parent in [
            &std::env::temp_dir(),
            Path::new("/run"),
            Path::new("/dev/shm"),
            home,
        ] {
            let directory = parent.join(&name);
            match fs::DirBuilder::new().mode(0o700).create(&directory) {
                Ok(()) => {
                    let listener = UnixListener::bind(directory.join("agent"));
                    let listener = listener.inspect_err(|_| drop(fs::remove_dir(&directory)))?;
                    listener.set_nonblocking(true)?;
                    return Ok(Self {
                        directory,
                        listener,
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The next program that wants the agent.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream.into())
    }

    /// What to wait for.
    pub fn fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// The value for SSH_AUTH_SOCK.
    pub fn path(&self) -> PathBuf {
        self.directory.join("agent")
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path());
        let _ = fs::remove_dir(&self.directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_without_a_shell_is_split_at_spaces_outside_of_quotes() {
        let line = br#" /bin/echo  'a b' "c\"d"e \ f '' "#;
        assert_eq!(words(line), ["/bin/echo", "a b", "c\"de", " f", ""]);
    }

    proptest::proptest! {
        #[test]
        fn modes_and_command_lines_of_any_content_are_survived(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        ) {
            // SAFETY: termios is plain numbers, for which zeros are values.
            let mut settings = unsafe { std::mem::zeroed::<libc::termios>() };
            apply_modes(&mut settings, &bytes);
            let length: usize = words(&bytes).iter().map(|word| word.len()).sum();
            proptest::prop_assert!(length <= bytes.len());
        }
    }

    #[test]
    fn the_passwd_entry_of_a_user_is_found_by_its_id() {
        let passwd =
            "root:x:0:0::/root:/bin/ash\nbroken\nme:x:1000:1000:,,,:/home/me:/sbin/nologin\n";
        assert_eq!(passwd_entry(passwd, 1000).unwrap().home, "/home/me");
        assert_eq!(passwd_entry(passwd, 0).unwrap().shell, "/bin/ash");
        assert!(passwd_entry(passwd, 7).is_none());
        assert!(!is_login_shell(Path::new("/sbin/nologin")));
    }

    #[test]
    fn a_client_may_set_its_language_and_nothing_that_loads_code() {
        assert!(is_allowed_variable("LC_ALL") && is_allowed_variable("LANG"));
        for name in ["LD_PRELOAD", "PATH", "LC_A=B", "LC_\n", ""] {
            assert!(!is_allowed_variable(name), "{name:?}");
        }
    }
}
