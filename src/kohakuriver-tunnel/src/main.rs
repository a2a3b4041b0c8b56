//! `tunnel-client`: see `--help`.

use std::env;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kohakuriver_tunnel::agent::Agent;
use kohakuriver_tunnel::args::{self, Options, Request};
use kohakuriver_tunnel::event_loop::{EventLoop, Stop};
use kohakuriver_tunnel::handshake::Said;
use kohakuriver_tunnel::token::Token;
use kohakuriver_tunnel::tunnel::{self, Outcome};
use kohakuriver_tunnel::{init, log, sys};

const USAGE: u8 = 2;
const UNAVAILABLE: u8 = 4;
const NOT_ALLOWED: u8 = 5;
/// How long an orderly goodbye to the runner may take.
const GOODBYE: Duration = Duration::from_millis(500);
/// How long a host that is away is waited for, to be told how an agent's command has ended.
const LAST_WORD: Duration = Duration::from_secs(10);
/// How often it is looked whether a signal ends what waits for a host's answer.
const MOMENT: Duration = Duration::from_millis(50);
const AFTER_PANIC: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let asked = args::parse(env::args_os(), variable);
    match asked {
        Ok(Request::Print(text)) => {
            let printed = io::stdout().write_all(text.as_bytes());
            if printed.is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Ok(Request::Work(options)) => {
            let read = if options.agent.is_some() {
                args::TOKEN
            } else {
                args::AUTHORITIES
            };
            // SAFETY: there is no other thread yet.
            unsafe { sys::forget_variable(read) };
            work(Arc::new(*options)).unwrap_or_else(|error| {
                log!(Error, "can't start: {error}");
                ExitCode::FAILURE
            })
        }
        Err(sentence) => {
            log!(Error, "{sentence}");
            ExitCode::from(USAGE)
        }
    }
}

/// A file without a name is run by its descriptor, as jobs of Slurm do: what is started here has no use for that, and
/// people look for the program's own name.
fn let_go_of_program() {
    let program = env::args().next().unwrap_or_default();
    if let Some(number) = program.strip_prefix("/proc/self/fd/") {
        drop(number.parse().map(sys::inherited));
        sys::set_name(c"tunnel-client");
    }
}

/// The tunnel on a thread of its own, so that nothing that happens to it ends the command.
fn work(options: Arc<Options>) -> io::Result<ExitCode> {
    log::set_level(options.log_level);
    let_go_of_program();
    let token = Arc::new(Token::new(options.token.clone()));
    if let Some(descriptor) = options.token_fd {
        token.read_first(descriptor).map_err(io::Error::other)?;
    }
    let ignored = init::take_signals();
    let signals = init::block_signals()?;
    let files = sys::raise_file_limit()?;
    init::adopt_orphans()?;
    token.take();
    let start = || match options.run.as_deref() {
        None | Some([]) => Ok(None),
        Some(command) => init::start(command, options.open_stdin, files, &ignored).map(Some),
    };
    // An agent's command is started when it is known whether the host takes it in.
    let at_once = match options.agent {
        Some(_) => None,
        None => match start() {
            Ok(command) => command,
            Err(failure) => return Ok(not_started(failure)),
        },
    };
    let (events, stop) = EventLoop::new()?;
    let (ended, end) = mpsc::channel::<()>();
    let (tried, trial) = mpsc::channel::<()>();
    let carried = Arc::clone(&options);
    thread::Builder::new()
        .name("tunnel".into())
        .spawn(move || {
            let _ended = ended;
            carry(&carried, &token, events, tried);
        })?;
    let command = match &options.agent {
        None => at_once,
        Some(agent) => match begun(agent, &trial, start) {
            Ok(command) => command,
            Err(code) => {
                goodbye(&options, &stop, &end, Some(code));
                return Ok(ExitCode::from(code as u8));
            }
        },
    };
    drop(trial);
    let code = init::supervise(&signals, command);
    goodbye(&options, &stop, &end, options.agent.as_ref().map(|_| code));
    Ok(ExitCode::from(code as u8))
}

/// The command of an agent, started once it is known whether a host takes it in, and not where a signal ends it before.
/// An error is the exit code.
fn begun(
    agent: &Agent,
    trial: &mpsc::Receiver<()>,
    start: impl FnOnce() -> Result<Option<libc::pid_t>, (i32, String)>,
) -> Result<Option<libc::pid_t>, i32> {
    while trial.recv_timeout(MOMENT) == Err(RecvTimeoutError::Timeout) {
        if let Some(signal) = init::told_to_end() {
            return Err(128 + signal);
        }
    }
    if let Some(said) = agent.refusal() {
        log!(Error, "{}", said.sentence);
        return Err(refused(&said).into());
    }
    let command = start().map_err(|(code, sentence)| {
        log!(Error, "{sentence}");
        code
    })?;
    let this = process::id() as libc::pid_t;
    agent.ender.is_for(command.unwrap_or(this));
    Ok(command)
}

fn not_started((code, sentence): (i32, String)) -> ExitCode {
    log!(Error, "{sentence}");
    ExitCode::from(code as u8)
}

/// Lets the tunnel end in good order; a host is told how an agent's command has ended.
fn goodbye(options: &Options, stop: &Stop, end: &mpsc::Receiver<()>, exited: Option<i32>) {
    if let Some(agent) = options.agent.as_ref().filter(|_| exited.is_some()) {
        agent.wait_linked(LAST_WORD);
    }
    stop.now(exited);
    let _ = end.recv_timeout(GOODBYE);
    let agents = options.agent.as_ref().map(|agent| &agent.outwards);
    if let Some(outwards) = agents.or(options.over_tls.as_ref()) {
        outwards.finish(GOODBYE);
    }
}

/// The exit code for what a host said: those of the command line (docs/cli.md).
fn refused(said: &Said) -> u8 {
    match said.status {
        400 => USAGE,
        401 | 403 => NOT_ALLOWED,
        _ => UNAVAILABLE,
    }
}

/// Keeps the tunnel up, also past a mistake of our own: the command beside it knows nothing of it.
fn carry(options: &Options, token: &Arc<Token>, events: EventLoop, tried: mpsc::Sender<()>) {
    let said = tried.clone();
    let outcome = loop {
        let run = || {
            tunnel::run(options, token, &events, || {
                let _ = said.send(());
            })
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(outcome) => break outcome,
            Err(_) => log!(Error, "the tunnel failed, and starts again"),
        }
        thread::sleep(AFTER_PANIC);
    };
    match outcome {
        Outcome::Stopped | Outcome::Refused => {}
        Outcome::Replaced => log!(Info, "another tunnel client took over this container"),
        Outcome::GaveUp => log!(Error, "no tunnel to the runner, and no attempts are left"),
        Outcome::Over => log!(Info, "this task was stopped, and ends"),
    }
    let _ = tried.send(());
    match &options.agent {
        Some(agent) if outcome == Outcome::Over => agent.ender.end(),
        Some(agent) if outcome == Outcome::Replaced && options.run.as_deref() == Some(&[]) => {
            agent.ender.end()
        }
        None if options.run.is_none() && outcome != Outcome::Stopped => {
            std::process::exit(i32::from(outcome == Outcome::GaveUp));
        }
        _ => {}
    }
}
