//! One line per event, on standard error.

/// Prints a line: what happened, as `format!` takes it.
#[macro_export]
macro_rules! log {
    ($($what:tt)*) => {{
        use std::io::Write;
        // Whoever reads the log may be gone; the sessions go on.
        let _ = writeln!(std::io::stderr(), "tunnel-sshd: {}", format_args!($($what)*));
    }};
}
