//! Host names to addresses, without the C library: linked statically, it would need the image's own, which may be missing.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::crypto::random;
use crate::wire::{Malformed, Put, Reader};

const PATIENCE: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 2;
const MOST_ALIASES: usize = 16;
const A: u16 = 1;
const CNAME: u16 = 5;
const AAAA: u16 = 28;

/// The addresses of `host`, those to try first in front. Takes as long as its name servers do.
pub fn resolve(host: &str) -> io::Result<Vec<IpAddr>> {
    let host = host.trim_end_matches('.');
    if let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(vec![address]);
    }
    if let Some(addresses) = local(host) {
        return Ok(addresses);
    }
    let settings = Settings::read(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    for name in settings.candidates(host) {
        let mut addresses = settings.ask(&name, A)?;
        addresses.extend(settings.ask(&name, AAAA).unwrap_or_default());
        if !addresses.is_empty() {
            return Ok(addresses);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("no address is known for {host}"),
    ))
}

/// The addresses that need no name server: this machine's own and those of `/etc/hosts`.
pub fn local(host: &str) -> Option<Vec<IpAddr>> {
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let known: Vec<IpAddr> = hosts
        .lines()
        .filter_map(|line| from_hosts_line(line, host))
        .collect();
    if !known.is_empty() {
        return Some(known);
    }
    host.eq_ignore_ascii_case("localhost")
        .then(|| vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()])
}

fn from_hosts_line(line: &str, host: &str) -> Option<IpAddr> {
    let mut words = line.split('#').next()?.split_ascii_whitespace();
    let address = words.next()?.parse().ok()?;
    words
        .any(|name| name.eq_ignore_ascii_case(host))
        .then_some(address)
}

/// What `/etc/resolv.conf` says (resolv.conf(5)).
struct Settings {
    servers: Vec<SocketAddr>,
    search: Vec<String>,
    dots: usize,
}

impl Settings {
    fn read(text: &str) -> Self {
        let mut settings = Self {
            servers: Vec::new(),
            search: Vec::new(),
            dots: 1,
        };
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let address = words
                        .next()
                        .and_then(|word| word.split('%').next()?.parse::<IpAddr>().ok());
                    settings
                        .servers
                        .extend(address.map(|address| SocketAddr::new(address, 53)));
                }
                Some("search" | "domain") => settings.search = words.map(str::to_owned).collect(),
                Some("options") => {
                    let dots = words.find_map(|word| word.strip_prefix("ndots:")?.parse().ok());
                    settings.dots = dots.unwrap_or(settings.dots);
                }
                _ => {}
            }
        }
        if settings.servers.is_empty() {
            settings.servers.push((Ipv4Addr::LOCALHOST, 53).into());
        }
        settings
    }

    /// The full names that `host` may stand for, in order.
    fn candidates(&self, host: &str) -> Vec<String> {
        let mut names: Vec<String> = self
            .search
            .iter()
            .map(|domain| format!("{host}.{domain}"))
            .collect();
        let dots = host.bytes().filter(|byte| *byte == b'.').count();
        let place = if dots >= self.dots { 0 } else { names.len() };
        names.insert(place, host.to_owned());
        names
    }

    /// Asks the servers in turn; an empty answer means that there is no such address.
    fn ask(&self, name: &str, kind: u16) -> io::Result<Vec<IpAddr>> {
        let mut last = io::Error::new(io::ErrorKind::TimedOut, "no name server answered");
        for server in self
            .servers
            .iter()
            .cycle()
            .take(self.servers.len() * ATTEMPTS)
        {
            match ask(*server, name, kind) {
                Ok(addresses) => return Ok(addresses),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

fn ask(server: SocketAddr, name: &str, kind: u16) -> io::Result<Vec<IpAddr>> {
    let refused = |_| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "a name server's answer is invalid",
        )
    };
    let question = question(name, kind)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "no host name"))?;
    let own: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((own, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(&question)?;
    let mut answer = [0; 4096];
    loop {
        let length = socket.recv(&mut answer)?;
        if answer[..length].starts_with(&question[..2]) {
            return addresses(&answer[..length], kind).map_err(refused);
        }
    }
}

/// RFC 1035 §4.1: a query with one question, recursion desired.
fn question(name: &str, kind: u16) -> Result<Vec<u8>, Malformed> {
    let mut message = random::<2>().to_vec();
    message.put_raw(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err(Malformed);
        }
        message.put_u8(label.len() as u8);
        message.put_raw(label.as_bytes());
    }
    message.put_u8(0);
    message.put_raw(&kind.to_be_bytes());
    message.put_raw(&[0, 1]);
    if message.len() > 12 + 255 + 4 {
        Err(Malformed)
    } else {
        Ok(message)
    }
}

/// The addresses in an answer. A server that follows aliases puts what they lead to into the same answer.
fn addresses(answer: &[u8], kind: u16) -> Result<Vec<IpAddr>, Malformed> {
    const NO_SUCH_NAME: u8 = 3;
    let mut reader = Reader::new(answer);
    reader.take(3)?;
    let code = reader.u8()? & 15;
    if code != 0 && code != NO_SUCH_NAME {
        return Err(Malformed);
    }
    let (questions, records) = (u16_of(&mut reader)?, u16_of(&mut reader)?);
    reader.take(4)?;
    for _ in 0..questions {
        skip_name(&mut reader)?;
        reader.take(4)?;
    }
    let mut found = Vec::new();
    let mut aliases = 0;
    for _ in 0..records {
        skip_name(&mut reader)?;
        let record = u16_of(&mut reader)?;
        reader.take(6)?;
        let length = u16_of(&mut reader)?;
        let data = reader.take(length.into())?;
        match record {
            A if kind == A => found.push(<[u8; 4]>::try_from(data).map_err(|_| Malformed)?.into()),
            AAAA if kind == AAAA => {
                found.push(<[u8; 16]>::try_from(data).map_err(|_| Malformed)?.into())
            }
            CNAME if aliases > MOST_ALIASES => return Err(Malformed),
            CNAME => aliases += 1,
            _ => {}
        }
    }
    Ok(found)
}

fn u16_of(reader: &mut Reader<'_>) -> Result<u16, Malformed> {
    let bytes = reader.take(2)?;
    Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
}

fn skip_name(reader: &mut Reader<'_>) -> Result<(), Malformed> {
    loop {
        match reader.u8()? {
            0 => return Ok(()),
            pointer if pointer & 0xc0 == 0xc0 => return reader.u8().map(drop),
            length if length < 64 => reader.take(length.into()).map(drop)?,
            _ => return Err(Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_name_is_searched_in_the_domains_first() {
        let settings =
            Settings::read("nameserver 10.0.0.2\nsearch a.example b.example\noptions ndots:2\n");
        assert_eq!(
            settings.candidates("db"),
            ["db.a.example", "db.b.example", "db"]
        );
        assert_eq!(settings.candidates("x.y.z")[0], "x.y.z");
        assert_eq!(settings.servers, ["10.0.0.2:53".parse().unwrap()]);
    }

    #[test]
    fn an_answer_with_an_alias_gives_the_address_behind_it() {
        let mut answer = question("www.example", A).unwrap();
        answer[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 2]);
        answer.put_raw(&[0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 2, 0xc0, 16]);
        answer.put_raw(&[0xc0, 16, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7]);
        assert_eq!(
            addresses(&answer, A),
            Ok(vec!["192.0.2.7".parse().unwrap()])
        );
        for length in 0..answer.len() {
            assert_eq!(addresses(&answer[..length], A), Err(Malformed));
        }
    }

    proptest::proptest! {
        #[test]
        fn an_answer_of_any_content_is_survived(
            mut answer in proptest::collection::vec(proptest::num::u8::ANY, 0..600),
            kind in proptest::sample::select(vec![A, AAAA]),
            claims in proptest::bool::ANY,
        ) {
            if claims && answer.len() >= 12 {
                answer[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0xff, 0xff]);
            }
            let found = addresses(&answer, kind).unwrap_or_default();
            proptest::prop_assert!(found.len() * 4 <= answer.len());
        }
    }

    #[test]
    fn a_line_of_hosts_names_all_of_its_words_but_no_comment() {
        assert_eq!(
            from_hosts_line("10.1.2.3 db DB2 # web", "db2"),
            Some("10.1.2.3".parse().unwrap())
        );
        assert_eq!(from_hosts_line("10.1.2.3 db # web", "web"), None);
    }
}
