//! Which of the ports that listen here are carried (`--offer`). Where several users share a machine, loopback is shared
//! too: a port there may be somebody else's, who waits for what was meant for this user's service.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

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
        self.check_at(udp, to, || is_here(Ipv6Addr::LOCALHOST.into()))
    }

    fn check_at(&self, udp: bool, to: SocketAddr, v6: impl Fn() -> bool) -> io::Result<u64> {
        if self.all || self.ports.contains(&to.port()) {
            return Ok(0);
        }
        let at = Place { udp, to, v6: v6() };
        let mut takers = at.takers(&listeners::all(udp));
        let first = takers.iter().map(|bound| bound.inode).min();
        if udp {
            // One with a peer comes before all without; its peer may be the socket that asks here.
            takers.extend(listeners::with_peers(to));
        }
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
        self.check_at(false, to, || false)
    }

    /// Whether a Unix socket of a `user` may be connected to. The administrator's is nobody's trap.
    pub fn check_owner(&self, user: u32, path: &Path) -> io::Result<()> {
        if self.all || self.own.is_some_and(|own| user == own || user == 0) {
            return Ok(());
        }
        let path = path.display();
        let why = match self.own {
            Some(_) => "is another user's on this shared node, so it is not offered",
            None => "is not offered here: Unix sockets are with `own` or `all`",
        };
        Err(refused(format!("EACCES: what listens on {path} {why}")))
    }

    fn refusal(&self, port: u16) -> io::Error {
        let text = if self.own.is_some() {
            format!(
                "EACCES: what listens on port {port} is another user's on this shared node, so it is not offered"
            )
        } else {
            format!("EACCES: port {port} is not among those that are offered here")
        };
        refused(text)
    }
}

fn refused(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, Told(text))
}

/// Whether an error is [`Offer::check`]'s refusal, and not the system's.
pub fn is_refusal(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied && error.raw_os_error().is_none()
}

/// Where a connection goes, or a datagram.
struct Place {
    udp: bool,
    to: SocketAddr,
    /// Whether ::1 is dialled, too, where nothing takes this.
    v6: bool,
}

impl Place {
    /// The listeners that the kernel chooses from: the address itself stands above those that take any.
    fn takers(&self, all: &[Bound]) -> Vec<Bound> {
        let any4: IpAddr = Ipv4Addr::UNSPECIFIED.into();
        let any6: IpAddr = Ipv6Addr::UNSPECIFIED.into();
        let places = match self.to.ip() {
            to @ IpAddr::V6(_) => vec![vec![to], vec![any6]],
            // Of datagram sockets one of IPv6 that takes both may stand above IPv4's own (SO_INCOMING_CPU).
            to if self.udp => vec![vec![to], vec![any4, any6]],
            to => vec![vec![to], vec![any4], vec![any6]],
        };
        let of = |ips: Vec<IpAddr>| -> Vec<Bound> {
            let there =
                |bound: &&Bound| bound.at.port() == self.to.port() && ips.contains(&bound.at.ip());
            all.iter().filter(there).copied().collect()
        };
        let mut found = places.into_iter().map(of);
        let found = found.find(|those| !those.is_empty()).unwrap_or_default();
        // Whether one of IPv6 takes IPv4 at all nobody tells: where it can be reached at ::1 it is left to that.
        let v4 = found.iter().any(|bound| bound.at.is_ipv4());
        if self.to.is_ipv4() && self.v6 && !v4 {
            return Vec::new();
        }
        found
    }
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
    fn on_a_shared_machine_sockets_of_ones_own_and_of_roots_are_reached_and_no_others() {
        let (own, path) = (sys::user(), Path::new("/run/x.sock"));
        let other = own + 1;
        assert!(Offer::default().check_owner(other, path).is_ok());
        let offer = Offer::parse("own").unwrap();
        assert!(offer.check_owner(own, path).is_ok() && offer.check_owner(0, path).is_ok());
        let refused = offer.check_owner(other, path).unwrap_err();
        assert!(
            is_refusal(&refused)
                && refused
                    .to_string()
                    .starts_with("EACCES: what listens on /run/x.sock")
        );
        assert!(Offer::parse("80").unwrap().check_owner(own, path).is_err());
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

    const LISTENING: [&str; 6] = [
        "127.0.0.1:1",
        "0.0.0.0:1",
        "[::]:1",
        "[::1]:2",
        "[::]:2",
        "0.0.0.0:3",
    ];

    fn taken(udp: bool, to: &str, v6: bool) -> Vec<String> {
        let all = LISTENING.map(|at| bound(at, 0));
        let to = to.parse().unwrap();
        let found = Place { udp, to, v6 }.takers(&all);
        found.iter().map(|bound| bound.at.to_string()).collect()
    }

    #[test]
    fn a_connection_is_taken_by_the_listener_that_the_kernel_prefers() {
        for (to, by) in [
            ("127.0.0.1:1", Some("127.0.0.1:1")),
            ("127.0.0.2:1", Some("0.0.0.0:1")),
            ("[::1]:1", Some("[::]:1")),
            ("[::1]:2", Some("[::1]:2")),
            ("[::1]:3", None),
            ("127.0.0.1:4", None),
        ] {
            assert_eq!(taken(false, to, true), Vec::from_iter(by), "{to}");
        }
    }

    #[test]
    fn a_listener_of_ipv6_takes_no_ipv4_for_certain_and_counts_only_where_there_is_no_other_way_to_it()
     {
        for udp in [false, true] {
            assert_eq!(taken(udp, "127.0.0.1:2", true), Vec::<String>::new());
            assert_eq!(taken(udp, "127.0.0.1:2", false), ["[::]:2"]);
        }
    }

    #[test]
    fn a_datagram_socket_that_takes_both_may_stand_before_ipv4s_own() {
        for v6 in [false, true] {
            assert_eq!(taken(true, "127.0.0.2:1", v6), ["0.0.0.0:1", "[::]:1"]);
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

    #[test]
    fn a_forward_goes_on_to_a_service_of_ipv6_that_takes_ipv4_where_nobody_else_does() {
        let both = TcpListener::bind("[::]:0").unwrap();
        let at = (Ipv4Addr::LOCALHOST, both.local_addr().unwrap().port()).into();
        let own = Offer::parse("own").unwrap();
        assert!(own.check_if_here(at).is_ok());
        let here = own.check(false, at).unwrap_err();
        assert_eq!(here.raw_os_error(), Some(libc::ECONNREFUSED));
    }
}
