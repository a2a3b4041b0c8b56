//! One line each on standard error.

use std::sync::atomic::{AtomicU8, Ordering};

/// How much is logged; each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);

impl std::str::FromStr for Level {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name.to_ascii_lowercase().as_str() {
            "error" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warn),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            _ => Err(()),
        }
    }
}

/// Sets the level of the whole process.
pub fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// No longer than what a pipe that can be written takes without waiting (POSIX `PIPE_BUF` on Linux).
const LONGEST: usize = 4096;

/// Writes one line if `level` is on. A standard error that is closed, or that nobody reads, is no reason to fail or
/// to wait.
pub fn write(level: Level, text: std::fmt::Arguments<'_>) {
    if level as u8 <= LEVEL.load(Ordering::Relaxed) {
        use std::io::Write;
        let name = ["error", "warn", "info", "debug"][level as usize];
        let line = format!("tunnel-client: {name}: {text}\n");
        let mut line = line.into_bytes();
        if line.len() > LONGEST {
            line.truncate(LONGEST - 1);
            line.push(b'\n');
        }
        if crate::sys::is_writable(libc::STDERR_FILENO) {
            let _ = std::io::stderr().write_all(&line);
        }
    }
}

/// Logs a line: `log!(Info, "…", …)`.
#[macro_export]
macro_rules! log {
    ($level:ident, $($text:tt)*) => {
        $crate::log::write($crate::log::Level::$level, format_args!($($text)*))
    };
}
