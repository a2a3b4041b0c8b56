//! What comes from the peer: its version line, then packets that are opened and proven (RFC 4253 §4.2, §6).

use std::ops::Range;

use super::{Fatal, HEAD, Transport, protocol_error, reason};
use crate::crypto::LEAST_PADDING;

const LONGEST_VERSION: usize = 255;
const LONGEST_PACKET: usize = 256 * 1024;
/// RFC 4253 §6.1: what everybody has to take. Strangers get no more memory than that.
const LONGEST_OF_STRANGERS: usize = 35_000;
/// A peer that is asked for new keys and goes on under the old ones has to go before that.
const MOST_PACKETS: u64 = 1 << 31;

impl Transport {
    pub(super) fn read_version(&mut self) -> Result<bool, Fatal> {
        let bytes = &self.input[self.filled.clone()];
        let line = match bytes
            .iter()
            .take(LONGEST_VERSION)
            .position(|byte| *byte == b'\n')
        {
            Some(end) => &bytes[..end],
            None if bytes.len() < LONGEST_VERSION => return Ok(false),
            None => return Err(protocol_error("the version line is too long")),
        };
        let length = line.len() + 1;
        let version = line.strip_suffix(b"\r").unwrap_or(line);
        if !version.starts_with(b"SSH-2.0-") {
            return Err(protocol_error("this server speaks SSH 2.0"));
        }
        self.peer_version = Some(version.to_vec());
        self.filled.start += length;
        Ok(true)
    }

    /// Opens the next packet that is there in full.
    pub(super) fn open_packet(&mut self) -> Result<Option<Range<usize>>, Fatal> {
        let start = self.filled.start;
        if self.filled.len() < 4 {
            return Ok(None);
        }
        let head: [u8; 4] = self.input[start..start + 4].try_into().expect("4 bytes");
        let length = self.opener.length(self.received, head) as usize;
        if length > self.longest_packet() || !self.opener.is_length(length) {
            return Err(Fatal::Ours(
                reason::MAC_ERROR,
                "a packet's length is impossible".into(),
            ));
        }
        let total = 4 + length + self.opener.tag();
        if self.filled.len() < total {
            return Ok(None);
        }
        let packet = &mut self.input[start..start + total];
        if self.opener.open(self.received, packet).is_err() {
            return Err(Fatal::Ours(
                reason::MAC_ERROR,
                "a packet was damaged on its way".into(),
            ));
        }
        let padding = packet[4] as usize;
        if padding < LEAST_PADDING || padding + 1 >= length {
            return Err(protocol_error("a packet's padding is impossible"));
        }
        if self.used.1 >= MOST_PACKETS {
            return Err(protocol_error("these keys have been used for too long"));
        }
        self.received = self.received.wrapping_add(1);
        self.filled.start += total;
        self.used.0 += total as u64;
        self.used.1 += 1;
        Ok(Some(start + HEAD..start + 4 + length - padding))
    }

    fn longest_packet(&self) -> usize {
        if self.opener_is_set() {
            LONGEST_PACKET
        } else {
            LONGEST_OF_STRANGERS
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::number;
    use super::*;
    use crate::algorithms::ALL;
    use crate::crypto::random;
    use crate::keys::HostKeys;

    #[test]
    fn nothing_more_is_taken_under_keys_that_were_used_for_too_long() {
        let path =
            std::env::temp_dir().join(format!("transport-{:x}", u64::from_be_bytes(random())));
        let keys = HostKeys::load_or_make(std::slice::from_ref(&path)).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut transport = Transport::new(Arc::new(keys), &ALL, 1 << 30);
        let packet = [&[0, 0, 0, 12, 10, number::DISCONNECT][..], &[0; 10]].concat();
        let said = [b"SSH-2.0-test\r\n".as_slice(), &packet].concat();
        transport.space()[..said.len()].copy_from_slice(&said);
        transport.advance(said.len());
        transport.used.1 = MOST_PACKETS;
        let Err(Fatal::Ours(reason::PROTOCOL_ERROR, why)) = transport.next_message() else {
            panic!("it was taken");
        };
        assert!(why.contains("too long"), "{why}");
        transport.used.1 = MOST_PACKETS - 1;
        assert_eq!(transport.next_message(), Err(Fatal::Goodbye));
    }
}
