//! One line per event, on standard error.

/// Prints a line: what happened, as `format!` takes it.
#[macro_export]
macro_rules! log {
    ($($what:tt)*) => {
        $crate::log::print(&format!($($what)*))
    };
}

/// Prints one line. What clients sent may be in it, so nothing in it controls a terminal or begins another line.
pub fn print(line: &str) {
    use std::io::Write;
    let line: String = line
        .chars()
        .map(|each| if each.is_control() { '\u{fffd}' } else { each })
        .collect();
    // Whoever reads the log may be gone; the sessions go on.
    let _ = writeln!(std::io::stderr(), "tunnel-sshd: {line}");
}
