//! Which of the ports that listen here are carried (`--offer`). Where several users share a machine, loopback is shared
//! too: a port there may be somebody else's, who waits for what was meant for this user's service.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::errors::Told;
use crate::listeners::{self, Bound};
use crate::sys;

/// The ports that are carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    all: bool,
    /// What this user's own processes listen on.
    own: Option<u32>,
    /// Whosever they are.
    ports: BTreeSet<u16>,
}

impl Default for Offer {
    fn default() -> Self {
        Self {
            all: true,
            own: None,
            ports: BTreeSet::new(),
        }
    }
}

impl Offer {
    /// Reads `all`, or `own` and ports with commas between them; an error is one sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut offer = Self {
            all: false,
            own: None,
            ports: BTreeSet::new(),
        };
        for word in text.split(',').map(str::trim) {
            match word {
                "all" => offer.all = true,
                "own" => offer.own = Some(sys::user()),
                _ => {
                    let port = word.parse().ok().filter(|port| *port > 0);
                    let port = port.ok_or_else(|| {
                        format!("what is offered is all, own or ports with commas, not {text:?}")
                    })?;
                    offer.ports.insert(port);
                }
            }
        }
        Ok(offer)
    }

    /// Whether a listener is told of.
    pub fn shows(&self, bound: &Bound) -> bool {
        self.all || self.ports.contains(&bound.at.port()) || self.own == Some(bound.user)
    }

    /// Whether a connection to `to` may be made. The number stays the same as long as the same socket listens there: who
    /// asks before and behind the connection knows that it is not of another one. An error is one with a text for the
    /// user, or `ECONNREFUSED` where nothing listens.
    pub fn check(&self, udp: bool, to: SocketAddr) -> io::Result<u64> {
        if self.all || self.ports.contains(&to.port()) {
            return Ok(0);
        }
        let takers = takers(listeners::all(udp), to);
        let first = takers.iter().map(|bound| bound.inode).min();
        match first {
            Some(first) if takers.iter().all(|bound| self.shows(bound)) => Ok(first),
            None if self.own.is_some() => Err(io::Error::from_raw_os_error(libc::ECONNREFUSED)),
            _ => Err(self.refusal(to.port())),
        }
    }

    /// The same for an address that was found by a name. Other machines' ports are not ours to refuse.
    pub fn check_if_here(&self, to: SocketAddr) -> io::Result<u64> {
        if self.all || !is_here(to.ip()) {
            return Ok(0);
        }
        self.check(false, to)
    }

    fn refusal(&self, port: u16) -> io::Error {
        let text = if self.own.is_some() {
            format!(
                "EACCES: what listens on port {port} is another user's on this shared node, so it is not offered"
            )
        } else {
            format!("EACCES: port {port} is not among those that are offered here")
        };
        io::Error::new(io::ErrorKind::PermissionDenied, Told(text))
    }
}

/// Whether an error is [`Offer::check`]'s refusal, and not the system's.
pub fn is_refusal(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied && error.raw_os_error().is_none()
}

/// The listeners that the kernel chooses from for a connection to `to`: the address itself stands above those that take
/// any, and IPv4's own above one of IPv6 that takes both.
fn takers(all: Vec<Bound>, to: SocketAddr) -> Vec<Bound> {
    let any4: IpAddr = Ipv4Addr::UNSPECIFIED.into();
    let any6: IpAddr = Ipv6Addr::UNSPECIFIED.into();
    let places = match to.ip() {
        IpAddr::V4(_) => vec![to.ip(), any4, any6],
        IpAddr::V6(_) => vec![to.ip(), any6],
    };
    let of = |ip: IpAddr| -> Vec<Bound> {
        let there = |bound: &&Bound| bound.at.port() == to.port() && bound.at.ip() == ip;
        all.iter().filter(there).copied().collect()
    };
    let mut found = places.into_iter().map(of);
    found.find(|those| !those.is_empty()).unwrap_or_default()
}

/// Whether an address is this machine's.
fn is_here(ip: IpAddr) -> bool {
    std::net::UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn bound(at: &str, user: u32) -> Bound {
        let at = at.parse().unwrap();
        Bound { at, inode: 7, user }
    }

    #[test]
    fn all_own_and_ports_are_what_can_be_offered() {
        assert_eq!(Offer::parse("all").unwrap(), Offer::default());
        let offer = Offer::parse("own, 80,443").unwrap();
        assert!(offer.own == Some(sys::user()) && !offer.all);
        assert_eq!(Vec::from_iter(offer.ports), [80, 443]);
        for wrong in ["", "none", "0", "65536", "own,", "80-90", "-1"] {
            let error = Offer::parse(wrong).unwrap_err();
            assert!(error.contains(&format!("{wrong:?}")), "{error}");
        }
    }

    #[test]
    fn a_listener_of_another_user_is_shown_only_where_its_port_is_named() {
        let (mine, other) = (sys::user(), sys::user() + 1);
        let own = Offer::parse("own,99").unwrap();
        assert!(own.shows(&bound("127.0.0.1:80", mine)));
        assert!(!own.shows(&bound("127.0.0.1:80", other)));
        assert!(own.shows(&bound("127.0.0.1:99", other)));
        assert!(Offer::default().shows(&bound("127.0.0.1:80", other)));
        assert!(!Offer::parse("99").unwrap().shows(&bound("[::]:80", mine)));
    }

    #[test]
    fn a_connection_is_taken_by_the_listener_that_the_kernel_prefers() {
        let all = [
            "127.0.0.1:1",
            "0.0.0.0:1",
            "[::]:1",
            "[::1]:2",
            "[::]:2",
            "0.0.0.0:3",
        ];
        for (to, by) in [
            ("127.0.0.1:1", Some("127.0.0.1:1")),
            ("127.0.0.2:1", Some("0.0.0.0:1")),
            ("[::1]:1", Some("[::]:1")),
            ("127.0.0.1:2", Some("[::]:2")),
            ("[::1]:2", Some("[::1]:2")),
            ("[::1]:3", None),
            ("127.0.0.1:4", None),
        ] {
            let those = all.iter().map(|at| bound(at, 0)).collect();
            let found = takers(those, to.parse().unwrap());
            let found: Vec<_> = found.iter().map(|bound| bound.at).collect();
            let by: Vec<SocketAddr> = by.iter().map(|by| by.parse().unwrap()).collect();
            assert_eq!(found, by, "{to}");
        }
    }

    #[test]
    fn own_services_are_let_through_and_known_again() {
        let own = Offer::parse("own").unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = tcp.local_addr().unwrap();
        let number = own.check(false, at).unwrap();
        assert!(number != 0);
        assert_eq!(own.check(false, at).unwrap(), number);
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(own.check(true, udp.local_addr().unwrap()).is_ok());
        drop(tcp);
        let gone = own.check(false, at).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ECONNREFUSED));
    }

    #[test]
    fn a_port_that_is_not_named_is_refused_without_a_look_at_who_listens() {
        let named = Offer::parse("80").unwrap();
        assert!(named.check(false, "127.0.0.1:80".parse().unwrap()).is_ok());
        let error = named
            .check(false, "127.0.0.1:81".parse().unwrap())
            .unwrap_err();
        assert!(is_refusal(&error) && error.to_string().starts_with("EACCES: port 81 "));
    }

    #[test]
    fn only_addresses_of_this_machine_are_looked_at_when_a_forward_goes_on() {
        let named = Offer::parse("80").unwrap();
        let elsewhere = "192.0.2.7:81".parse().unwrap();
        assert!(named.check_if_here(elsewhere).is_ok());
        let here = "127.0.0.1:81".parse().unwrap();
        assert!(is_refusal(&named.check_if_here(here).unwrap_err()));
    }
}
