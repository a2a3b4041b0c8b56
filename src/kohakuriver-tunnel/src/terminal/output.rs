//! What a command says on its way to the stream, without any I/O but the writing.

use std::collections::VecDeque;
use std::io::{self, Write};

use super::frames::{head, tag};

/// What a terminal keeps that nobody takes.
pub const RING: usize = 1 << 20;
/// So much of it goes into one frame.
const PIECE: usize = 64 << 10;
/// What a terminal with a name keeps that was sent already: more than can be on its way when a line is lost.
const HISTORY: usize = 256 << 10;

/// Frames that wait, and behind them what a terminal says while nobody is there: the newest of it.
#[derive(Default)]
pub struct Output {
    waiting: Vec<u8>,
    sent: usize,
    ring: VecDeque<u8>,
    lost: u64,
    /// Of a terminal with a name: what was said before what is in the ring.
    history: Option<VecDeque<u8>>,
}

impl Output {
    /// Of a terminal with a name, whose next line gets to see what the last one saw.
    pub fn with_history() -> Self {
        Self {
            history: Some(VecDeque::new()),
            ..Self::default()
        }
    }

    /// Begins anew for another line: what one screen shows, and then what nobody has seen.
    pub fn again(&mut self) {
        self.waiting.clear();
        self.sent = 0;
        let Some(history) = &mut self.history else {
            return;
        };
        let mut seen = std::mem::take(history);
        if self.lost > 0 {
            return; // there is a gap behind what was seen
        }
        let room = RING.saturating_sub(self.ring.len());
        let over = seen.len().saturating_sub(room);
        let cut = over > 0 || seen.len() == HISTORY;
        seen.drain(..over);
        if cut {
            // Not from the middle of a letter, or of what paints one.
            let line = seen.iter().position(|byte| *byte == b'\n');
            seen.drain(..line.map_or(seen.len(), |at| at + 1));
        }
        seen.append(&mut self.ring);
        self.keep(seen.make_contiguous());
    }

    /// What is to be sent to a line that gets no more than this: the rest of its last frame, and one of this tag.
    pub fn parting(&self, tag: u8, text: &[u8]) -> Vec<u8> {
        let rest = if self.sent > 0 {
            &self.waiting[self.sent..]
        } else {
            &[]
        };
        [rest, &head(tag, text.len()), text].concat()
    }

    /// Whether nothing is left to be sent.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.ring.is_empty() && self.lost == 0
    }

    /// Has a frame sent behind all others, and before what is in the ring.
    pub fn frame(&mut self, tag: u8, bytes: &[u8]) {
        self.waiting.extend(head(tag, bytes.len()));
        self.waiting.extend(bytes);
    }

    /// Keeps what a terminal says. Where that is too much, the oldest is lost.
    pub fn keep(&mut self, bytes: &[u8]) {
        self.ring.extend(bytes);
        let over = self.ring.len().saturating_sub(RING);
        self.ring.drain(..over);
        self.lost += over as u64;
    }

    /// Sends as much as is taken.
    pub fn write_to(&mut self, mut line: impl Write) -> io::Result<()> {
        while self.has_frame() {
            match line.write(&self.waiting[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => self.sent += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            if self.sent == self.waiting.len() {
                self.waiting.clear();
                self.sent = 0;
            }
        }
        Ok(())
    }

    fn has_frame(&mut self) -> bool {
        if !self.waiting.is_empty() {
            return true;
        }
        let lost = std::mem::take(&mut self.lost);
        if lost > 0 {
            if let Some(history) = &mut self.history {
                history.clear();
            }
            self.frame(tag::LOST, &lost.to_be_bytes());
        }
        let size = self.ring.len().min(PIECE);
        if size > 0 {
            self.waiting.extend(head(tag::OUTPUT, size));
            let piece = self.waiting.len();
            self.waiting.extend(self.ring.drain(..size));
            if let Some(history) = &mut self.history {
                history.extend(&self.waiting[piece..]);
                history.drain(..history.len().saturating_sub(HISTORY));
            }
        }
        if self.ring.is_empty() {
            self.ring.shrink_to(PIECE);
        }
        !self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_mebibyte_is_kept_and_the_rest_is_counted() {
        let mut output = Output::default();
        output.frame(tag::ERRORS, b"before");
        for piece in 0..40u8 {
            output.keep(&[piece; 100_000]);
        }
        let mut sent = Vec::new();
        output.write_to(&mut sent).unwrap();
        assert!(output.is_empty());
        let lost = 4_000_000 - RING as u64;
        let begin = [
            &head(tag::ERRORS, 6)[..],
            b"before",
            &head(tag::LOST, 8),
            &lost.to_be_bytes(),
            &head(tag::OUTPUT, PIECE),
            &[(lost / 100_000) as u8],
        ]
        .concat();
        assert_eq!(sent[..begin.len()], begin);
        assert_eq!(sent.last(), Some(&39));
        assert_eq!(sent.len(), 11 + 13 + RING + 5 * RING.div_ceil(PIECE));
    }

    fn said(output: &mut Output) -> Vec<u8> {
        let mut sent = Vec::new();
        output.write_to(&mut sent).unwrap();
        let mut rest = &sent[..];
        let mut said = Vec::new();
        while let Some((head, tail)) = rest.split_first_chunk::<5>() {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            assert_eq!(head[0], tag::OUTPUT);
            said.extend(&tail[..length]);
            rest = &tail[length..];
        }
        said
    }

    #[test]
    fn the_next_line_sees_what_the_last_one_saw_and_then_what_nobody_has_seen() {
        let mut output = Output::with_history();
        output.keep(b"seen\n");
        assert_eq!(said(&mut output), b"seen\n");
        output.keep(b"unseen");
        for _ in 0..2 {
            output.again();
            assert_eq!(said(&mut output), b"seen\nunseen");
        }
    }

    #[test]
    fn a_long_history_begins_with_a_line_and_none_stands_before_a_gap() {
        let mut output = Output::with_history();
        for number in 0..100_000 {
            output.keep(format!("{number}\n").as_bytes());
            said(&mut output);
        }
        output.again();
        let again = String::from_utf8(said(&mut output)).unwrap();
        assert!(again.len() <= HISTORY && again.len() > HISTORY - 10);
        let mut lines = again.lines().map(|line| line.parse::<u32>().unwrap());
        let first = lines.next().unwrap();
        assert!((first + 1..100_000).eq(lines));

        output.keep(&[b'y'; RING - 100]);
        output.again();
        assert!(said(&mut output).ends_with(&[b'y'; RING - 100]));

        output.keep(&[b'x'; RING + 7]);
        output.again();
        let mut sent = Vec::new();
        output.write_to(&mut sent).unwrap();
        let begin = [&head(tag::LOST, 8)[..], &7u64.to_be_bytes()].concat();
        assert_eq!(sent[..begin.len()], begin);
        assert_eq!(sent[begin.len() + 5], b'x');
    }

    #[test]
    fn who_parts_gets_the_rest_of_a_frame_that_was_begun() {
        struct Short(Vec<u8>);
        impl Write for Short {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if !self.0.is_empty() {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.0.extend(&bytes[..7]);
                Ok(7)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut output = Output::with_history();
        output.keep(b"hello");
        assert_eq!(output.parting(tag::TAKEN, b""), head(tag::TAKEN, 0));
        let mut short = Short(Vec::new());
        output.write_to(&mut short).unwrap();
        let all = [&short.0[..], &output.parting(tag::TAKEN, b"")].concat();
        let frames = [&head(tag::OUTPUT, 5)[..], b"hello", &head(tag::TAKEN, 0)].concat();
        assert_eq!(all, frames);
    }
}
