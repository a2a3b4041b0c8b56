//! Opening the WebSocket (RFC 6455 §4.1), blocking: without a link there is nothing else to do.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::protocol::SUBPROTOCOL_V2;
use crate::sys;

const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 64;
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Where the runner is: `http`/`ws` URL in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerUrl {
    host: String,
    port: u16,
    /// Without a trailing slash.
    path: String,
}

impl std::str::FromStr for RunnerUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        match scheme.to_ascii_lowercase().as_str() {
            "http" | "ws" => {}
            "https" | "wss" => {
                return Err(format!("{url}: this tunnel client is built without TLS"));
            }
            _ => return Err(format!("{url}: not an http or ws URL")),
        }
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let path = path.trim_end_matches('/').to_owned();
        let (host, port) =
            split_authority(authority).ok_or(format!("{url}: no host and port in it"))?;
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || !plain(authority) || !plain(&path) || path.contains(['?', '#']) {
            return Err(format!("{url}: not the URL of a runner"));
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            path,
        })
    }
}

fn split_authority(authority: &str) -> Option<(&str, u16)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    match port {
        "" => Some((host, 80)),
        port => Some((host, port.strip_prefix(':')?.parse().ok()?)),
    }
}

impl RunnerUrl {
    fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        // An image may have no /etc/hosts.
        if self.host.eq_ignore_ascii_case("localhost") {
            return Ok(vec![(Ipv4Addr::LOCALHOST, self.port).into()]);
        }
        Ok((self.host.as_str(), self.port).to_socket_addrs()?.collect())
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// Why there is no link.
#[derive(Debug)]
pub enum Refusal {
    /// The runner can't be reached, or doesn't speak the protocol.
    Unreachable(String),
    /// The runner doesn't take this token: 401 or 403.
    NotAllowed(u16),
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(reason) => out.write_str(reason),
            Self::NotAllowed(status) => {
                write!(
                    out,
                    "the runner refused this container's token (HTTP {status})"
                )
            }
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Self::Unreachable("the runner didn't answer in time".into())
            }
            _ => Self::Unreachable(error.to_string()),
        }
    }
}

fn wrong(reason: impl Into<String>) -> Refusal {
    Refusal::Unreachable(reason.into())
}

/// A WebSocket that is open.
pub struct Opened {
    /// Connected and blocking.
    pub sock: TcpStream,
    /// What the runner sent right behind its answer.
    pub early: Vec<u8>,
    /// Whether version 2 was granted.
    pub v2: bool,
}

/// Connects and upgrades to the tunnel of `container`.
pub fn open(url: &RunnerUrl, container: &str, token: Option<&str>) -> Result<Opened, Refusal> {
    let deadline = Instant::now() + TIMEOUT;
    let mut sock = dial(url, deadline)?;
    sock.set_nodelay(true)?;
    sock.set_write_timeout(Some(TIMEOUT))?;
    let mut nonce = [0; 16];
    sys::random(&mut nonce);
    let key = BASE64.encode(nonce);
    sock.write_all(request(url, container, token, &key).as_bytes())?;
    let (head, early) = read_head(&mut sock, deadline)?;
    let v2 = check(&head, &key)?;
    Ok(Opened { sock, early, v2 })
}

fn dial(url: &RunnerUrl, deadline: Instant) -> Result<TcpStream, Refusal> {
    let mut last = wrong(format!("{} has no address", url.host));
    for address in url
        .resolve()
        .map_err(|error| wrong(format!("{}: {error}", url.host)))?
    {
        match TcpStream::connect_timeout(&address, left(deadline)?) {
            Ok(sock) => return Ok(sock),
            Err(error) => last = wrong(format!("{address}: {error}")),
        }
    }
    Err(last)
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}

fn request(url: &RunnerUrl, container: &str, token: Option<&str>, key: &str) -> String {
    let credential = token.map_or(String::new(), |token| {
        format!("Authorization: Bearer {token}\r\n")
    });
    format!(
        "GET {path}/ws/tunnel/{container} HTTP/1.1\r\n\
         Host: {host}\r\n\
         Upgrade: websocket\r\n\
         Connection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: {key}\r\n\
         Sec-WebSocket-Protocol: {SUBPROTOCOL_V2}\r\n\
         User-Agent: kohakuriver-tunnel/{version}\r\n\
         {credential}\r\n",
        path = url.path,
        host = url.authority(),
        version = env!("CARGO_PKG_VERSION"),
    )
}

/// Reads up to the empty line; the head, and what came behind it.
fn read_head(sock: &mut TcpStream, deadline: Instant) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        sock.set_read_timeout(Some(left(deadline)?))?;
        let length = sock.read(&mut buffer)?;
        if length == 0 {
            return Err(wrong(
                "the runner ended the connection during the handshake",
            ));
        }
        let searched = head.len().saturating_sub(3);
        head.extend_from_slice(&buffer[..length]);
        if let Some(end) = head[searched..]
            .windows(4)
            .position(|bytes| bytes == b"\r\n\r\n")
        {
            let early = head.split_off(searched + end + 4);
            return Ok((head, early));
        }
        if head.len() > MAX_HEAD {
            return Err(wrong("the runner's answer to the handshake is too long"));
        }
    }
}

/// Checks the answer; whether version 2 was granted.
fn check(head: &[u8], key: &str) -> Result<bool, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response
        .parse(head)
        .map_err(|error| wrong(format!("the runner doesn't speak HTTP: {error}")))?;
    let status = response
        .code
        .filter(|_| parsed.is_complete())
        .ok_or(wrong("no whole HTTP answer"))?;
    match status {
        101 => {}
        401 | 403 => return Err(Refusal::NotAllowed(status)),
        status => return Err(wrong(format!("the runner answered HTTP {status}"))),
    }
    let mut values = Vec::new();
    for header in response.headers.iter() {
        let value = str::from_utf8(header.value)
            .map_err(|_| wrong("a header isn't text"))?
            .trim();
        values.push((header.name.to_ascii_lowercase(), value));
    }
    let get = |name: &str| {
        values
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| *value)
    };
    let has = |name, token: &str| {
        get(name).is_some_and(|value| {
            value
                .split(',')
                .any(|part| part.trim().eq_ignore_ascii_case(token))
        })
    };
    if !has("upgrade", "websocket") || !has("connection", "upgrade") {
        return Err(wrong("the runner didn't upgrade to a WebSocket"));
    }
    if get("sec-websocket-accept") != Some(&accept(key)) {
        return Err(wrong("the runner's Sec-WebSocket-Accept is wrong"));
    }
    if get("sec-websocket-extensions").is_some() {
        return Err(wrong("the runner chose an extension that wasn't offered"));
    }
    match get("sec-websocket-protocol") {
        None => Ok(false),
        Some(SUBPROTOCOL_V2) => Ok(true),
        Some(other) => Err(wrong(format!("the runner chose subprotocol {other:?}"))),
    }
}

fn accept(key: &str) -> String {
    let mut sha1 = sha1_smol::Sha1::new();
    sha1.update(key.as_bytes());
    sha1.update(GUID);
    BASE64.encode(sha1.digest().bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
    const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

    fn answer(lines: &[&str]) -> Vec<u8> {
        format!(
            "HTTP/1.1 101 Switching Protocols\r\n{}\r\n\r\n",
            lines.join("\r\n")
        )
        .into_bytes()
    }

    #[test]
    fn a_url_is_taken_apart() {
        let url = |text: &str| text.parse::<RunnerUrl>();
        assert_eq!(
            url("http://10.0.0.1:8001/").unwrap().authority(),
            "10.0.0.1:8001"
        );
        assert_eq!(
            url("ws://[fd00::1]:8001").unwrap().authority(),
            "[fd00::1]:8001"
        );
        assert_eq!(url("runner").unwrap().authority(), "runner:80");
        assert_eq!(url("http://runner/deep/er/").unwrap().path, "/deep/er");
        for bad in [
            "https://runner",
            "ftp://runner",
            "http://",
            "http://r:port",
            "http://r\r\nX: y",
            "http://r/?q",
        ] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_version_is_what_the_runner_grants() {
        let accept = format!("Sec-WebSocket-Accept: {ACCEPT}");
        let base = [
            "Upgrade: WebSocket",
            "Connection: keep-alive, Upgrade",
            accept.as_str(),
        ];
        assert!(!check(&answer(&base), KEY).unwrap());
        let with = |more| answer(&[&base[..], &[more]].concat());
        assert!(check(&with("Sec-WebSocket-Protocol: kohakuriver.tunnel.v2"), KEY).unwrap());
        assert!(check(&with("Sec-WebSocket-Protocol: kohakuriver.tunnel.v9"), KEY).is_err());
        assert!(check(&with("Sec-WebSocket-Extensions: permessage-deflate"), KEY).is_err());
        assert!(check(&answer(&base), "another key").is_err());
        assert!(check(&answer(&base[1..]), KEY).is_err());
    }

    #[test]
    fn refused_credentials_are_told_from_other_failures() {
        let status = |code| check(format!("HTTP/1.1 {code} No\r\n\r\n").as_bytes(), KEY);
        assert!(matches!(status(401), Err(Refusal::NotAllowed(401))));
        assert!(matches!(status(403), Err(Refusal::NotAllowed(403))));
        assert!(matches!(status(502), Err(Refusal::Unreachable(_))));
    }

    proptest! {
        #[test]
        fn bytes_that_are_no_answer_are_refused(head in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(check(&head, KEY).is_err());
        }

        #[test]
        fn no_broken_answer_is_taken_for_another_keys_or_panics(
            wrong in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..5),
            order in Just(vec![0, 1, 2, 3]).prop_shuffle(),
        ) {
            let accept = format!("Sec-WebSocket-Accept: {ACCEPT}");
            let lines = [
                "Upgrade: websocket",
                "Connection: Upgrade",
                &accept,
                "Sec-WebSocket-Protocol: kohakuriver.tunnel.v2",
            ];
            let good = answer(&order.iter().map(|&index| lines[index]).collect::<Vec<_>>());
            prop_assert!(check(&good, KEY).unwrap());
            prop_assert!(check(&good, "another key").is_err());
            let mut broken = good;
            for (at, byte, how) in wrong {
                let at = at.index(broken.len());
                match how {
                    0 => broken[at] = byte,
                    1 => broken.insert(at, byte),
                    _ => drop(broken.remove(at)),
                }
            }
            prop_assert!(check(&broken, "another key").is_err());
            if let Err(Refusal::Unreachable(reason)) = check(&broken, KEY) {
                prop_assert!(!reason.is_empty());
            }
        }

        #[test]
        fn what_is_taken_for_a_url_fits_into_a_request(text in "\\PC{0,40}|(http|ws)://[a-z.:\\[\\]0-9/]{0,30}") {
            if let Ok(url) = text.parse::<RunnerUrl>() {
                let request = request(&url, "c", None, KEY);
                let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
                let mut parsed = httparse::Request::new(&mut headers);
                prop_assert!(parsed.parse(request.as_bytes()).unwrap().is_complete());
                prop_assert_eq!(parsed.headers.len(), 7);
            }
        }
    }
}
