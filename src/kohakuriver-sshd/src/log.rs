//! One line per event, on standard error.
//!
//! A thread of its own writes the lines: standard error may be a pipe that nobody reads, and no client waits for that.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

/// Lines that wait to be written; what comes beside them is dropped and counted.
const MOST_WAITING: usize = 256;
/// Characters. What clients sent may be in a line.
const LONGEST: usize = 1000;

static WRITER: OnceLock<SyncSender<String>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Prints a line: what happened, as `format!` takes it.
#[macro_export]
macro_rules! log {
    ($($what:tt)*) => {
        $crate::log::print(&format!($($what)*))
    };
}

/// From now on no line is waited for. Before that, a line is written when [`print`] returns.
pub fn detach() -> io::Result<()> {
    let (sender, lines) = sync_channel(MOST_WAITING);
    thread::Builder::new()
        .name("log".into())
        .spawn(move || write_all(&lines))?;
    let _ = WRITER.set(sender);
    Ok(())
}

/// Prints one line. What clients sent may be in it, so nothing in it controls a terminal or begins another line.
pub fn print(line: &str) {
    let line: String = line
        .chars()
        .take(LONGEST)
        .map(|each| if each.is_control() { '\u{fffd}' } else { each })
        .collect();
    match WRITER.get() {
        Some(writer) => {
            if writer.try_send(line).is_err() {
                DROPPED.fetch_add(1, Ordering::Relaxed);
            }
        }
        None => write(&line),
    }
}

fn write_all(lines: &Receiver<String>) {
    for line in lines {
        write(&line);
        match DROPPED.swap(0, Ordering::Relaxed) {
            0 => {}
            count => write(&format!(
                "{count} lines were dropped, as nobody took them in time"
            )),
        }
    }
}

fn write(line: &str) {
    // Whoever reads the log may be gone; the sessions go on. One call, so that no other program's line gets in between.
    let _ = io::stderr().write_all(format!("tunnel-sshd: {line}\n").as_bytes());
}
