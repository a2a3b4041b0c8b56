//! Starts what a terminal runs.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::control::Control;
use super::start::Start;
use super::users::{self, User};
use crate::init::{NOT_EXECUTABLE, NOT_FOUND};
use crate::{children, sys};

const SHELLS: [&str; 3] = ["bash", "ash", "sh"];
const NO_SHELLS: [&str; 2] = ["nologin", "false"];
const LOCALES: [&str; 3] = ["LANG", "LC_ALL", "LC_CTYPE"];
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Our ends of what the command has as stdin, stdout and stderr.
pub enum Ends {
    /// The command's own end is kept open too, so that its output does not end before the command does.
    #[allow(missing_docs)]
    Terminal { ours: File, _theirs: OwnedFd },
    #[allow(missing_docs)]
    Pipes {
        input: Option<File>,
        output: Option<File>,
        errors: Option<File>,
    },
}

/// Why nothing runs.
pub enum Failure {
    /// The program can't be run: what a shell would say, and its exit code.
    Command(i32, String),
    /// `ECODE: a sentence`.
    Refused(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let code = match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => "EPERM",
            Some(libc::EMFILE | libc::ENFILE) => "EMFILE",
            Some(libc::EAGAIN | libc::ENOMEM) => "EAGAIN",
            _ => "ENOTSUP",
        };
        Self::Refused(format!("{code}: no terminal can be had: {error}"))
    }
}

/// Starts it; `control` is told when it has ended.
pub fn start(start: &Start, control: &Arc<Control>) -> Result<(libc::pid_t, Ends), Failure> {
    let user = match &start.user {
        called if called.is_empty() => None,
        called => {
            Some(users::find(called).map_err(|text| Failure::Refused(format!("EINVAL: {text}")))?)
        }
    };
    let program = match start.command.first() {
        Some(program) => program.clone(),
        None => shell(start)?.into(),
    };
    let mut command = Command::new(&program);
    command.args(start.command.iter().skip(1));
    surround(&mut command, start, user.as_ref())?;
    let ends = connect(&mut command, start, user.as_ref())?;
    become_it(&mut command, start.on_terminal, user);
    let spawned = children::start(|| command.spawn().map(|child| child.id()), control.clone());
    match spawned {
        Ok(pid) => Ok((pid, ends)),
        Err(error) => Err(not_run(&program, &error)),
    }
}

/// Its folder and its environment.
fn surround(command: &mut Command, start: &Start, user: Option<&User>) -> Result<(), Failure> {
    if !start.workdir.is_empty() {
        // With the dot it is looked up inside: one that may not be entered is as good as none.
        if !Path::new(&start.workdir).join(".").is_dir() {
            let named = start.workdir.to_string_lossy();
            return Err(Failure::Refused(format!(
                "ENOENT: there is no directory {named:?}"
            )));
        }
        command.current_dir(&start.workdir);
    }
    if let Some(user) = user {
        command.env("HOME", &user.home);
    }
    if start.on_terminal {
        command.env("TERM", "xterm-256color");
        if !LOCALES.iter().any(|name| env::var_os(name).is_some()) {
            command.env("LANG", "C.UTF-8");
        }
    }
    for (name, value) in start.env.iter().filter_map(split) {
        command.env(name, value);
    }
    Ok(())
}

fn split(variable: &OsString) -> Option<(&OsStr, &OsStr)> {
    let bytes = variable.as_bytes();
    let at = bytes
        .iter()
        .position(|byte| *byte == b'=')
        .filter(|at| *at > 0)?;
    Some((
        OsStr::from_bytes(&bytes[..at]),
        OsStr::from_bytes(&bytes[at + 1..]),
    ))
}

/// A terminal, or three pipes.
fn connect(command: &mut Command, start: &Start, user: Option<&User>) -> io::Result<Ends> {
    if !start.on_terminal {
        return pipes(command);
    }
    let (ours, theirs) = sys::open_terminal()?;
    sys::set_size(&ours, start.rows, start.cols)?;
    if let Some(user) = user {
        // Else its programs could not open `/dev/tty` anew; where it may not be given away that is theirs to find out.
        let _ = std::os::unix::fs::fchown(&theirs, Some(user.uid), None);
    }
    command
        .stdin(theirs.try_clone()?)
        .stdout(theirs.try_clone()?)
        .stderr(theirs.try_clone()?);
    sys::dont_wait(&ours)?;
    Ok(Ends::Terminal {
        ours: ours.into(),
        _theirs: theirs,
    })
}

fn pipes(command: &mut Command) -> io::Result<Ends> {
    let (stdin, input) = io::pipe()?;
    let (output, stdout) = io::pipe()?;
    let (errors, stderr) = io::pipe()?;
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    let ours = |end: OwnedFd| -> io::Result<Option<File>> {
        sys::dont_wait(&end)?;
        Ok(Some(end.into()))
    };
    Ok(Ends::Pipes {
        input: ours(input.into())?,
        output: ours(output.into())?,
        errors: ours(errors.into())?,
    })
}

/// What the new process does before it becomes the command.
fn become_it(command: &mut Command, on_terminal: bool, user: Option<User>) {
    let files = sys::file_limit_before();
    // SAFETY: only calls system calls, which are safe between fork and exec.
    unsafe {
        command.pre_exec(move || {
            sys::lead_a_session(on_terminal)?;
            if let Some(files) = &files {
                sys::set_file_limit(files)?;
            }
            if let Some(user) = &user {
                sys::become_user(user.uid, user.gid, &user.groups)?;
            }
            for signal in [
                libc::SIGHUP,
                libc::SIGINT,
                libc::SIGQUIT,
                libc::SIGTERM,
                libc::SIGXFSZ,
            ] {
                sys::stop_ignoring(signal);
            }
            sys::unblock_signals()
        });
    }
}

fn not_run(program: &OsStr, error: &io::Error) -> Failure {
    let named = program.to_string_lossy();
    match error.raw_os_error() {
        Some(libc::ENOENT) => Failure::Command(NOT_FOUND, format!("{named}: command not found")),
        Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EPERM) => {
            Failure::Refused(format!("EAGAIN: {named} can't be started: {error}"))
        }
        _ => {
            let said = error.to_string();
            let said = said.split(" (os error").next().unwrap_or_default();
            Failure::Command(NOT_EXECUTABLE, format!("{named}: {said}"))
        }
    }
}

/// The best shell that there is.
fn shell(start: &Start) -> Result<PathBuf, Failure> {
    let given = |name: &str| {
        let variables = start.env.iter().filter_map(split);
        let given = variables.rev().find(|(key, _)| *key == name);
        given
            .map(|(_, value)| value.to_owned())
            .or_else(|| env::var_os(name))
    };
    let own = given("SHELL")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let path = given("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let named = SHELLS
        .iter()
        .flat_map(|name| env::split_paths(&path).map(move |folder| folder.join(name)));
    let mut all = own.into_iter().chain(named);
    all.find(|path| is_shell(path)).ok_or_else(|| {
        Failure::Refused("ENOENT: there is no shell in the task; name a program that it has".into())
    })
}

fn is_shell(path: &Path) -> bool {
    let runs = |path: &Path| {
        path.metadata()
            .is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    };
    let none = path
        .file_name()
        .is_some_and(|name| NO_SHELLS.iter().any(|no| name == *no));
    !none && runs(path)
}
