//! A server of its own for each test, and OpenSSH's clients to talk to it.
#![allow(dead_code, reason = "each file of tests uses its part")]

pub mod client;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A directory that is removed in the end.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Short: paths of Unix sockets are made of it.
        let path = std::env::temp_dir().join(format!("sshd-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// One with a key, and a file that says that it is let in.
    pub fn with_key() -> Self {
        let directory = Self::new();
        make_key(&directory.file("id"), &["-t", "ed25519"]);
        fs::copy(directory.file("id.pub"), directory.file("authorized")).unwrap();
        directory
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.file(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that doesn't outlive its test.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ends what a server's sessions left running, which bears the server's mark in its environment.
pub struct Leftovers(String);

impl Leftovers {
    fn of(directory: &Directory) -> Self {
        Self(format!("SSHD_TEST={}", directory.text("")))
    }

    fn mark(&self) -> (&str, &str) {
        self.0.split_once('=').unwrap()
    }

    fn is_marked(&self, process: &Path) -> bool {
        let environment = fs::read(process.join("environ")).unwrap_or_default();
        environment
            .split(|byte| *byte == 0)
            .any(|entry| entry == self.0.as_bytes())
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let number = process.file_name().to_string_lossy().parse();
            if let Ok(number) = number
                .map_err(drop)
                .and_then(|number: i32| self.is_marked(&process.path()).then_some(number).ok_or(()))
            {
                // SAFETY: kill touches no memory.
                unsafe { libc::kill(number, libc::SIGKILL) };
            }
        }
    }
}

/// A server, a key that it lets in, and a configuration for clients that calls it `task`.
pub struct Server {
    pub address: SocketAddr,
    pub host_key: String,
    // In this order: the server ends first, then what its sessions left, and then its directory goes.
    pub process: Process,
    leftovers: Leftovers,
    pub directory: Directory,
}

impl Server {
    pub fn start(options: &[&str]) -> Self {
        Self::start_in(Directory::with_key(), options)
    }

    /// One that finds no program by its name.
    pub fn without_programs() -> Self {
        Self::start_prepared(|command| {
            command.env("PATH", "/nonexistent");
        })
    }

    /// One whose process `prepare` has changed.
    pub fn start_prepared(prepare: impl FnOnce(&mut Command)) -> Self {
        Self::start_with(Directory::with_key(), &[], prepare)
    }

    pub fn start_in(directory: Directory, options: &[&str]) -> Self {
        Self::start_with(directory, options, |_| {})
    }

    fn start_with(
        directory: Directory,
        options: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let leftovers = Leftovers::of(&directory);
        let (mark, value) = leftovers.mark();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel-sshd"));
        command
            .env(mark, value)
            .args(["--listen", "127.0.0.1:0", "--host-key"])
            .arg(directory.file("host_key"))
            .arg("--authorized-keys")
            .arg(directory.file("authorized"))
            .args(options)
            .stdout(Stdio::piped())
            .stderr(
                fs::File::options()
                    .append(true)
                    .create(true)
                    .open(directory.file("log"))
                    .unwrap(),
            );
        prepare(&mut command);
        let mut process = command.spawn().map(Process).unwrap();
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let field = |name: &str| {
            let start = line.find(&format!("\"{name}\":\"")).unwrap() + name.len() + 4;
            line[start..].split('"').next().unwrap().to_owned()
        };
        let (address, host_key) = (field("address").parse().unwrap(), field("host_key"));
        let server = Self {
            address,
            host_key,
            process,
            leftovers,
            directory,
        };
        server.reconfigure();
        server
    }

    pub fn reconfigure(&self) {
        let port = self.address.port();
        let (known, id) = (self.directory.text("known"), self.directory.text("id"));
        fs::write(&known, format!("[127.0.0.1]:{port} {}\n", self.host_key)).unwrap();
        let lines = [
            "Host task".to_owned(),
            format!(
                "HostName 127.0.0.1\nPort {port}\nUser root\nIdentityFile {id}\nIdentitiesOnly yes"
            ),
            format!(
                "UserKnownHostsFile {known}\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes"
            ),
            "BatchMode yes\nConnectTimeout 30\n".to_owned(),
        ];
        fs::write(self.directory.file("config"), lines.join("\n")).unwrap();
    }

    pub fn config(&self) -> String {
        self.directory.text("config")
    }

    /// What the server logged since this was asked last, once one of `words` is in it. Its lines are written by a thread
    /// of their own, so they may come after the client's answer.
    pub fn log_with(&self, words: &[&str]) -> String {
        let patience = Instant::now() + Duration::from_secs(30);
        loop {
            let text = fs::read_to_string(self.directory.file("log")).unwrap();
            if words.iter().any(|word| text.contains(word)) {
                return self.log();
            }
            assert!(Instant::now() < patience, "none of {words:?} in: {text}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the server logged since this was asked last.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.directory.file("log")).unwrap();
        fs::File::options()
            .write(true)
            .truncate(true)
            .open(self.directory.file("log"))
            .unwrap();
        text
    }

    /// `ssh`, up to the host's name.
    pub fn ssh(&self, options: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command
            .arg("-F")
            .arg(self.config())
            .args(options)
            .arg("task")
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, command: &str) -> Output {
        self.ssh(&[]).arg(command).output().unwrap()
    }

    /// A connection that other clients share by `-S` and this path.
    pub fn master(&self) -> (Process, String) {
        let path = self.directory.text("shared");
        let mut master = self
            .ssh(&["-M", "-S", &path])
            .arg("echo up; cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map(Process)
            .unwrap();
        read_exactly(master.0.stdout.as_mut().unwrap(), b"up\n");
        (master, path)
    }
}

pub fn make_key(path: &Path, kind: &[&str]) {
    let made = Command::new("ssh-keygen")
        .args(["-q", "-N", ""])
        .args(kind)
        .arg("-f")
        .arg(path)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
}

pub fn read_exactly(from: &mut impl Read, wanted: &[u8]) {
    let mut got = vec![0; wanted.len()];
    from.read_exact(&mut got).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&got),
        String::from_utf8_lossy(wanted)
    );
}

/// Bytes that don't repeat, the same each time.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Writes `bytes` from another thread, and closes what they were written to.
pub fn feed(
    mut to: impl Write + Send + 'static,
    bytes: Vec<u8>,
) -> std::thread::JoinHandle<std::io::Result<()>> {
    std::thread::spawn(move || to.write_all(&bytes))
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Looks again and again until it is so.
pub fn eventually(is_so: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !is_so() {
        assert!(began.elapsed().as_secs() < 60, "it never came to be so");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
