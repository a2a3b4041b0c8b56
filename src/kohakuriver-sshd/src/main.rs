//! `tunnel-sshd`: see `--help`.

use std::env;
use std::io::{self, Write};
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;

use kohakuriver_sshd::args::{self, Options, Request};
use kohakuriver_sshd::keys::{HostKeys, cannot_read};
use kohakuriver_sshd::server::serve;
use kohakuriver_sshd::shared::Shared;
use kohakuriver_sshd::user::User;
use kohakuriver_sshd::{log, sys};

const USAGE: u8 = 2;

fn main() -> ExitCode {
    match args::parse(env::args_os()) {
        Ok(Request::Print(text)) => {
            let printed = io::stdout().write_all(text.as_bytes());
            match printed.and_then(|()| io::stdout().flush()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    log!("can't print: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Ok(Request::Work(options)) => {
            let Err(error) = work(options);
            log!("can't start: {error}");
            ExitCode::FAILURE
        }
        Err(sentence) => {
            log!("{sentence}");
            ExitCode::from(USAGE)
        }
    }
}

fn work(options: Options) -> io::Result<std::convert::Infallible> {
    sys::keep_ends_of_children();
    let host_keys = HostKeys::load_or_make(&options.host_keys)?;
    // It is read at every login; that nobody could get in is better told now.
    sys::read_file(&options.authorized_keys)
        .map_err(|error| cannot_read(&options.authorized_keys, &error))?;
    let listener = TcpListener::bind(options.listen).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("can't listen on {}: {error}", options.listen),
        )
    })?;
    let shared = Arc::new(Shared {
        files: sys::raise_file_limit()?,
        user: User::of_this_process(options.shell),
        algorithms: options.algorithms,
        authorized_keys: options.authorized_keys,
        logins: options.logins,
        rekey_bytes: options.rekey_bytes,
        most: options.most,
        connections: Default::default(),
        strangers: Default::default(),
        sessions: Default::default(),
        host_keys: Arc::new(host_keys),
    });
    let (address, key) = (
        listener.local_addr()?,
        shared.host_keys.first().public_line(),
    );
    log::detach()?;
    // Neither needs escaping in JSON. Who started this server may not listen, which is no reason to fail.
    let _ = writeln!(
        io::stdout(),
        r#"{{"event":"ready","address":"{address}","host_key":"{key}"}}"#
    );
    serve(&listener, &shared)
}
