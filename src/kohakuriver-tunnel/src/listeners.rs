//! Where in the container something listens, as the kernel tells it (proc(5), `/proc/net/tcp`).

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

/// Of a socket that listens.
const LISTEN: &str = "0A";
/// Of a datagram socket without a peer.
const UNCONNECTED: &str = "07";
/// A table is read no further than this many lines, and bytes.
const MOST: usize = 10_000;
const MOST_BYTES: u64 = 4 << 20;
/// Which fields of a line these are: behind the state, the queues and the timers.
const USER: usize = 7;
const INODE: usize = 9;

/// A socket that listens, or that takes datagrams from everybody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Bound {
    pub at: SocketAddr,
    /// By which `/proc/PID/fd` names it too; 0 where that is not known.
    pub inode: u64,
    /// Whose it is, as this process counts users; nobody's where that is not known.
    pub user: u32,
}

/// All of them.
pub fn all(udp: bool) -> Vec<Bound> {
    let mut found = Vec::new();
    each(udp, |at, line| found.push(bound(at, line)));
    found
}

/// The datagram sockets at an address that take them from one peer, and that peer's from all others there.
pub fn with_peers(at: SocketAddr) -> Vec<Bound> {
    let mut found = Vec::new();
    sockets(true, |socket, state, line| {
        if state != UNCONNECTED && socket == at {
            found.push(bound(socket, line));
        }
        true
    });
    found
}

fn bound(at: SocketAddr, line: &str) -> Bound {
    Bound {
        at,
        inode: field(line, INODE).unwrap_or(0),
        user: field(line, USER).unwrap_or(u32::MAX),
    }
}

/// The addresses but 127.0.0.1 and ::1 on which something listens on `port`; none where there is no `/proc`.
pub fn on(udp: bool, port: u16) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    each(udp, |at, _| {
        if at.port() == port && is_other(at.ip()) {
            found.push(with_scope(at));
        }
    });
    found
}

/// Where something listens, with its line of the kernel's table.
fn each(udp: bool, mut take: impl FnMut(SocketAddr, &str)) {
    let wanted = if udp { UNCONNECTED } else { LISTEN };
    sockets(udp, |at, state, line| {
        if state == wanted {
            take(at, line);
        }
        // Those that listen come first among TCP's sockets.
        udp || state == wanted
    });
}

/// Local address, state and line of each socket of a table, as long as `take` wants more of it.
fn sockets(udp: bool, mut take: impl FnMut(SocketAddr, &str, &str) -> bool) {
    let files = if udp {
        ["/proc/net/udp", "/proc/net/udp6"]
    } else {
        ["/proc/net/tcp", "/proc/net/tcp6"]
    };
    for file in files {
        let Ok(file) = File::open(file) else { continue };
        let lines = BufReader::new(file.take(MOST_BYTES)).lines();
        for line in lines.map_while(Result::ok).skip(1).take(MOST) {
            if let Some((at, state)) = socket(&line)
                && !take(at, state, &line)
            {
                break;
            }
        }
    }
}

/// Not one of those that are tried in any case.
fn is_other(ip: IpAddr) -> bool {
    let loopback = ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST;
    !loopback && !ip.is_unspecified() && !ip.is_multicast()
}

/// Local address and state: `0: 0100007F:1F90 00000000:0000 0A …`.
fn socket(line: &str) -> Option<(SocketAddr, &str)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    let state = fields.nth(1)?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((SocketAddr::new(ip(address)?, port), state))
}

fn field<T: FromStr>(line: &str, at: usize) -> Option<T> {
    line.split_ascii_whitespace().nth(at)?.parse().ok()
}

/// Words of 32 bits in the machine's own order.
fn ip(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    if hex.len() == 8 {
        return word(0).map(|bytes| Ipv4Addr::from(bytes).into());
    }
    let mut bytes = [0; 16];
    for (part, at) in bytes.chunks_mut(4).zip((0..32).step_by(8)) {
        part.copy_from_slice(&word(at)?);
    }
    let ip = Ipv6Addr::from(bytes);
    Some(ip.to_ipv4_mapped().map_or(ip.into(), IpAddr::from))
}

/// A link-local address means something on its interface only (`/proc/net/if_inet6`).
fn with_scope(address: SocketAddr) -> SocketAddr {
    let IpAddr::V6(ip) = address.ip() else {
        return address;
    };
    if !ip.is_unicast_link_local() {
        return address;
    }
    let wanted: String = ip
        .octets()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let table = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    let index = table
        .lines()
        .map(|line| line.split_ascii_whitespace())
        .find_map(|mut fields| (fields.next()? == wanted).then(|| fields.next()))
        .flatten();
    let scope = index.and_then(|index| u32::from_str_radix(index, 16).ok());
    SocketAddrV6::new(ip, address.port(), 0, scope.unwrap_or(0)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn a_line_of_the_kernels_tables_is_an_address_and_a_state() {
        let line =
            "   0: 050011AC:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1 1";
        assert_eq!(
            socket(line),
            Some(("172.17.0.5:8080".parse().unwrap(), "0A"))
        );
        let line = "   1: 000080FE00000000FF005450B6FE0102:0016 00000000000000000000000000000000:0000 0A 0";
        assert_eq!(
            socket(line),
            Some(("[fe80::5054:ff:201:feb6]:22".parse().unwrap(), "0A"))
        );
        for (hex, expected) in [
            ("00000000000000000000000000000000", "[::]:80"),
            ("00000000000000000000000001000000", "[::1]:80"),
            ("0000000000000000FFFF00000100007F", "127.0.0.1:80"),
            ("B80D0120000000000000000001000000", "[2001:db8::1]:80"),
        ] {
            let line = format!("0: {hex}:0050 {hex}:0000 0A");
            assert_eq!(socket(&line), Some((expected.parse().unwrap(), "0A")));
        }
    }

    #[test]
    fn what_is_no_line_of_the_kernels_tables_is_no_socket() {
        for line in [
            "",
            "garbage",
            "0: XY:1 0 0A",
            "0: 0100007F 0 0A",
            "0: 0100007F:FFFFF 00000000:0000 0A",
            "0: 0100:0050 00000000:0000 0A",
            "0: 0100007F:0050",
            "0: \u{20ac}\u{20ac}\u{20ac}:0050 0 0A",
        ] {
            assert_eq!(socket(line), None, "{line:?}");
        }
        let inode = |line| field::<u64>(line, INODE);
        assert_eq!(inode("0: 0100007F:0050 0 0A 0 0 0 0 0 x"), None);
        assert_eq!(inode("0: 0100007F:0050 0 0A"), None);
    }

    #[test]
    fn a_listener_is_known_by_the_inode_that_its_descriptor_has_and_by_its_user() {
        use std::os::fd::AsRawFd;
        let listener = std::net::TcpListener::bind("[::1]:0").unwrap();
        let at = listener.local_addr().unwrap();
        let link = std::fs::read_link(format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap();
        let bound = all(false).into_iter().find(|bound| bound.at == at).unwrap();
        assert_eq!(link.to_str(), Some(&*format!("socket:[{}]", bound.inode)));
        assert_eq!(bound.user, crate::sys::user());
    }

    #[test]
    fn a_datagram_socket_with_a_peer_is_no_listener_and_is_found_by_its_own_address() {
        let peer = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let sock = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        sock.connect(peer.local_addr().unwrap()).unwrap();
        let at = sock.local_addr().unwrap();
        assert!(at.ip() == Ipv4Addr::LOCALHOST, "connecting binds it");
        let found = with_peers(at);
        assert!(found.len() == 1 && found[0].user == crate::sys::user());
        assert!(!all(true).contains(&found[0]));
        assert_eq!(with_peers(peer.local_addr().unwrap()), []);
    }

    #[test]
    fn a_listener_on_another_address_is_found_for_both_protocols() {
        let tcp = std::net::TcpListener::bind("127.0.0.77:0").unwrap();
        let at = tcp.local_addr().unwrap();
        assert_eq!(on(false, at.port()), [at]);
        let udp = std::net::UdpSocket::bind("127.0.0.78:0").unwrap();
        let at = udp.local_addr().unwrap();
        assert_eq!(on(true, at.port()), [at]);
    }
}
