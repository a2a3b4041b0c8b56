//! Where in the container something listens, as the kernel tells it (proc(5), `/proc/net/tcp`).

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Of a socket that listens.
const LISTEN: &str = "0A";
/// Of a datagram socket without a peer.
const UNCONNECTED: &str = "07";
/// A table is read no further than this many lines.
const MOST: usize = 10_000;

/// The addresses but 127.0.0.1 and ::1 on which something listens on `port`; none where there is no `/proc`.
pub fn on(udp: bool, port: u16) -> Vec<SocketAddr> {
    let (files, state) = if udp {
        (["/proc/net/udp", "/proc/net/udp6"], UNCONNECTED)
    } else {
        (["/proc/net/tcp", "/proc/net/tcp6"], LISTEN)
    };
    let mut found = Vec::new();
    for file in files {
        let Ok(file) = File::open(file) else { continue };
        let lines = BufReader::new(file).lines().map_while(Result::ok);
        let mut lines = lines.skip(1).take(MOST);
        while let Some(line) = lines.next()
            // Those that listen come first among TCP's sockets.
            && let Some((address, its)) = socket(&line)
            && (udp || its == state)
        {
            if address.port() == port && its == state && is_other(address.ip()) {
                found.push(with_scope(address));
            }
        }
    }
    found
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
        assert_eq!(socket("garbage"), None);
        assert_eq!(socket("0: XY:1 0 0A"), None);
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
