//! What goes through a terminal's stream: frames of a tag, a `u32` length and as many bytes (docs/protocol.md §6).

use std::collections::VecDeque;

/// The first byte of a frame.
#[allow(missing_docs)]
pub mod tag {
    pub const INPUT: u8 = 0x01;
    pub const END: u8 = 0x02;
    pub const RESIZE: u8 = 0x03;
    pub const SIGNAL: u8 = 0x04;
    pub const STARTED: u8 = 0x10;
    pub const OUTPUT: u8 = 0x11;
    pub const ERRORS: u8 = 0x12;
    pub const EXIT: u8 = 0x13;
    pub const LOST: u8 = 0x14;
    pub const FAILED: u8 = 0x15;
    pub const TAKEN: u8 = 0x16;
}

const HEAD: usize = 5;
/// What any frame but input may have.
const LONGEST: usize = 64;

/// What the user's end asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// For the command's input.
    Input(Vec<u8>),
    /// No more input comes.
    End,
    /// Rows and columns.
    Resize(u16, u16),
    /// For the command and its group.
    Signal(u8),
}

/// Finds frames in what comes. Input is handed on as it comes, not when its frame is whole.
#[derive(Default)]
pub struct Reader {
    head: Vec<u8>,
    left: usize,
}

impl Reader {
    /// Takes bytes; what they ask for is put into `asked`. False if they can't be meant.
    pub fn take(&mut self, mut bytes: &[u8], asked: &mut VecDeque<Asked>) -> bool {
        while !bytes.is_empty() {
            if self.left > 0 {
                let (piece, rest) = bytes.split_at(bytes.len().min(self.left));
                asked.push_back(Asked::Input(piece.to_vec()));
                (self.left, bytes) = (self.left - piece.len(), rest);
                continue;
            }
            let need = self.need();
            let (piece, rest) = bytes.split_at(bytes.len().min(need - self.head.len()));
            self.head.extend(piece);
            bytes = rest;
            if self.head.len() == HEAD && self.need() > HEAD + LONGEST {
                return false;
            }
            if self.head.len() == self.need() && !self.whole(asked) {
                return false;
            }
        }
        true
    }

    /// How long the frame is that begins in `head`; of input only what stands in front of it.
    fn need(&self) -> usize {
        match *self.head {
            [tag, a, b, c, d, ..] if tag != tag::INPUT => {
                HEAD + u32::from_be_bytes([a, b, c, d]) as usize
            }
            _ => HEAD,
        }
    }

    /// A frame is whole, or the head of input.
    fn whole(&mut self, asked: &mut VecDeque<Asked>) -> bool {
        let head = std::mem::take(&mut self.head);
        let (length, payload) = (&head[1..HEAD], &head[HEAD..]);
        match (head[0], payload) {
            (tag::INPUT, _) => {
                let length = [length[0], length[1], length[2], length[3]];
                self.left = u32::from_be_bytes(length) as usize;
            }
            (tag::END, []) => asked.push_back(Asked::End),
            (tag::RESIZE, [a, b, c, d]) => asked.push_back(Asked::Resize(
                u16::from_be_bytes([*a, *b]),
                u16::from_be_bytes([*c, *d]),
            )),
            (tag::SIGNAL, [number]) => asked.push_back(Asked::Signal(*number)),
            // What is not known is for a newer client.
            (tag::END | tag::RESIZE | tag::SIGNAL, _) => return false,
            _ => {}
        }
        true
    }
}

/// The head of a frame.
pub fn head(tag: u8, length: usize) -> [u8; HEAD] {
    let [a, b, c, d] = (length as u32).to_be_bytes();
    [tag, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_wherever_they_are_cut() {
        let bytes = [
            &[tag::INPUT, 0, 0, 0, 2][..],
            b"hi",
            &[tag::RESIZE, 0, 0, 0, 4, 0, 50, 0, 132],
            &[0x7f, 0, 0, 0, 1, 9],
            &[tag::SIGNAL, 0, 0, 0, 1, 15],
            &[tag::END, 0, 0, 0, 0],
        ]
        .concat();
        for size in 1..=bytes.len() {
            let (mut reader, mut asked) = (Reader::default(), VecDeque::new());
            for piece in bytes.chunks(size) {
                assert!(reader.take(piece, &mut asked));
            }
            let mut input = Vec::new();
            asked.retain(|each| match each {
                Asked::Input(bytes) => {
                    input.extend(bytes.clone());
                    false
                }
                _ => true,
            });
            assert_eq!(input, b"hi");
            assert_eq!(
                asked,
                [Asked::Resize(50, 132), Asked::Signal(15), Asked::End]
            );
        }
    }

    #[test]
    fn what_can_not_be_meant_is_refused_before_it_is_there() {
        for wrong in [
            &[tag::END, 0xff, 0, 0, 0][..],
            &[tag::RESIZE, 0, 0, 0, 1, 0],
        ] {
            assert!(!Reader::default().take(wrong, &mut VecDeque::new()));
        }
    }
}
