//! Bytes that a service's socket did not take at once.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};

const CHUNK: usize = 256 << 10;
const MAX_SLICES: usize = 16;

/// A byte queue in chunks. It owns no memory while it is empty, as most streams' queues are.
#[derive(Default)]
pub struct Queue {
    chunks: VecDeque<Vec<u8>>,
    /// What has been taken of the first chunk.
    taken: usize,
    length: usize,
}

impl Queue {
    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends `bytes`, filling the last chunk first so that small pieces don't cost a chunk each.
    pub fn push(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len();
        if let Some(last) = self.chunks.back_mut() {
            let room = CHUNK.saturating_sub(last.len()).min(bytes.len());
            last.extend_from_slice(&bytes[..room]);
            bytes = &bytes[room..];
        }
        self.chunks.extend(bytes.chunks(CHUNK).map(<[u8]>::to_vec));
    }

    /// Writes until the queue is empty or `sink` takes no more; how many bytes were written.
    pub fn write_to(&mut self, sink: &mut impl Write) -> io::Result<usize> {
        let mut total = 0;
        while !self.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let mut offered = 0;
            let mut used = 0;
            for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
                let skip = if used == 0 { self.taken } else { 0 };
                *slice = IoSlice::new(&chunk[skip..]);
                offered += chunk.len() - skip;
                used += 1;
            }
            let written = match sink.write_vectored(&slices[..used]) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.advance(written);
            total += written;
            if written < offered {
                break;
            }
        }
        Ok(total)
    }

    /// Forgets all bytes and gives their memory back.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn advance(&mut self, written: usize) {
        self.length -= written;
        self.taken += written;
        while self
            .chunks
            .front()
            .is_some_and(|chunk| chunk.len() <= self.taken)
        {
            self.taken -= self.chunks.pop_front().map_or(0, |chunk| chunk.len());
        }
        if self.is_empty() {
            self.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a few bytes at a time, and none every other call.
    struct Reluctant {
        got: Vec<u8>,
        willing: bool,
    }

    impl Write for Reluctant {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.willing = !self.willing;
            if !self.willing {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let n = bytes.len().min(100_000);
            self.got.extend_from_slice(&bytes[..n]);
            Ok(n)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_leave_in_the_order_they_came_and_no_memory_stays() {
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut queue = Queue::default();
        for piece in sent.chunks(77_777) {
            queue.push(piece);
        }
        let mut sink = Reluctant {
            got: Vec::new(),
            willing: false,
        };
        while !queue.is_empty() {
            queue.write_to(&mut sink).unwrap();
        }
        assert_eq!(sink.got, sent);
        assert_eq!(queue.chunks.capacity(), 0);
    }

    #[test]
    fn small_pieces_share_a_chunk() {
        let mut queue = Queue::default();
        for _ in 0..1000 {
            queue.push(b"tiny");
        }
        assert_eq!((queue.len(), queue.chunks.len()), (4000, 1));
    }
}
