//! A terminal as the client wants it (RFC 4254 §6.2, §8).

use std::io;
use std::os::fd::AsRawFd;

use crate::sys::{self, Size, Terminal};
use crate::wire::Reader;

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

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn modes_of_any_content_are_survived(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        ) {
            // SAFETY: termios is plain numbers, for which zeros are values.
            let mut settings = unsafe { std::mem::zeroed::<libc::termios>() };
            apply_modes(&mut settings, &bytes);
        }
    }
}
