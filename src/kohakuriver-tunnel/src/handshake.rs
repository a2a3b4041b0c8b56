//! Opening the WebSocket (RFC 6455 §4.1), without any I/O.

use std::fmt;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use tungstenite::handshake::client::{Request, Response, generate_request};
use tungstenite::handshake::derive_accept_key;
use tungstenite::handshake::machine::TryParse;
use tungstenite::http::{HeaderMap, StatusCode, Uri};

use crate::protocol::{CLIENT_HEADER, SUBPROTOCOL_V2, TASK_HEADER};
use crate::sys;

const END_OF_HEAD: &[u8] = b"\r\n\r\n";
const MAX_HEAD: usize = 64 * 1024;
/// Where a host listens whose name alone is given.
const HOST_PORT: u16 = 8000;

/// Where the runner is: `http`/`ws` URL in parts, or `unix:` and the path of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerUrl {
    host: String,
    port: u16,
    /// Without a trailing slash.
    path: String,
    socket: Option<PathBuf>,
    tls: bool,
}

/// What is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// A name or an address, and a port.
    Network(&'a str, u16),
    /// A Unix socket.
    Socket(&'a Path),
}

impl std::str::FromStr for RunnerUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        if let Some(path) = url.strip_prefix("unix:") {
            return Self::of_socket(path).ok_or_else(|| {
                format!("{url}: unix: takes the whole path of a socket, as unix:/run/runner.sock")
            });
        }
        let whole = if url.contains("://") {
            url.to_owned()
        } else {
            format!("http://{url}")
        };
        Self::whole(&whole, url, 80)
    }
}

/// Host without brackets, and port. The library takes any text for a port that is no number.
fn split(authority: &str, host: &str, usual: u16) -> Option<(String, u16)> {
    let port = match authority.strip_prefix(host)? {
        "" => usual,
        port => port.strip_prefix(':')?.parse().ok()?,
    };
    let name = match host.strip_prefix('[') {
        Some(address) => address
            .strip_suffix(']')
            .filter(|address| address.parse::<Ipv6Addr>().is_ok())?,
        None => host,
    };
    let plain = !name.is_empty() && !host[1..].contains('[');
    plain.then(|| (name.to_owned(), port))
}

impl RunnerUrl {
    /// A host's URL, or its name alone; an error is a sentence.
    pub fn of_host(url: &str) -> Result<Self, String> {
        match url.contains("://") {
            true => Self::whole(url, url, 80),
            false => Self::whole(&format!("http://{url}"), url, HOST_PORT),
        }
    }

    /// From a URL that has its scheme; `url` is what was given, `usual` the port that plain HTTP is meant to have.
    fn whole(whole: &str, url: &str, usual: u16) -> Result<Self, String> {
        let no_url = || format!("{url}: not the URL of a runner or a host");
        let uri: Uri = whole.parse().map_err(|_| no_url())?;
        let tls = match uri.scheme_str() {
            Some("http" | "ws") => false,
            Some("https" | "wss") => true,
            _ => return Err(format!("{url}: not an http or ws URL")),
        };
        let authority = uri.authority().ok_or_else(no_url)?.as_str();
        if uri.query().is_some() || url.contains('#') {
            return Err(no_url());
        }
        let usual = if tls { 443 } else { usual };
        let (host, port) = split(authority, uri.host().unwrap_or_default(), usual)
            .ok_or_else(|| format!("{url}: no host and port in it"))?;
        Ok(Self {
            host,
            port,
            path: uri.path().trim_end_matches('/').to_owned(),
            socket: None,
            tls,
        })
    }

    /// Whether it is spoken to over TLS.
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// Name or address, and port.
    pub fn network(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    fn of_socket(path: &str) -> Option<Self> {
        let named = path.starts_with('/') && !path.ends_with('/');
        named.then(|| Self {
            host: "localhost".into(),
            port: 80,
            path: String::new(),
            socket: Some(path.into()),
            tls: false,
        })
    }

    /// What leads there.
    pub fn place(&self) -> Place<'_> {
        if let Some(socket) = &self.socket {
            return Place::Socket(socket);
        }
        // An image may have no /etc/hosts.
        if self.host.eq_ignore_ascii_case("localhost") {
            return Place::Network("127.0.0.1", self.port);
        }
        Place::Network(&self.host, self.port)
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// What a host or a runner said where it refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// The HTTP status.
    pub status: u16,
    /// Which error it is, for programs; empty where it did not say.
    pub code: String,
    /// The same for people, as a sentence.
    pub sentence: String,
}

impl Said {
    /// From the body of an answer, which is JSON: two members of it are looked for, and nothing else.
    fn new(status: u16, body: &[u8]) -> Self {
        let body = String::from_utf8_lossy(body);
        Self {
            status,
            code: member(&body, "error").unwrap_or_default(),
            sentence: member(&body, "message").unwrap_or_default(),
        }
    }
}

/// The text of a member of a JSON object (RFC 8259 §7), without its control characters.
fn member(body: &str, name: &str) -> Option<String> {
    let (_, rest) = body.split_once(&format!("\"{name}\""))?;
    let rest = rest.trim_start().strip_prefix(':')?.trim_start();
    let mut rest = rest.strip_prefix('"')?.chars();
    let mut text = String::new();
    loop {
        let next = match rest.next()? {
            '"' => return Some(text),
            '\\' => match rest.next()? {
                'u' => {
                    let digits: String = rest.by_ref().take(4).collect();
                    let code = u32::from_str_radix(&digits, 16).ok()?;
                    char::from_u32(code).unwrap_or('\u{fffd}')
                }
                'n' | 'r' | 't' | 'b' | 'f' => ' ',
                plain => plain,
            },
            plain => plain,
        };
        if !next.is_control() {
            text.push(next);
        }
    }
}

/// Why there is no link.
#[derive(Debug)]
pub enum Refusal {
    /// The runner can't be reached, or doesn't speak the protocol.
    Unreachable(String),
    /// The runner doesn't take this token: 401 or 403.
    NotAllowed(Said),
    /// The runner answered with another HTTP status.
    Refused(Said),
}

impl Refusal {
    /// The HTTP status that the runner answered with, if that is why.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Unreachable(_) => None,
            Self::NotAllowed(said) | Self::Refused(said) => Some(said.status),
        }
    }

    /// What was said, where it was answered.
    pub fn said(&self) -> Option<&Said> {
        match self {
            Self::Unreachable(_) => None,
            Self::NotAllowed(said) | Self::Refused(said) => Some(said),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(reason) => out.write_str(reason),
            Self::Refused(said) if said.sentence.is_empty() => {
                write!(out, "the other side answered HTTP {}", said.status)
            }
            Self::NotAllowed(said) if said.sentence.is_empty() => {
                write!(
                    out,
                    "the other side refused this token (HTTP {})",
                    said.status
                )
            }
            Self::Refused(said) | Self::NotAllowed(said) => {
                write!(out, "{} (HTTP {})", said.sentence, said.status)
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

impl From<tungstenite::Error> for Refusal {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            tungstenite::Error::Io(error) => error.into(),
            error => wrong(format!("the runner's answer to the handshake: {error}")),
        }
    }
}

pub(crate) fn wrong(reason: impl Into<String>) -> Refusal {
    Refusal::Unreachable(reason.into())
}

/// What the runner has granted.
#[derive(Debug)]
pub struct Granted {
    /// Version 2 of the protocol.
    pub v2: bool,
    /// What a host says which task an agent is.
    pub task: Option<String>,
    /// What it sent right behind its answer.
    pub early: Vec<u8>,
}

/// One request to upgrade, and as much of its answer as has come.
pub struct Handshake {
    /// What the runner is to be sent.
    pub request: Vec<u8>,
    key: String,
    answer: Vec<u8>,
    /// Where its body begins, once its head is whole.
    body_from: usize,
}

impl Handshake {
    /// For the WebSocket at `target`, path and query, as the client of that id.
    pub fn new(
        url: &RunnerUrl,
        target: &str,
        client: &str,
        token: Option<&str>,
    ) -> Result<Self, Refusal> {
        // The library's own key needs a /dev, which an image may lack.
        let mut nonce = [0; 16];
        sys::random(&mut nonce);
        let key = BASE64.encode(&nonce);
        Ok(Self {
            request: request(url, target, client, token, &key)?,
            key,
            answer: Vec::new(),
            body_from: 0,
        })
    }

    /// Takes a piece of the answer, none at its end; what was granted, once the answer's head is whole. The library's
    /// own reading takes an answer in many small pieces, as a slow network's may come, for an attack.
    pub fn receive(&mut self, piece: &[u8]) -> Result<Option<Granted>, Refusal> {
        let whole_head = self.body_from > 0;
        if piece.is_empty() && !whole_head {
            return Err(wrong(
                "the runner ended the connection during the handshake",
            ));
        }
        let searched = self.answer.len().saturating_sub(END_OF_HEAD.len() - 1);
        self.answer.extend_from_slice(piece);
        let mut ends = self.answer[searched..].windows(END_OF_HEAD.len());
        if whole_head || ends.any(|bytes| bytes == END_OF_HEAD) {
            return self.granted(piece.is_empty());
        }
        if self.answer.len() > MAX_HEAD {
            return Err(wrong("the runner's answer to the handshake is too long"));
        }
        Ok(None)
    }

    /// What was granted; none while more of what was said instead may come.
    fn granted(&mut self, at_end: bool) -> Result<Option<Granted>, Refusal> {
        let (length, response) = Response::try_parse(&self.answer)?
            .ok_or_else(|| wrong("the runner's answer to the handshake is incomplete"))?;
        self.body_from = length;
        let body = &self.answer[length..];
        let promised = header(&response, "content-length").and_then(|length| length.parse().ok());
        let more = body.len() < promised.unwrap_or(0) && self.answer.len() < MAX_HEAD && !at_end;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS && more {
            return Ok(None);
        }
        let v2 = check(&response, &self.key, body)?;
        Ok(Some(Granted {
            v2,
            task: header(&response, TASK_HEADER).map(str::to_owned),
            early: self.answer.split_off(length),
        }))
    }
}

fn request(
    url: &RunnerUrl,
    target: &str,
    client: &str,
    token: Option<&str>,
    key: &str,
) -> Result<Vec<u8>, Refusal> {
    let authority = url.authority();
    let mut request = Request::builder()
        .uri(format!("ws://{authority}{}{target}", url.path))
        .header("Host", authority)
        .header("Upgrade", "websocket")
        .header("Connection", "Upgrade")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", key)
        .header("Sec-WebSocket-Protocol", SUBPROTOCOL_V2)
        .header(CLIENT_HEADER, client)
        .header(
            "User-Agent",
            concat!("kohakuriver-tunnel/", env!("CARGO_PKG_VERSION")),
        );
    if let Some(token) = token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    let request = request.body(()).map_err(|error| wrong(error.to_string()))?;
    Ok(generate_request(request)?.0)
}

/// Checks the answer; whether version 2 was granted. The library's own check refuses a server that
/// grants no subprotocol, as every version 1 runner, and takes any extension.
fn check(response: &Response, key: &str, body: &[u8]) -> Result<bool, Refusal> {
    match response.status() {
        StatusCode::SWITCHING_PROTOCOLS => {}
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            return Err(Refusal::NotAllowed(Said::new(status.as_u16(), body)));
        }
        status => return Err(Refusal::Refused(Said::new(status.as_u16(), body))),
    }
    let headers = response.headers();
    if !has(headers, "upgrade", "websocket") || !has(headers, "connection", "upgrade") {
        return Err(wrong("the runner didn't upgrade to a WebSocket"));
    }
    let accept = derive_accept_key(key.as_bytes());
    if headers
        .get("sec-websocket-accept")
        .is_none_or(|value| value.as_bytes() != accept.as_bytes())
    {
        return Err(wrong("the runner's Sec-WebSocket-Accept is wrong"));
    }
    if headers.contains_key("sec-websocket-extensions") {
        return Err(wrong("the runner chose an extension that wasn't offered"));
    }
    match headers.get("sec-websocket-protocol") {
        None => Ok(false),
        Some(chosen) if chosen == SUBPROTOCOL_V2 => Ok(true),
        Some(other) => Err(wrong(format!("the runner chose subprotocol {other:?}"))),
    }
}

fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

fn has(headers: &HeaderMap, name: &str, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|part| part.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tungstenite::handshake::machine::TryParse;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
    const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

    /// What is made of the bytes of an answer.
    fn check(head: &[u8], key: &str) -> Result<bool, Refusal> {
        match Response::try_parse(head)? {
            Some((_, response)) => super::check(&response, key, b""),
            None => Err(wrong("no whole answer")),
        }
    }

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
        assert_eq!(url("https://runner").unwrap().authority(), "runner:443");
        assert_eq!(url("http://runner/deep/er/").unwrap().path, "/deep/er");
        for bad in [
            "https://runner:port",
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
    fn a_url_may_be_the_path_of_a_socket() {
        let url: RunnerUrl = "unix:/run/runner.sock".parse().unwrap();
        assert_eq!(url.place(), Place::Socket(Path::new("/run/runner.sock")));
        assert_eq!(url.authority(), "localhost:80");
        for bad in ["unix:", "unix:run/runner.sock", "unix:/run/", "unix:/"] {
            let error = bad.parse::<RunnerUrl>().unwrap_err();
            assert!(error.contains("the whole path of a socket"), "{error}");
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
    fn an_answer_may_come_byte_by_byte_with_the_first_message_behind_it() {
        let url = "http://runner".parse().unwrap();
        let mut handshake = Handshake::new(&url, "/ws/tunnel/c", "1f", None).unwrap();
        let accept = format!(
            "Sec-WebSocket-Accept: {}",
            derive_accept_key(handshake.key.as_bytes())
        );
        let head = answer(&["Upgrade: websocket", "Connection: Upgrade", &accept]);
        let (last, before) = head.split_last().unwrap();
        for byte in before {
            assert!(handshake.receive(&[*byte]).unwrap().is_none());
        }
        let granted = handshake
            .receive(&[&[*last], b"early".as_slice()].concat())
            .unwrap()
            .unwrap();
        assert_eq!((granted.v2, &granted.early[..]), (false, &b"early"[..]));
    }

    #[test]
    fn an_answer_that_ends_early_or_never_is_refused() {
        let url = "http://runner".parse().unwrap();
        let handshake = || Handshake::new(&url, "/ws/tunnel/c", "1f", None).unwrap();
        assert!(handshake().receive(b"").is_err());
        let mut endless = handshake();
        assert!(endless.receive(&[b'x'; MAX_HEAD]).unwrap().is_none());
        assert!(endless.receive(b"x").is_err());
    }

    #[test]
    fn refused_credentials_are_told_from_other_failures() {
        let status = |code| check(format!("HTTP/1.1 {code} No\r\n\r\n").as_bytes(), KEY);
        assert!(matches!(status(401), Err(Refusal::NotAllowed(said)) if said.status == 401));
        assert!(matches!(status(403), Err(Refusal::NotAllowed(said)) if said.status == 403));
        assert!(matches!(status(502), Err(Refusal::Refused(said)) if said.status == 502));
    }

    #[test]
    fn what_was_said_with_a_refusal_is_told_however_it_comes() {
        let body = r#"{"error": "name_taken", "message": "There is a \"lab\"\u2026 \n already."}"#;
        let head = format!(
            "HTTP/1.1 409 Conflict\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let said = Said {
            status: 409,
            code: "name_taken".into(),
            sentence: "There is a \"lab\"\u{2026}   already.".into(),
        };
        let url = "http://runner".parse().unwrap();
        let told = |pieces: &[&[u8]]| {
            let mut handshake = Handshake::new(&url, "/", "1f", None).unwrap();
            let mut last = pieces.iter().map(|piece| handshake.receive(piece));
            last.find_map(Result::err).unwrap().said().cloned().unwrap()
        };
        let whole = format!("{head}{body}");
        assert_eq!(told(&[whole.as_bytes()]), said);
        let bytes: Vec<_> = whole.as_bytes().chunks(1).collect();
        assert_eq!(told(&bytes), said);
        let cut = told(&[head.as_bytes(), &body.as_bytes()[..20], b""]);
        assert_eq!((cut.status, &*cut.sentence), (409, ""));
    }

    #[test]
    fn a_host_is_a_url_or_a_name() {
        let network = |text: &str| {
            let url = RunnerUrl::of_host(text).unwrap();
            (url.network().0.to_owned(), url.network().1, url.is_tls())
        };
        assert_eq!(network("river"), ("river".into(), 8000, false));
        assert_eq!(network("river:9"), ("river".into(), 9, false));
        assert_eq!(network("http://river"), ("river".into(), 80, false));
        assert_eq!(network("https://river/x"), ("river".into(), 443, true));
        assert!(RunnerUrl::of_host("ftp://river").is_err());
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
                let request = request(&url, "/ws/tunnel/c", "1f", None, KEY).unwrap();
                let (length, parsed) = tungstenite::handshake::server::Request::try_parse(&request).unwrap().unwrap();
                prop_assert_eq!(length, request.len());
                prop_assert_eq!(parsed.headers().len(), 8);
            }
        }
    }
}
