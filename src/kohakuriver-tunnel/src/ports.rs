//! Which ports listen in the container, for a runner that asks (docs/protocol.md §3, "Which ports listen").
//!
//! A look has a thread of its own: `/proc` of many processes takes a while, and the streams don't wait for it.

mod owners;

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Write};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::listeners;
use crate::offer::Offer;
use crate::protocol::{TCP, UDP, take};
use crate::sys;

/// No more ports than this are told.
const MOST: usize = 1000;
/// What a look's thread needs: it has no deep calls.
const STACK: usize = 256 << 10;
/// In an answer: there are more ports, or not all processes could be looked at in time.
const MORE: u8 = 1;

/// Whose sockets are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All that this network has.
    Network,
    /// Those of processes that can be seen from here.
    Seen,
    /// Those of processes of this one's session, and of those with this `NAME=VALUE` in their environment.
    Own(Vec<u8>),
}

/// A PORTS to the container.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Question {
    pub number: [u8; 4],
    pub scope: Scope,
}

impl Question {
    /// What such a payload asks; `None` where it makes no sense.
    pub fn parse(mut payload: &[u8]) -> Option<Self> {
        let rest = &mut payload;
        let (number, [scope]) = (take(rest)?, take(rest)?);
        let scope = match scope {
            0 if rest.is_empty() => Scope::Network,
            1 if rest.is_empty() => Scope::Seen,
            2 if !rest.is_empty() && !rest.contains(&0) => Scope::Own(rest.to_vec()),
            _ => return None,
        };
        Some(Self { number, scope })
    }
}

/// The payload of the answer.
pub fn look(question: &Question, offer: &Offer) -> Vec<u8> {
    let all = |udp| {
        let offered = listeners::all(udp).into_iter();
        offered
            .filter(|at| offer.shows(at))
            .map(move |at| (udp, at))
    };
    let found: Vec<_> = all(false).chain(all(true)).collect();
    let sockets: HashSet<_> = found.iter().map(|(_, bound)| bound.inode).collect();
    let owners = owners::of(&sockets, &question.scope);
    let mut ports = Ports::new();
    for (udp, bound) in found {
        let program = owners.programs.get(&bound.inode);
        let told = program.is_some() || question.scope == Scope::Network;
        if told && !owners.ours.contains(&bound.inode) {
            // Several may share one place (SO_REUSEPORT).
            let known = ports
                .entry((udp, bound.at.port(), bound.at.ip()))
                .or_default();
            *known = program.cloned().unwrap_or(std::mem::take(known));
        }
    }
    pack(question.number, !owners.whole, &ports)
}

/// By protocol (whether it is UDP), port and address: the program that has it, nothing where that is not known.
type Ports = BTreeMap<(bool, u16, IpAddr), Vec<u8>>;

fn pack(number: [u8; 4], more: bool, ports: &Ports) -> Vec<u8> {
    let more = more || ports.len() > MOST;
    let mut answer = [&number[..], &[if more { MORE } else { 0 }]].concat();
    for ((udp, port, ip), program) in ports.iter().take(MOST) {
        write_port(&mut answer, *udp, *port, *ip, program);
    }
    answer
}

fn write_port(answer: &mut Vec<u8>, udp: bool, port: u16, ip: IpAddr, program: &[u8]) {
    answer.push(if udp { UDP } else { TCP });
    answer.extend(port.to_be_bytes());
    match ip {
        IpAddr::V4(ip) => write_short(answer, &ip.octets()),
        IpAddr::V6(ip) => write_short(answer, &ip.octets()),
    }
    write_short(answer, program);
}

fn write_short(answer: &mut Vec<u8>, bytes: &[u8]) {
    answer.push(bytes.len() as u8);
    answer.extend(bytes);
}

#[derive(Default)]
enum State {
    #[default]
    Idle,
    Looking,
    Found(Vec<u8>),
}

/// One look at a time, and what it found.
pub struct Looker(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    bell: File,
    offer: Offer,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A look that is under way, also if it fails.
struct Look(Arc<Shared>);

impl Drop for Look {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if matches!(*state, State::Looking) {
            *state = State::Idle;
        }
    }
}

impl Looker {
    /// Without a look; of what is not offered nothing is told.
    pub fn new(offer: &Offer) -> io::Result<Self> {
        let (state, bell) = (Mutex::default(), sys::bell()?);
        let offer = offer.clone();
        Ok(Self(Arc::new(Shared { state, bell, offer })))
    }

    /// What becomes readable when a look is over.
    pub fn bell(&self) -> &File {
        &self.0.bell
    }

    /// Begins a look; nothing while one is under way, or where the question makes no sense.
    pub fn begin(&self, question: &[u8]) {
        let Some(question) = Question::parse(question) else {
            return;
        };
        {
            let mut state = self.0.state();
            if !matches!(*state, State::Idle) {
                return;
            }
            *state = State::Looking;
        }
        let this = Look(Arc::clone(&self.0));
        // Without memory for a thread the look is dropped, and is over.
        let _ = thread::Builder::new()
            .name("ports".into())
            .stack_size(STACK)
            .spawn(move || {
                let answer = look(&question, &this.0.offer);
                *this.0.state() = State::Found(answer);
                let _ = (&this.0.bell).write(&1u64.to_ne_bytes());
            });
    }

    /// The answer, once, if there is one.
    pub fn answer(&self) -> Option<Vec<u8>> {
        let mut state = self.0.state();
        match std::mem::take(&mut *state) {
            State::Found(answer) => Some(answer),
            other => {
                *state = other;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    type Port = (u8, u16, Vec<u8>, Vec<u8>);

    fn ports(answer: &[u8]) -> Vec<Port> {
        let (mut rest, mut found) = (&answer[5..], Vec::new());
        while !rest.is_empty() {
            let [proto, high, low] = take(&mut rest).unwrap();
            let mut short = || {
                let [length] = take(&mut rest).unwrap();
                let (head, tail) = rest.split_at(length.into());
                rest = tail;
                head.to_vec()
            };
            found.push((proto, u16::from_be_bytes([high, low]), short(), short()));
        }
        found
    }

    fn vectors() -> Vec<serde_json::Value> {
        let here = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors");
        let folder = std::env::var("KOHAKURIVER_VECTORS").unwrap_or(here.into());
        serde_json::from_str(&std::fs::read_to_string(format!("{folder}/ports.json")).unwrap())
            .unwrap()
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let pair = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(pair).collect()
    }

    #[test]
    fn questions_are_read_and_answers_are_built_as_the_vectors_say() {
        let mut seen = 0;
        for row in vectors() {
            let (payload, fields) = (bytes(row["hex"].as_str().unwrap()), &row["fields"]);
            let number = |field: &serde_json::Value| field.as_u64().unwrap();
            if row["what"] == "question" {
                let expected = (!fields.is_null()).then(|| Question {
                    number: (number(&fields["number"]) as u32).to_be_bytes(),
                    scope: match number(&fields["scope"]) {
                        0 => Scope::Network,
                        1 => Scope::Seen,
                        _ => Scope::Own(fields["mark"].as_str().unwrap().into()),
                    },
                });
                assert_eq!(Question::parse(&payload), expected, "{}", row["name"]);
            } else if !fields.is_null() {
                let ports = fields["ports"].as_array().unwrap().iter().map(|port| {
                    let place = (
                        number(&port["proto"]) == 1,
                        number(&port["port"]) as u16,
                        port["address"].as_str().unwrap().parse().unwrap(),
                    );
                    (place, port["program"].as_str().unwrap().into())
                });
                let asked = (number(&fields["number"]) as u32).to_be_bytes();
                let built = pack(asked, fields["more"] == true, &ports.collect());
                assert_eq!(built, payload, "{}", row["name"]);
            }
            seen += 1;
        }
        assert!(seen > 20);
    }

    #[test]
    fn what_this_process_itself_has_open_is_not_told() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let ours = [
            (TCP, tcp.local_addr().unwrap().port()),
            (UDP, udp.local_addr().unwrap().port()),
        ];
        for scope in [Scope::Network, Scope::Seen] {
            let number = [1, 2, 3, 4];
            let answer = look(&Question { number, scope }, &Offer::default());
            assert_eq!(answer[..4], number);
            let told = ports(&answer);
            assert!(told.iter().all(|port| !ours.contains(&(port.0, port.1))));
        }
    }

    #[test]
    fn a_look_answers_once_and_another_can_follow_it() {
        let looker = Looker::new(&Offer::default()).unwrap();
        looker.begin(b"nonsense");
        assert!(matches!(*looker.0.state(), State::Idle));
        for number in 0..3u8 {
            looker.begin(&[0, 0, 0, number, 0]);
            looker.begin(&[0, 0, 0, 99, 0]);
            sys::wait(&[(
                std::os::fd::AsRawFd::as_raw_fd(looker.bell()),
                sys::Wish::Read,
            )])
            .unwrap();
            let answer = looker.answer().unwrap();
            assert_eq!(answer[..4], [0, 0, 0, number]);
            assert_eq!(looker.answer(), None);
            let _ = std::io::Read::read(&mut looker.bell(), &mut [0; 8]);
        }
    }
}
