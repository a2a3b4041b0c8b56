//! What the client asks of the server and of its sessions (RFC 4254 §4, §6, §7.1).

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::process::Child;
use std::thread;

use super::{Connection, Event};
use crate::channel::{Channel, number};
use crate::forward::Listener;
use crate::log;
use crate::scp;
use crate::session::{self, End, Order, Session};
use crate::sftp;
use crate::sys::{self, Size};
use crate::terminal::Asked;
use crate::transport::Fatal;
use crate::wire::{Put, Reader};

/// What a shell says of a program that isn't there.
const NOT_FOUND: u32 = 127;
/// How a program ended isn't known.
const UNKNOWN: u32 = 255;

impl Connection {
    pub(super) fn global_request(&mut self, reader: &mut Reader<'_>) -> Result<(), Fatal> {
        let (name, wants_reply) = (reader.string()?, reader.bool()?);
        let answer = self.global_answer(name, reader)?;
        if wants_reply {
            match answer {
                Some(content) => self
                    .transport
                    .send(number::REQUEST_SUCCESS, |message| message.put_raw(&content)),
                None => self.transport.send(number::REQUEST_FAILURE, |_| {}),
            }
        }
        Ok(())
    }

    /// What a success carries; None is a failure.
    fn global_answer(
        &mut self,
        name: &[u8],
        reader: &mut Reader<'_>,
    ) -> Result<Option<Vec<u8>>, Fatal> {
        let plain = |done: bool| done.then(Vec::new);
        Ok(match name {
            b"tcpip-forward" => {
                let (host, port) = (reader.text()?, reader.u32()?);
                self.listen(|| Listener::tcp(host, port)).map(|given| {
                    let mut message = Vec::new();
                    if port == 0 {
                        message.put_u32(given);
                    }
                    message
                })
            }
            b"streamlocal-forward@openssh.com" => {
                let path = OsString::from_vec(reader.string()?.to_vec());
                plain(self.listen(|| Listener::unix(path.into())).is_some())
            }
            b"cancel-tcpip-forward" => {
                let (host, port) = (reader.text()?, reader.u32()?);
                plain(
                    self.forwards
                        .unlisten(|listener| listener.is_tcp(host, port)),
                )
            }
            b"cancel-streamlocal-forward@openssh.com" => {
                let path = reader.string()?;
                plain(self.forwards.unlisten(|listener| listener.is_unix(path)))
            }
            b"no-more-sessions@openssh.com" => {
                self.more_sessions = false;
                plain(true)
            }
            // Above all keepalive@openssh.com, to which any answer is a sign of life.
            _ => None,
        })
    }

    /// The port of a new listener; None where there can't be one.
    fn listen(&mut self, make: impl FnOnce() -> io::Result<Listener>) -> Option<u32> {
        self.forwards
            .listen(make)
            .map(Listener::port)
            .inspect_err(|error| log!("{}: can't listen for the client: {error}", self.peer))
            .ok()
    }

    pub(super) fn request(&mut self, id: u32, reader: &mut Reader<'_>) -> Result<(), Fatal> {
        let (name, wants_reply) = (reader.string()?, reader.bool()?);
        let channel = self.channel(id);
        let (peer, closed) = (channel.peer(), channel.is_closed());
        let done = channel.session.is_some()
            && match name {
                b"shell" => self.reply_then_start(id, wants_reply, None),
                b"exec" => self.reply_then_start(id, wants_reply, Some(reader.string()?)),
                _ => self.session_request(id, name, reader)?,
            };
        // What was started has had its answer.
        if wants_reply && !closed && !(done && matches!(name, b"shell" | b"exec")) {
            let answer = if done {
                number::SUCCESS
            } else {
                number::FAILURE
            };
            self.transport.send(answer, |message| message.put_u32(peer));
        }
        Ok(())
    }

    /// Requests that are answered afterwards. True where it was done.
    fn session_request(
        &mut self,
        id: u32,
        name: &[u8],
        reader: &mut Reader<'_>,
    ) -> Result<bool, Fatal> {
        let session = self.session(id);
        Ok(match name {
            b"pty-req" if !session.started => {
                let kind = reader.text()?;
                let size = read_size(reader)?;
                let asked = Asked::open(kind, size, reader.string()?);
                let asked = asked.inspect_err(|error| {
                    log!("{}: can't open a terminal: {error}", self.peer);
                });
                let session = self.session(id);
                session.asked = asked.ok().or(session.asked.take());
                session.asked.is_some()
            }
            b"env" if !session.started => {
                let (variable, value) = (reader.text()?, reader.string()?);
                let allowed =
                    session::is_allowed_variable(variable) && session.variables.len() < 64;
                if allowed {
                    session
                        .variables
                        .insert(variable.into(), OsString::from_vec(value.to_vec()));
                }
                allowed
            }
            b"window-change" => {
                let size = read_size(reader)?;
                if let Some(master) = &session.master {
                    sys::resize(master.as_raw_fd(), size);
                }
                true
            }
            b"signal" => match (session::signal_number(reader.text()?), session.leader) {
                (Some(signal), Some(leader)) => {
                    sys::signal_group(leader, signal);
                    true
                }
                _ => false,
            },
            b"auth-agent-req@openssh.com" if !session.started => self.offer_agent(id),
            b"subsystem" if !session.started => reader.string()? == b"sftp" && self.start_sftp(id),
            _ => false,
        })
    }

    /// A channel that is there, as the caller has seen.
    fn channel(&mut self, id: u32) -> &mut Channel {
        self.channels.get_mut(&id).expect("the caller looked")
    }

    /// The session of a channel that has one, as the caller has seen.
    fn session(&mut self, id: u32) -> &mut Session {
        self.channel(id)
            .session
            .as_mut()
            .expect("the caller looked")
    }

    fn offer_agent(&mut self, id: u32) -> bool {
        let path = match self.forwards.agent(&self.shared.user.home) {
            Ok(path) => path,
            Err(error) => {
                log!("{}: can't make a socket for the agent: {error}", self.peer);
                return false;
            }
        };
        self.session(id)
            .variables
            .insert("SSH_AUTH_SOCK".into(), path.into());
        true
    }

    /// Relays a server of files that runs in a thread, as it would a program.
    fn serve_files(&mut self, id: u32, started: io::Result<OwnedFd>) -> bool {
        match started {
            Ok(socket) => {
                self.session(id).started = true;
                self.channel(id).relay(socket);
                self.channel(id).flush();
                true
            }
            Err(error) => {
                log!("{}: can't serve files: {error}", self.peer);
                false
            }
        }
    }

    fn start_sftp(&mut self, id: u32) -> bool {
        let reporter = self.reporter.clone();
        let ended = move || reporter.report(Event::Ended(id, End::Exit(0)));
        let started = sftp::start(self.shared.user.home.clone(), ended);
        self.serve_files(id, started)
    }

    /// Copies by the old protocol, where the image has no program that does. The image's own comes first: its command line
    /// is the shell's to expand, and it is what the user chose.
    fn start_scp(&mut self, id: u32, command: Option<&[u8]>) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_else(|| session::DEFAULT_PATH.into());
        let request = command.and_then(|line| scp::Request::for_missing_program(line, &path));
        let Some(request) = request.filter(|_| self.session(id).asked.is_none()) else {
            return false;
        };
        let reporter = self.reporter.clone();
        let ended = move |code| reporter.report(Event::Ended(id, End::Exit(code)));
        let started = scp::start(request, self.shared.user.home.clone(), ended);
        self.serve_files(id, started)
    }

    /// A program that can't be started is told as one that failed: that reaches the user.
    fn reply_then_start(&mut self, id: u32, wants_reply: bool, command: Option<&[u8]>) -> bool {
        if std::mem::replace(&mut self.session(id).started, true) {
            return false;
        }
        let peer = self.channel(id).peer();
        if wants_reply {
            self.transport
                .send(number::SUCCESS, |message| message.put_u32(peer));
        }
        if self.start_scp(id, command) {
            return true;
        }
        if let Err(sentence) = self.start(id, command) {
            let line = format!("tunnel-sshd: {sentence}\r\n");
            self.transport.send(number::EXTENDED_DATA, |message| {
                message.put_u32(peer);
                message.put_u32(1);
                message.put_string(line.as_bytes());
            });
            if let Some(channel) = self.channels.get_mut(&id) {
                channel.end_session(&End::Exit(NOT_FOUND), &mut self.transport);
            }
        }
        true
    }

    fn start(&mut self, id: u32, command: Option<&[u8]>) -> Result<(), String> {
        let [(peer, peer_port), (own, own_port)] = self.ends.clone();
        let session = self.session(id);
        let (mut variables, asked) = (std::mem::take(&mut session.variables), session.asked.take());
        let connection = format!("{peer} {peer_port} {own} {own_port}");
        variables.insert("SSH_CONNECTION".into(), connection.into());
        let client = format!("{peer} {peer_port} {own_port}");
        variables.insert("SSH_CLIENT".into(), client.into());
        let started = session::start(&Order {
            user: &self.shared.user,
            command,
            variables: &variables,
            asked: asked.as_ref(),
            files: self.shared.files,
        })?;
        let child = self.channel(id).attach(asked, started);
        self.watch(id, child)
    }

    fn watch(&self, id: u32, mut child: Child) -> Result<(), String> {
        let reporter = self.reporter.clone();
        let helper = move || {
            // How it ended can be lost to us, but the client still has to be told that it did.
            let end = child.wait().map_or(End::Exit(UNKNOWN), End::from);
            reporter.report(Event::Ended(id, end));
        };
        let spawned = thread::Builder::new()
            .name("wait".into())
            .stack_size(64 * 1024)
            .spawn(helper);
        spawned
            .map(drop)
            .map_err(|error| format!("can't watch the program: {error}"))
    }
}

fn read_size(reader: &mut Reader<'_>) -> Result<Size, Fatal> {
    let characters = (reader.u32()?, reader.u32()?);
    Ok(Size {
        characters,
        pixels: (reader.u32()?, reader.u32()?),
    })
}
