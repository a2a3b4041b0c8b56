//! The way from an agent out to its host: over TLS, through an HTTP proxy, or through a login node's `ssh`.
//!
//! TLS is spoken by a thread of its own, to which the event loop has one of a pair of sockets: it knows sockets alone, and
//! an agent has one such link.

use std::env;
use std::fmt;
use std::fs;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::pin;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use data_encoding::BASE64;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::time;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

use crate::dial::{OPENING, dial};
use crate::handshake::{Refusal, RunnerUrl, wrong};
use crate::sys::Change;
use crate::{children, init};

/// After our last byte the host's are waited for so long.
const LAST_BYTES: Duration = Duration::from_secs(2);
/// Of an HTTP proxy's answer.
const MAX_HEAD: usize = 16 << 10;
const PIECE: usize = 64 << 10;

/// A connection to a host, as the event loop takes it.
pub enum Out {
    #[allow(missing_docs)]
    Tcp(TcpStream),
    /// One of a pair of sockets.
    Pair(tokio::net::UnixStream),
}

/// What an agent's connections to its hosts go through, and those to a runner over TLS.
#[derive(Default)]
pub struct Outwards {
    tls: Option<Arc<ClientConfig>>,
    via: Option<String>,
    straight: bool,
    pump: Mutex<Option<mpsc::Receiver<()>>>,
}

impl fmt::Debug for Outwards {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "Outwards(tls: {}, via: {:?})",
            self.tls.is_some(),
            self.via
        )
    }
}

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// A socket that another thread's event loop takes over.
enum Base {
    Tcp(std::net::TcpStream),
    Pair(UnixStream),
}

impl Base {
    fn here(self) -> io::Result<Box<dyn Bytes>> {
        Ok(match self {
            Self::Tcp(sock) => Box::new(TcpStream::from_std(sock)?),
            Self::Pair(sock) => Box::new(tokio::net::UnixStream::from_std(sock)?),
        })
    }
}

impl Outwards {
    /// Through `via`, a login node, if that is named. With `tls` hosts are checked by the authorities in `ca_file`, or
    /// the system's. An error is one sentence.
    pub fn new(tls: bool, ca_file: Option<&Path>, via: Option<String>) -> Result<Self, String> {
        let authorities = match ca_file {
            Some(path) => Authorities::File(path),
            None => Authorities::System,
        };
        Ok(Self {
            tls: tls.then(|| trusting(authorities)).transpose()?,
            via,
            straight: false,
            pump: Mutex::default(),
        })
    }

    /// Over TLS to a runner, by the authorities in `pem`, or the system's. No proxy stands before a runner.
    pub fn to_runner(pem: Option<&str>) -> Result<Self, String> {
        let authorities = pem.map_or(Authorities::System, Authorities::Text);
        Ok(Self {
            tls: Some(trusting(authorities)?),
            via: None,
            straight: true,
            pump: Mutex::default(),
        })
    }

    /// A connection to a host.
    pub async fn connect(&self, url: &RunnerUrl) -> Result<Out, Refusal> {
        let (host, port) = url.network();
        let proxy = if self.straight { None } else { proxy_to(url) };
        let base = match (&self.via, proxy) {
            (Some(via), _) => Base::Pair(through_ssh(via, host, port)?),
            (None, Some(proxy)) => Base::Tcp(through_proxy(&proxy?, host, port).await?.into_std()?),
            (None, None) => Base::Tcp(dial((host, port)).await?.into_std()?),
        };
        if let Base::Tcp(sock) = &base {
            sock.set_nodelay(true)?;
        }
        match (&self.tls, base) {
            (Some(config), base) if url.is_tls() => self.over_tls(config, host, base).await,
            (_, Base::Tcp(sock)) => Ok(Out::Tcp(TcpStream::from_std(sock)?)),
            (_, Base::Pair(sock)) => Ok(Out::Pair(tokio::net::UnixStream::from_std(sock)?)),
        }
    }

    async fn over_tls(
        &self,
        config: &Arc<ClientConfig>,
        host: &str,
        base: Base,
    ) -> Result<Out, Refusal> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| wrong(format!("{host} can't be the name of a certificate")))?;
        let (ours, theirs) = UnixStream::pair()?;
        for sock in [&ours, &theirs] {
            sock.set_nonblocking(true)?;
        }
        let (ready, is_ready) = oneshot::channel();
        let (over, pump) = mpsc::channel();
        let connector = TlsConnector::from(Arc::clone(config));
        thread::Builder::new().name("tls".into()).spawn(move || {
            let _over = over;
            speak(connector, name, base, theirs, ready);
        })?;
        *self.pump.lock().unwrap_or_else(PoisonError::into_inner) = Some(pump);
        match is_ready.await {
            Ok(Ok(())) => Ok(Out::Pair(tokio::net::UnixStream::from_std(ours)?)),
            Ok(Err(reason)) => Err(wrong(format!("{host}: {reason}"))),
            Err(_) => Err(wrong(format!("{host}: TLS failed"))),
        }
    }

    /// Waits until what was written last is on its way, for so long at most.
    pub fn finish(&self, patience: Duration) {
        let pump = self
            .pump
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(pump) = pump {
            let _ = pump.recv_timeout(patience);
        }
    }
}

/// The thread that speaks TLS: from its handshake to the end of either side.
fn speak(
    connector: TlsConnector,
    name: ServerName<'static>,
    base: Base,
    local: UnixStream,
    ready: oneshot::Sender<Result<(), String>>,
) {
    let Ok(runtime) = Builder::new_current_thread().enable_all().build() else {
        return;
    };
    runtime.block_on(async {
        let begun = async {
            let sock = base.here()?;
            let local = tokio::net::UnixStream::from_std(local)?;
            io::Result::Ok((connector.connect(name, sock).await?, local))
        };
        match time::timeout(OPENING, begun).await {
            Ok(Ok((tls, local))) => {
                let _ = ready.send(Ok(()));
                carry(tls, local).await;
            }
            Ok(Err(error)) => {
                let _ = ready.send(Err(told(&error)));
            }
            Err(_) => {
                let _ = ready.send(Err("TLS: it didn't answer in time".into()));
            }
        }
    });
}

fn told(error: &io::Error) -> String {
    let certificate = error.to_string().contains("certificate");
    let advice = if certificate {
        "; --ca-file names who signed it"
    } else {
        ""
    };
    format!("TLS: {error}{advice}")
}

/// Passes bytes on, each way, until one side has ended.
async fn carry(far: impl Bytes, near: impl Bytes) {
    let (mut far_in, mut far_out) = tokio::io::split(far);
    let (mut near_in, mut near_out) = tokio::io::split(near);
    let up = async {
        pass(&mut near_in, &mut far_out).await;
        let _ = far_out.shutdown().await;
    };
    let down = async {
        pass(&mut far_in, &mut near_out).await;
        let _ = near_out.shutdown().await;
    };
    let (mut up, mut down) = (pin!(up), pin!(down));
    let down_ended = poll_fn(|context| match down.as_mut().poll(context) {
        Poll::Ready(()) => Poll::Ready(true),
        Poll::Pending => up.as_mut().poll(context).map(|()| false),
    });
    if !down_ended.await {
        let _ = time::timeout(LAST_BYTES, down).await;
    }
}

async fn pass(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) {
    let mut piece = vec![0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        if to.write_all(&piece[..length]).await.is_err() || to.flush().await.is_err() {
            break;
        }
    }
}

/// Who signed the certificate of the other end.
enum Authorities<'a> {
    System,
    File(&'a Path),
    Text(&'a str),
}

/// The authorities in a text, which is that of `place`.
fn named(text: &[u8], place: &str) -> Result<RootCertStore, String> {
    let unread = |error: &dyn fmt::Display| format!("{place}: can't be read: {error}");
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(text) {
        let certificate = certificate.map_err(|error| unread(&error))?;
        roots.add(certificate).map_err(|error| unread(&error))?;
    }
    if roots.is_empty() {
        return Err(format!("{place}: holds no certificate"));
    }
    Ok(roots)
}

fn trusting(authorities: Authorities<'_>) -> Result<Arc<ClientConfig>, String> {
    let roots = match authorities {
        Authorities::File(path) => {
            let place = path.display().to_string();
            let text =
                fs::read(path).map_err(|error| format!("{place}: can't be read: {error}"))?;
            named(&text, &place)?
        }
        Authorities::Text(text) => named(text.as_bytes(), "the authorities that were given")?,
        Authorities::System => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(
                    "there are no authorities here to check the host's certificate by: name who \
                     signed it with --ca-file"
                        .into(),
                );
            }
            roots
        }
    };
    let provider = Arc::new(crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS can't be had: {error}"))?;
    Ok(Arc::new(
        versions.with_root_certificates(roots).with_no_client_auth(),
    ))
}

/// One of a pair of sockets, of which `ssh -W` to a login node has the other as its input and output.
fn through_ssh(login: &str, host: &str, port: u16) -> Result<UnixStream, Refusal> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let authority = if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    let mut ssh = Command::new("ssh");
    ssh.args(["-o", "BatchMode=yes", "-W", &authority, "--", login]);
    ssh.stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs.try_clone()?)));
    ssh.stdout(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    init::unblock(&mut ssh);
    // It ends with its input.
    children::start(|| ssh.spawn().map(|child| child.id()), Arc::new(Nobody))
        .map_err(|error| wrong(format!("ssh can't be started for --via: {error}")))?;
    Ok(ours)
}

/// Who cares how that `ssh` ends: what it carried ends with it.
struct Nobody;

impl children::Watcher for Nobody {
    fn ended(&self, _: Change) {}
}

/// An HTTP proxy: where it is, and what it is shown.
#[derive(Debug, PartialEq, Eq)]
struct Proxy {
    host: String,
    port: u16,
    credentials: Option<String>,
}

/// The proxy by which a host is reached, as the environment has it: by the variables that other programs go by, too.
fn proxy_to(url: &RunnerUrl) -> Option<Result<Proxy, Refusal>> {
    proxy_in(url, |name| {
        env::var(name).ok().filter(|value| !value.is_empty())
    })
}

fn proxy_in(
    url: &RunnerUrl,
    env: impl Fn(&str) -> Option<String>,
) -> Option<Result<Proxy, Refusal>> {
    let named = match env("KOHAKURIVER_PROXY") {
        Some(none) if none == "none" => return None,
        Some(named) => named,
        None => {
            let host = url.network().0;
            let own = host == "localhost"
                || host
                    .parse::<IpAddr>()
                    .is_ok_and(|address| address.is_loopback());
            if own || spared(host, &either(&env, "NO_PROXY").unwrap_or_default()) {
                return None;
            }
            let scheme = if url.is_tls() {
                "HTTPS_PROXY"
            } else {
                "HTTP_PROXY"
            };
            either(&env, scheme).or_else(|| either(&env, "ALL_PROXY"))?
        }
    };
    Some(parsed(&named).ok_or_else(|| {
        wrong("the proxy in the environment can't be used: only http://NAME:PORT can")
    }))
}

fn either(env: impl Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    env(&name.to_ascii_lowercase()).or_else(|| env(name))
}

/// Whether a host is among those that no proxy is asked for: `*`, names, and all below a name.
fn spared(host: &str, list: &str) -> bool {
    list.split(',').map(str::trim).any(|each| {
        let name = each.trim_start_matches('.');
        each == "*"
            || (!name.is_empty()
                && (host.eq_ignore_ascii_case(name)
                    || host
                        .to_ascii_lowercase()
                        .ends_with(&format!(".{}", name.to_ascii_lowercase()))))
    })
}

fn parsed(text: &str) -> Option<Proxy> {
    let rest = match text.split_once("://") {
        Some(("http", rest)) => rest,
        Some(_) => return None,
        None => text,
    };
    let rest = rest.split('/').next()?;
    let (credentials, place) = match rest.rsplit_once('@') {
        Some((credentials, place)) => (Some(unescaped(credentials)?), place),
        None => (None, rest),
    };
    let (host, port) = match place.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() => (host, port.parse().ok()?),
        _ => (place, 80),
    };
    let host = host.trim_matches(['[', ']']);
    (!host.is_empty()).then(|| Proxy {
        host: host.into(),
        port,
        credentials,
    })
}

fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// A tunnel through an HTTP proxy (RFC 9110 §9.3.6).
async fn through_proxy(proxy: &Proxy, host: &str, port: u16) -> Result<TcpStream, Refusal> {
    let said = |what: String| wrong(format!("the proxy {}:{} {what}", proxy.host, proxy.port));
    let mut sock = dial((&proxy.host, proxy.port)).await?;
    let authority = if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    let shown = proxy
        .credentials
        .as_ref()
        .map(|credentials| {
            format!(
                "Proxy-Authorization: Basic {}\r\n",
                BASE64.encode(credentials.as_bytes())
            )
        })
        .unwrap_or_default();
    let request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{shown}\r\n");
    sock.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    // Byte by byte: what is behind the head is the host's.
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if head.len() > MAX_HEAD || sock.read(&mut byte).await? == 0 {
            return Err(said("does not answer as an HTTP proxy does".into()));
        }
        head.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&head);
    let status = line.split(' ').nth(1).unwrap_or_default();
    if line.starts_with("HTTP/1.") && status.starts_with('2') {
        Ok(sock)
    } else {
        Err(said(format!(
            "does not let connections to {authority} through (HTTP status {status})"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(url: &str, pairs: &[(&str, &str)]) -> Option<Proxy> {
        let get = |name: &str| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        proxy_in(&RunnerUrl::of_host(url).unwrap(), get).map(Result::unwrap)
    }

    #[test]
    fn the_proxy_is_that_of_the_environment() {
        let proxy = |host: &str, port, credentials: Option<&str>| {
            Some(Proxy {
                host: host.into(),
                port,
                credentials: credentials.map(Into::into),
            })
        };
        let there = [("HTTPS_PROXY", "http://me:a%40b@p:3128/")];
        assert_eq!(found("https://h", &there), proxy("p", 3128, Some("me:a@b")));
        assert_eq!(found("http://h", &there), None);
        assert_eq!(
            found("http://h", &[("http_proxy", "p:8080")]),
            proxy("p", 8080, None)
        );
        assert_eq!(
            found("http://h", &[("ALL_PROXY", "p")]),
            proxy("p", 80, None)
        );
        assert_eq!(
            found("http://127.0.0.1:1", &[("KOHAKURIVER_PROXY", "p:1")]),
            proxy("p", 1, None)
        );
    }

    #[test]
    fn hosts_are_spared_by_no_proxy_and_this_machine_always() {
        let with = |no: &'static str| [("HTTP_PROXY", "p:1"), ("NO_PROXY", no)];
        assert!(found("http://h.lab", &with("other")).is_some());
        for no in ["*", "h.lab", ".lab", "x, LAB"] {
            assert_eq!(found("http://h.lab", &with(no)), None, "{no}");
        }
        assert_eq!(found("http://127.0.0.1:1", &with("")), None);
        assert_eq!(
            found(
                "http://h",
                &[("HTTP_PROXY", "p:1"), ("KOHAKURIVER_PROXY", "none")]
            ),
            None
        );
    }

    #[test]
    fn a_proxy_that_can_t_be_used_is_told() {
        let url = RunnerUrl::of_host("http://h").unwrap();
        for bad in ["socks5://p:1", "http://", "p:port"] {
            let found = proxy_in(&url, |name| (name == "HTTP_PROXY").then(|| bad.to_owned()));
            assert!(found.unwrap().is_err(), "{bad}");
        }
    }
}
