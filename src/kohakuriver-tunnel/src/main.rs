//! `tunnel-client`: see `--help`.

use std::env;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use kohakuriver_tunnel::args::{self, Options, Request};
use kohakuriver_tunnel::event_loop::EventLoop;
use kohakuriver_tunnel::token::Token;
use kohakuriver_tunnel::tunnel::{self, Outcome};
use kohakuriver_tunnel::{init, log, sys};

const USAGE: u8 = 2;
/// How long an orderly goodbye to the runner may take.
const GOODBYE: Duration = Duration::from_millis(500);
const AFTER_PANIC: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    match args::parse(env::args_os(), variable) {
        Ok(Request::Print(text)) => {
            let printed = io::stdout().write_all(text.as_bytes());
            if printed.is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Ok(Request::Work(options)) => work(*options).unwrap_or_else(|error| {
            log!(Error, "can't start: {error}");
            ExitCode::FAILURE
        }),
        Err(sentence) => {
            log!(Error, "{sentence}");
            ExitCode::from(USAGE)
        }
    }
}

/// The tunnel on a thread of its own, so that nothing that happens to it ends the command.
fn work(options: Options) -> io::Result<ExitCode> {
    log::set_level(options.log_level);
    let ignored = init::take_signals();
    let signals = init::block_signals()?;
    let files = sys::raise_file_limit()?;
    init::adopt_orphans()?;
    let token = Arc::new(Token::new(options.token.clone()));
    token.take();
    let command = match options.run.as_deref() {
        None | Some([]) => None,
        Some(command) => match init::start(command, options.open_stdin, files, &ignored) {
            Ok(pid) => Some(pid),
            Err((code, sentence)) => {
                log!(Error, "{sentence}");
                return Ok(ExitCode::from(code as u8));
            }
        },
    };
    let (events, stop) = EventLoop::new()?;
    let (ended, end) = mpsc::channel::<()>();
    thread::Builder::new()
        .name("tunnel".into())
        .spawn(move || {
            let _ended = ended;
            carry(&options, &token, events);
        })?;
    let code = init::supervise(&signals, command);
    stop.now();
    let _ = end.recv_timeout(GOODBYE);
    Ok(ExitCode::from(code as u8))
}

/// Keeps the tunnel up, also past a mistake of our own: the command beside it knows nothing of it.
fn carry(options: &Options, token: &Arc<Token>, events: EventLoop) {
    let outcome = loop {
        match catch_unwind(AssertUnwindSafe(|| tunnel::run(options, token, &events))) {
            Ok(outcome) => break outcome,
            Err(_) => log!(Error, "the tunnel failed, and starts again"),
        }
        thread::sleep(AFTER_PANIC);
    };
    match outcome {
        Outcome::Stopped => {}
        Outcome::Replaced => log!(Info, "another tunnel client took over this container"),
        Outcome::GaveUp => log!(Error, "no tunnel to the runner, and no attempts are left"),
    }
    if options.run.is_none() && outcome != Outcome::Stopped {
        std::process::exit(i32::from(outcome == Outcome::GaveUp));
    }
}
