//! The user's end of a kept stream, as far as the tests need one: it knows what it sends and expects by its place.

#![allow(dead_code)]

use kohakuriver_tunnel::protocol::{Header, TCP, TERMINAL, kind};

use super::{Message, Runner, Wire, pattern_at};

pub const MARK: [u8; 16] = [0x4d; 16];
pub const UNKNOWN: u64 = u64::MAX;
pub const HOLD: u32 = 3600;

pub fn numbers<const N: usize>(message: &Message) -> [u64; N] {
    assert_eq!(message.payload.len(), 8 * N, "{message:?}");
    let mut payload = message.payload.chunks(8);
    [0; N].map(|_| u64::from_be_bytes(payload.next().unwrap().try_into().unwrap()))
}

pub fn pack(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_be_bytes()).collect()
}

pub struct Opener {
    pub name: [u8; 16],
    pub mark: [u8; 16],
    pub port: u16,
    pub proto: u8,
    /// Of a terminal: what its CONNECT has behind the mark.
    pub start: Vec<u8>,
    pub id: u32,
    pub epoch: u32,
    pub limit: u64,
    pub sent: u64,
    pub acked: u64,
    pub received: u64,
    pub total: u64,
    pub closed: bool,
}

impl Opener {
    /// The stream `number` of an opener.
    pub fn new(number: u32, port: u16) -> Self {
        let mut name = *b"opener......0000";
        name[12..].copy_from_slice(&number.to_be_bytes());
        Self {
            name,
            mark: MARK,
            port,
            proto: TCP,
            start: Vec::new(),
            id: number + 1,
            epoch: 0,
            limit: 0,
            sent: 0,
            acked: 0,
            received: 0,
            total: UNKNOWN,
            closed: false,
        }
    }

    pub fn header(&self, kind: u8) -> Header {
        let opens = matches!(kind, kind::CONNECT | kind::RESUME);
        let proto = if self.proto == TERMINAL && !opens {
            TCP
        } else {
            self.proto
        };
        Header {
            port: self.port,
            ..Header::new(kind, proto, self.id)
        }
    }

    pub fn window(&self) -> u64 {
        self.received + (1 << 20)
    }

    pub fn connect_with(&self, wire: &mut Wire, hold: u32) {
        let mut payload = pack(&[self.window()]);
        payload.extend(self.name);
        payload.extend(hold.to_be_bytes());
        payload.push(0);
        payload.extend(self.mark);
        payload.extend(&self.start);
        wire.send(self.header(kind::CONNECT), &payload);
    }

    /// The next message that is for this stream.
    pub fn next(&self, wire: &mut Wire) -> Message {
        loop {
            let message = wire.any();
            if message.id == self.id {
                return message;
            }
        }
    }

    pub fn open(&mut self, wire: &mut Wire) {
        self.connect_with(wire, HOLD);
        let connected = self.next(wire);
        assert_eq!(connected.kind, kind::CONNECTED, "{}", connected.text());
        let [limit, received] = numbers(&connected);
        assert_eq!(received, 0);
        self.limit = limit;
    }

    /// RESUME under another id; what answers it.
    pub fn ask(&mut self, wire: &mut Wire) -> Message {
        self.epoch += 1;
        self.id += 1000;
        self.repeat(wire)
    }

    pub fn repeat(&mut self, wire: &mut Wire) -> Message {
        let mut payload = self.name.to_vec();
        payload.extend(self.epoch.to_be_bytes());
        payload.extend(pack(&[self.received, self.window(), self.total]));
        payload.extend(self.mark);
        wire.send(self.header(kind::RESUME), &payload);
        self.next(wire)
    }

    /// RESUME, and what has to be sent again.
    pub fn resume(&mut self, wire: &mut Wire) {
        let answer = self.ask(wire);
        assert_eq!(answer.kind, kind::RESUMED, "{}", answer.text());
        let [received, limit, _] = numbers(&answer);
        assert!(received >= self.acked && limit >= self.limit);
        (self.acked, self.limit) = (received, limit);
        let bytes = received.min(if self.total == UNKNOWN {
            received
        } else {
            self.total
        });
        assert!(bytes <= self.sent);
        self.sent = bytes;
        if self.total != UNKNOWN && self.sent == self.total && received == self.total {
            self.eof(wire);
        }
    }

    /// A new link, and the stream on it.
    pub fn resume_anew(&mut self, runner: &Runner) -> Wire {
        let mut wire = runner.accept();
        self.resume(&mut wire);
        wire
    }

    /// Sends the next bytes of the pattern.
    pub fn send(&mut self, wire: &mut Wire, length: usize) {
        let payload = pattern_at(self.sent as usize, length);
        wire.send(self.header(kind::DATA), &payload);
        self.sent += length as u64;
    }

    pub fn eof(&mut self, wire: &mut Wire) {
        self.total = self.sent;
        wire.send(self.header(kind::EOF), &pack(&[self.total, self.received]));
    }

    pub fn ack(&mut self, wire: &mut Wire) {
        wire.send(self.header(kind::ACK), &pack(&[self.received]));
    }

    pub fn detach(&mut self, wire: &mut Wire, seconds: u32) {
        wire.send(self.header(kind::DETACH), &seconds.to_be_bytes());
    }

    /// Takes one message, which is this stream's; its kind. Bytes have to be the pattern's next ones.
    pub fn take(&mut self, wire: &mut Wire) -> u8 {
        let message = wire.any();
        assert_eq!(message.id, self.id, "{message:?}");
        match message.kind {
            kind::DATA => {
                let expected = pattern_at(self.received as usize, message.payload.len());
                assert!(message.payload == expected, "bytes at {}", self.received);
                self.received += expected.len() as u64;
                if self.received % (1 << 19) < expected.len() as u64 {
                    let grant = pack(&[self.window(), self.received]);
                    wire.send(self.header(kind::WINDOW), &grant);
                }
            }
            kind::WINDOW => {
                let [limit, received] = numbers(&message);
                assert!(limit >= self.limit && received >= self.acked);
                (self.limit, self.acked) = (limit, received);
            }
            kind::ACK => [self.acked] = numbers(&message),
            kind::EOF => {
                let [total, received] = numbers(&message);
                assert_eq!(
                    total, self.received,
                    "the end-of-file comes behind all bytes"
                );
                assert!(received >= self.acked);
                self.acked = received;
                self.received += 1;
                self.ack(wire);
            }
            kind::PING => wire.send(self.header(kind::PONG), &message.payload),
            kind::CLOSE => self.closed = true,
            other => panic!("{other}: {}", message.text()),
        }
        message.kind
    }

    /// Takes messages until there is one of this kind.
    pub fn until(&mut self, wire: &mut Wire, kind: u8) {
        while self.take(wire) != kind {}
    }
}
