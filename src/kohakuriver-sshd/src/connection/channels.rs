//! The channels of a connection: opened by the client, or asked of it for what a listener accepted (RFC 4254 §5, §7).

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::thread;
use std::time::Duration;

use super::{Connection, Event, MOST_CHANNELS};
use crate::channel::{Channel, PACKET, WINDOW, number};
use crate::forward::{self, Accepted};
use crate::session::Session;
use crate::transport::{Fatal, protocol_error};
use crate::wire::{Put, Reader};

/// Reasons why a channel isn't opened (RFC 4254 §5.1).
mod refusal {
    pub const PROHIBITED: u32 = 1;
    pub const CONNECT_FAILED: u32 = 2;
    pub const UNKNOWN_TYPE: u32 = 3;
    pub const SHORTAGE: u32 = 4;
}

impl Connection {
    fn new_id(&mut self) -> u32 {
        let id = self.next_channel;
        // Numbers aren't used again, so what is reported late can't reach another channel.
        self.next_channel = self.next_channel.wrapping_add(1);
        id
    }

    pub(super) fn open(&mut self, reader: &mut Reader<'_>) -> Result<(), Fatal> {
        let kind = reader.string()?;
        let (peer, window, packet) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let channel = Channel::asked_by_peer(peer, window, packet);
        if self.channels.len() >= MOST_CHANNELS {
            self.refuse_channel(peer, refusal::SHORTAGE, "too many channels are open");
            return Ok(());
        }
        match kind {
            b"session" => self.open_session(channel),
            b"direct-tcpip" => {
                let (host, port) = (reader.text()?.to_owned(), reader.u32()?);
                self.connect(channel, move || forward::connect_tcp(&host, port));
            }
            b"direct-streamlocal@openssh.com" => {
                let path = OsString::from_vec(reader.string()?.to_vec());
                self.connect(channel, move || forward::connect_unix(path.as_ref()));
            }
            _ => self.refuse_channel(
                peer,
                refusal::UNKNOWN_TYPE,
                "there is no such kind of channel",
            ),
        }
        Ok(())
    }

    fn refuse_channel(&mut self, peer: u32, code: u32, sentence: &str) {
        self.transport.send(number::OPEN_FAILURE, |message| {
            message.put_u32(peer);
            message.put_u32(code);
            message.put_string(sentence.as_bytes());
            message.put_string(b"");
        });
    }

    fn open_session(&mut self, mut channel: Channel) {
        if !self.more_sessions {
            return self.refuse_channel(
                channel.peer(),
                refusal::PROHIBITED,
                "the client asked for no more sessions",
            );
        }
        let Some(place) = self.shared.take_place() else {
            return self.refuse_channel(
                channel.peer(),
                refusal::SHORTAGE,
                "too many sessions are open",
            );
        };
        channel.session = Some(Box::new(Session::holding(place)));
        let id = self.new_id();
        channel.accept(id, &mut self.transport);
        self.channels.insert(id, channel);
    }

    /// Makes a connection in a thread of its own: names and distant hosts take their time.
    fn connect(
        &mut self,
        channel: Channel,
        make: impl FnOnce() -> io::Result<OwnedFd> + Send + 'static,
    ) {
        let (id, peer) = (self.new_id(), channel.peer());
        let reporter = self.reporter.clone();
        let helper = move || reporter.report(Event::Connected(id, make()));
        match thread::Builder::new()
            .name("connect".into())
            .stack_size(256 * 1024)
            .spawn(helper)
        {
            Ok(_) => drop(self.channels.insert(id, channel)),
            Err(error) => self.refuse_channel(peer, refusal::SHORTAGE, &error.to_string()),
        }
    }

    pub(super) fn connected(&mut self, id: u32, result: io::Result<OwnedFd>) {
        match result {
            Ok(socket) => {
                if let Some(channel) = self.channels.get_mut(&id) {
                    channel.relay(socket);
                    channel.accept(id, &mut self.transport);
                }
            }
            Err(error) => {
                if let Some(channel) = self.channels.remove(&id) {
                    self.refuse_channel(
                        channel.peer(),
                        refusal::CONNECT_FAILED,
                        &error.to_string(),
                    );
                }
            }
        }
    }

    /// Asks the client for a channel for what a listener accepted.
    pub(super) fn accept_forward(&mut self, accepted: Option<io::Result<Accepted>>) {
        match accepted {
            Some(Ok(accepted)) => self.ask_for_channel(accepted),
            Some(Err(error)) => pause_after(&error),
            None => {}
        }
    }

    fn ask_for_channel(&mut self, accepted: Accepted) {
        let id = self.new_id();
        self.channels
            .insert(id, Channel::asked_by_us(accepted.socket));
        self.transport.send(number::OPEN, |message| {
            message.put_string(accepted.kind.as_bytes());
            for value in [id, WINDOW, PACKET] {
                message.put_u32(value);
            }
            message.put_raw(&accepted.details);
        });
    }

    pub(super) fn channel_message(
        &mut self,
        kind: u8,
        reader: &mut Reader<'_>,
    ) -> Result<(), Fatal> {
        let id = reader.u32()?;
        let Some(channel) = self.channels.get_mut(&id) else {
            return Err(protocol_error("a message for a channel that doesn't exist"));
        };
        match kind {
            number::OPEN_CONFIRMATION | number::OPEN_FAILURE if !channel.is_ours() => {
                return Err(protocol_error("nobody asked for that channel"));
            }
            number::OPEN_CONFIRMATION if !channel.is_open() => {
                channel.confirm(reader.u32()?, reader.u32()?, reader.u32()?);
            }
            number::OPEN_FAILURE if !channel.is_open() => drop(self.channels.remove(&id)),
            number::SUCCESS | number::FAILURE => {}
            _ if !channel.is_open() => return Err(protocol_error("that channel isn't open")),
            number::WINDOW_ADJUST => {
                if !channel.widen(reader.u32()?) {
                    return Err(protocol_error("a window is too large"));
                }
            }
            // Nothing here takes a second kind of input; it counts against the window all the same.
            number::EXTENDED_DATA => {
                return Err(protocol_error("only a server has a standard error"));
            }
            number::EOF => channel.end_of_input(),
            number::CLOSE => channel.end_by_peer(&mut self.transport),
            number::REQUEST => return self.request(id, reader),
            _ => return Err(protocol_error("a channel can't be confirmed twice")),
        }
        Ok(())
    }
}

/// Where the system gives no more descriptors, a listener stays ready: that must not be a busy loop.
fn pause_after(error: &io::Error) {
    const PAUSE: Duration = Duration::from_millis(5);
    if error.kind() != io::ErrorKind::WouldBlock {
        thread::sleep(PAUSE);
    }
}
