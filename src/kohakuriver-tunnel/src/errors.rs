//! The texts of ERROR: a symbolic code, then a sentence for a person (docs/protocol.md §3).

use std::{error, fmt, io};

/// An error whose text is made already.
#[derive(Debug)]
pub struct Told(pub String);

impl fmt::Display for Told {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl error::Error for Told {}

/// The text of an error that has one.
pub fn told_of(error: &io::Error) -> Option<&Told> {
    error.get_ref()?.downcast_ref()
}

/// What an ERROR says of a stream to `port` that failed with `error`.
pub fn text(error: &io::Error, port: u16) -> String {
    if let Some(Told(text)) = told_of(error) {
        return text.clone();
    }
    let (code, sentence) = match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => (
            "ECONNREFUSED",
            format!("nothing listens on port {port} in the task"),
        ),
        Some(libc::ETIMEDOUT) => (
            "ETIMEDOUT",
            format!("port {port} in the task did not answer"),
        ),
        Some(libc::EHOSTUNREACH) => (
            "EHOSTUNREACH",
            format!("there is no route to port {port} in the task"),
        ),
        Some(libc::ENETUNREACH) => (
            "ENETUNREACH",
            format!("there is no network to reach port {port} in the task"),
        ),
        Some(libc::EADDRNOTAVAIL) => (
            "EADDRNOTAVAIL",
            format!("no local port is free to reach port {port} in the task from"),
        ),
        _ => return without_port(error, port),
    };
    format!("{code}: {sentence}")
}

fn without_port(error: &io::Error, port: u16) -> String {
    let (code, sentence) = match error.raw_os_error() {
        Some(libc::ECONNRESET) => ("ECONNRESET", "the service reset the connection"),
        Some(libc::EPIPE) => ("EPIPE", "the service closed the connection"),
        Some(libc::EMFILE) => ("EMFILE", "this end of the tunnel has too many open files"),
        Some(libc::ENFILE) => ("ENFILE", "the node has too many open files"),
        Some(libc::EPROTO) => ("EPROTO", "more was sent than the window allows"),
        Some(libc::EPROTONOSUPPORT) => ("EPROTONOSUPPORT", "only TCP and UDP are carried"),
        Some(libc::EAGAIN) => (
            "EAGAIN",
            "the task has as many terminals as it may; end some of them first",
        ),
        Some(libc::EDQUOT) => (
            "EDQUOT",
            "you have as many sessions in the task as you may; end some of them first",
        ),
        Some(libc::ENOBUFS | libc::ENOMEM) => ("ENOBUFS", "the node is out of memory"),
        _ => {
            let said = error.to_string();
            // The library adds the number.
            let said = said.split(" (os error").next().unwrap_or_default();
            return format!("EIO: port {port} in the task can't be reached: {said}");
        }
    };
    format!("{code}: {sentence}")
}

/// Of a UDP stream whose datagrams no address of the container took.
pub fn nobody_takes_datagrams(port: u16) -> String {
    format!("ECONNREFUSED: nothing listens on port {port} (udp) in the task")
}
