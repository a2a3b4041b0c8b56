//! Terminals: the real binary, real pseudo-terminals and pipes, over links that are cut.

#[path = "support/opener.rs"]
mod opener;
mod support;

use std::fs;
use std::path::Path;

use kohakuriver_tunnel::protocol::{TCP, TERMINAL, kind};
use opener::*;
use support::*;

const INPUT: u8 = 0x01;
const END: u8 = 0x02;
const RESIZE: u8 = 0x03;
const SIGNAL: u8 = 0x04;
const STARTED: u8 = 0x10;
const OUTPUT: u8 = 0x11;
const ERRORS: u8 = 0x12;
const EXIT: u8 = 0x13;
const LOST: u8 = 0x14;
const FAILED: u8 = 0x15;
const TAKEN: u8 = 0x16;

#[derive(Clone, Default)]
struct Start<'a> {
    pipes: bool,
    size: [u16; 2],
    user: &'a str,
    workdir: &'a str,
    command: &'a [&'a str],
    env: &'a [&'a str],
    session: &'a str,
    list: bool,
}

impl Start<'_> {
    fn packed(&self) -> Vec<u8> {
        let flags = [!self.pipes, !self.session.is_empty(), self.list];
        let bits = flags.iter().zip([1, 2, 4]);
        let mut bytes = vec![bits.map(|(set, bit)| u8::from(*set) * bit).sum()];
        bytes.extend(self.size.iter().flat_map(|side| side.to_be_bytes()));
        let mut text = |text: &str| {
            bytes.extend((text.len() as u32).to_be_bytes());
            bytes.extend(text.as_bytes());
        };
        text(self.user);
        text(self.workdir);
        for texts in [self.command, self.env] {
            bytes.extend((texts.len() as u32).to_be_bytes());
            for text in texts {
                bytes.extend((text.len() as u32).to_be_bytes());
                bytes.extend(text.as_bytes());
            }
        }
        if !self.session.is_empty() {
            bytes.extend((self.session.len() as u32).to_be_bytes());
            bytes.extend(self.session.as_bytes());
        }
        bytes
    }
}

/// The user's end of a terminal.
struct Terminal {
    stream: Opener,
    bytes: Vec<u8>,
    started: bool,
    output: Vec<u8>,
    errors: Vec<u8>,
    lost: u64,
    exit: Option<u32>,
    failed: Option<String>,
    taken: bool,
}

impl Terminal {
    fn new(number: u32, start: &Start) -> Self {
        let mut stream = Opener::new(number, 0);
        stream.proto = TERMINAL;
        stream.start = start.packed();
        Self {
            stream,
            bytes: Vec::new(),
            started: false,
            output: Vec::new(),
            errors: Vec::new(),
            lost: 0,
            exit: None,
            failed: None,
            taken: false,
        }
    }

    fn open(wire: &mut Wire, start: &Start) -> Self {
        let mut terminal = Self::new(0, start);
        terminal.stream.open(wire);
        terminal
    }

    fn script(wire: &mut Wire, script: &str) -> Self {
        let size = [24, 80];
        let command = &["sh", "-c", script];
        let start = Start {
            size,
            command,
            ..Start::default()
        };
        Self::open(wire, &start)
    }

    fn send(&mut self, wire: &mut Wire, tag: u8, payload: &[u8]) {
        let mut frame = vec![tag];
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        wire.send(self.stream.header(kind::DATA), &frame);
        self.stream.sent += frame.len() as u64;
    }

    /// Takes one message; its kind.
    fn take(&mut self, wire: &mut Wire) -> u8 {
        let message = wire.any();
        self.took(wire, message)
    }

    fn took(&mut self, wire: &mut Wire, message: Message) -> u8 {
        let stream = &mut self.stream;
        if message.id == 0 {
            return message.kind; // it tells its counts
        }
        assert_eq!(message.id, stream.id, "{message:?}");
        match message.kind {
            kind::DATA => {
                stream.received += message.payload.len() as u64;
                let grant = pack(&[stream.window(), stream.received]);
                wire.send(stream.header(kind::WINDOW), &grant);
                self.bytes.extend(message.payload);
                self.frames();
            }
            kind::WINDOW => [stream.limit, stream.acked] = numbers(&message),
            kind::ACK => [stream.acked] = numbers(&message),
            kind::EOF => stream.received += 1,
            kind::PING => wire.send(stream.header(kind::PONG), &message.payload),
            kind::CLOSE => stream.closed = true,
            other => panic!("{other}: {}", message.text()),
        }
        message.kind
    }

    fn frames(&mut self) {
        while let Some((head, rest)) = self.bytes.split_first_chunk::<5>() {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let Some(payload) = rest.get(..length) else {
                return;
            };
            match head[0] {
                STARTED => self.started = true,
                OUTPUT => self.output.extend(payload),
                ERRORS => self.errors.extend(payload),
                EXIT => self.exit = Some(u32::from_be_bytes(payload.try_into().unwrap())),
                LOST => self.lost += u64::from_be_bytes(payload.try_into().unwrap()),
                TAKEN => self.taken = true,
                FAILED => self.failed = Some(String::from_utf8(payload.to_vec()).unwrap()),
                other => panic!("{other}"),
            }
            self.bytes.drain(..5 + length);
        }
    }

    fn until(&mut self, wire: &mut Wire, text: &str) {
        while !self.text().contains(text) {
            assert!(self.started || self.output.is_empty());
            assert_eq!((self.exit, &self.failed), (None, &None), "{}", self.text());
            self.take(wire);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Takes all that comes, to its end in good order.
    fn finish(&mut self, wire: &mut Wire) {
        while self.take(wire) != kind::EOF {}
        self.stream.eof(wire);
        while !self.stream.closed {
            self.take(wire);
        }
        assert!(self.bytes.is_empty());
    }
}

fn until_there(path: &Path) {
    until(|| path.exists());
}

#[test]
fn a_terminal_echoes_knows_its_size_and_tells_the_exit_code() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let start = Start {
        size: [30, 100],
        command: &[
            "sh",
            "-c",
            "stty size; read x; stty size; echo $x $TERM $MINE; exit 7",
        ],
        env: &["MINE=yes", "TERM=dumb"],
        ..Start::default()
    };
    let mut terminal = Terminal::open(&mut wire, &start);
    terminal.until(&mut wire, "30 100");
    terminal.send(&mut wire, RESIZE, &[0, 50, 0, 132]);
    terminal.send(&mut wire, INPUT, b"typed\n");
    terminal.finish(&mut wire);
    let text = terminal.text();
    assert_eq!(text, "30 100\r\ntyped\r\n50 132\r\ntyped dumb yes\r\n");
    assert_eq!(terminal.exit, Some(7));
}

#[test]
fn ctrl_c_interrupts_and_a_signal_is_told_as_shells_do() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut terminal = Terminal::script(&mut wire, "cat");
    terminal.send(&mut wire, INPUT, b"there\n");
    terminal.until(&mut wire, "there\r\nthere\r\n");
    terminal.send(&mut wire, INPUT, b"\x03");
    terminal.finish(&mut wire);
    assert_eq!(terminal.exit, Some(128 + libc::SIGINT as u32));
}

#[test]
fn a_program_goes_on_over_another_link() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut terminal = Terminal::script(&mut wire, "echo ready; cat");
    terminal.until(&mut wire, "ready");
    for word in ["one", "two", "three"] {
        drop(wire);
        wire = terminal.stream.resume_anew(&runner);
        terminal.send(&mut wire, INPUT, format!("{word}\n").as_bytes());
        terminal.until(&mut wire, &format!("{word}\r\n{word}\r\n"));
    }
    terminal.send(&mut wire, END, b"");
    terminal.finish(&mut wire);
    assert_eq!((terminal.exit, terminal.lost), (Some(0), 0));
}

#[test]
fn nobody_there_holds_no_job_up_and_what_was_lost_is_told() {
    let (runner, folder) = (Runner::new(), tempdir("unattended"));
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let done = folder.join("done");
    let script = format!(
        "stty -echo; echo ready; read x; head -c 10000000 /dev/zero | tr '\\0' x; echo; touch {}; read y",
        done.display()
    );
    let mut terminal = Terminal::script(&mut wire, &script);
    terminal.until(&mut wire, "ready\r\n");
    terminal.output.clear();
    terminal.stream.detach(&mut wire, HOLD);
    wire.send(
        kohakuriver_tunnel::protocol::Header::new(kind::PING, TCP, 0),
        b"after",
    );
    while wire.any().kind != kind::PONG {}
    // It was asked for while the stream had a link, and goes on without.
    terminal.stream.resume(&mut wire);
    terminal.send(&mut wire, INPUT, b"go\n");
    terminal.stream.detach(&mut wire, HOLD);
    until_there(&done);
    terminal.stream.resume(&mut wire);
    terminal.send(&mut wire, INPUT, b"end\n");
    terminal.finish(&mut wire);
    assert!(terminal.lost > 1_000_000, "{}", terminal.lost);
    assert_eq!(terminal.lost + terminal.output.len() as u64, 10_000_002);
    assert!(terminal.text().ends_with("xx\r\n"));
    assert_eq!(terminal.exit, Some(0));
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn who_never_falls_silent_is_interrupted_and_taken_up_all_the_same() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut terminal = Terminal::script(&mut wire, "yes");
    while terminal.output.len() < 300_000 {
        terminal.take(&mut wire);
    }
    terminal.stream.detach(&mut wire, HOLD);
    drop(wire);
    let mut wire = terminal.stream.resume_anew(&runner);
    while terminal.output.len() < 3_000_000 {
        terminal.take(&mut wire);
    }
    terminal.send(&mut wire, INPUT, b"\x03");
    terminal.finish(&mut wire);
    assert_eq!(terminal.exit, Some(128 + libc::SIGINT as u32));
}

#[test]
fn pipes_lose_nothing_and_keep_both_streams_apart() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let script = "read x; head -c 8000000 /dev/zero; echo bad >&2; exec wc -c";
    let start = Start {
        pipes: true,
        command: &["sh", "-c", script],
        ..Start::default()
    };
    let mut terminal = Terminal::open(&mut wire, &start);
    terminal.send(&mut wire, INPUT, b"go\n");
    while terminal.output.len() < 100_000 {
        terminal.take(&mut wire);
    }
    drop(wire);
    let mut wire = terminal.stream.resume_anew(&runner);
    terminal.send(&mut wire, INPUT, &[7; 30_000]);
    terminal.send(&mut wire, END, b"");
    terminal.finish(&mut wire);
    assert_eq!(terminal.errors, b"bad\n");
    let (zeros, count) = terminal.output.split_at(8_000_000);
    assert!(zeros.iter().all(|byte| *byte == 0));
    assert_eq!(String::from_utf8_lossy(count).trim(), "30000");
    assert_eq!((terminal.exit, terminal.lost), (Some(0), 0));
}

#[test]
fn a_stream_that_ends_hangs_its_terminal_up() {
    let (runner, folder) = (Runner::new(), tempdir("hangup"));
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    for (number, pipes) in [(0, false), (1, true)] {
        let done = folder.join(format!("done{number}"));
        let script = format!(
            "exec 2>/dev/null; trap 'touch {}; exit' HUP; echo ready; while :; do sleep 0.05; done",
            done.display()
        );
        let start = Start {
            pipes,
            command: &["sh", "-c", &script],
            ..Start::default()
        };
        let mut terminal = Terminal::new(number, &start);
        terminal.stream.open(&mut wire);
        terminal.until(&mut wire, "ready");
        wire.send(terminal.stream.header(kind::CLOSE), &[]);
        until_there(&done);
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_signal_reaches_the_command() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let script = "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.05; done";
    let mut terminal = Terminal::script(&mut wire, script);
    terminal.until(&mut wire, "ready");
    terminal.send(&mut wire, SIGNAL, &[libc::SIGUSR1 as u8]);
    terminal.until(&mut wire, "caught");
    terminal.finish(&mut wire);
    assert_eq!(terminal.exit, Some(5));
}

#[test]
fn a_terminal_is_taken_up_by_nobody_else_and_by_no_forward() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut terminal = Terminal::script(&mut wire, "echo ready; cat");
    terminal.until(&mut wire, "ready");
    let stream = &mut terminal.stream;
    (stream.mark, stream.id) = ([9; 16], 500);
    assert!(stream.ask(&mut wire).text().starts_with("ESTALE: "));
    (stream.mark, stream.proto) = (MARK, TCP);
    assert!(stream.ask(&mut wire).text().starts_with("ESTALE: "));
    stream.proto = TERMINAL;
    stream.resume(&mut wire);
}

#[test]
fn what_can_not_be_started_is_said() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let open = |number, wire: &mut Wire, start: &Start| {
        let mut terminal = Terminal::new(number, start);
        terminal.stream.open(wire);
        terminal.finish(wire);
        terminal
    };
    let command: &[&str] = &["no-such-program"];
    let start = Start {
        command,
        pipes: true,
        ..Start::default()
    };
    let terminal = open(0, &mut wire, &start);
    assert_eq!((terminal.started, terminal.exit), (true, Some(127)));
    assert_eq!(terminal.errors, b"no-such-program: command not found\n");
    let workdir = "/no/such/folder";
    let terminal = open(
        1,
        &mut wire,
        &Start {
            workdir,
            ..start.clone()
        },
    );
    assert!(!terminal.started && terminal.failed.unwrap().starts_with("ENOENT: "));
    let user = "nobody-of-that-name";
    let terminal = open(2, &mut wire, &Start { user, ..start });
    assert!(terminal.failed.unwrap().contains(user));
}

#[test]
fn a_command_runs_as_the_user_who_is_named() {
    // SAFETY: takes nothing.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("skipped: only root can become another");
    }
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let start = Start {
        pipes: true,
        user: "4711:4712",
        workdir: "/",
        command: &["sh", "-c", "id -u; id -g; id -G; pwd; echo $HOME"],
        ..Start::default()
    };
    let mut terminal = Terminal::open(&mut wire, &start);
    terminal.finish(&mut wire);
    assert_eq!(terminal.text(), "4711\n4712\n4712\n/\n/\n");
}

#[test]
fn an_empty_command_is_the_best_shell() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut terminal = Terminal::open(&mut wire, &Start::default());
    terminal.send(&mut wire, INPUT, b"tty; echo $((6 * 7)); exit 3\n");
    terminal.finish(&mut wire);
    assert!(
        terminal.text().contains("\r\n42\r\n"),
        "{}",
        terminal.text()
    );
    assert!(terminal.text().contains("/dev/pts/"), "{}", terminal.text());
    assert_eq!(terminal.exit, Some(3));
}

#[test]
fn terminals_leave_no_zombie_and_no_descriptor_and_have_a_bound() {
    let runner = Runner::new();
    let mut command = client_command(&runner.url());
    command.env("KOHAKURIVER_TERMINALS", "3");
    let client = Client::spawn(command);
    let mut wire = runner.accept();
    let pid = client.child.id();
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    let (files, threads) = (count("fd"), count("task"));
    let start = Start {
        command: &["sh", "-c", "echo ready; cat"],
        ..Start::default()
    };
    for number in 0..100 {
        let mut terminal = Terminal::new(number, &start);
        terminal.stream.open(&mut wire);
        terminal.until(&mut wire, "ready");
        wire.send(terminal.stream.header(kind::CLOSE), &[]);
        until(|| count("task") == threads);
    }
    let children = format!("/proc/{pid}/task/{pid}/children");
    until(|| fs::read_to_string(&children).unwrap().is_empty());
    until(|| count("fd") == files);
    for number in 200..203 {
        Terminal::new(number, &start).stream.open(&mut wire);
    }
    let one_more = Terminal::new(203, &start);
    one_more.stream.connect_with(&mut wire, HOLD);
    let refusal = one_more.stream.next(&mut wire);
    assert_eq!(refusal.kind, kind::ERROR);
    assert!(refusal.text().starts_with("EAGAIN: "), "{}", refusal.text());
}

/// The user's end of the session `name`, which runs this script if there is none of that name.
fn session(wire: &mut Wire, number: u32, name: &str, script: &str) -> Terminal {
    let start = Start {
        size: [24, 80],
        command: &["sh", "-c", script],
        session: name,
        ..Start::default()
    };
    let mut terminal = Terminal::new(number, &start);
    terminal.stream.open(wire);
    terminal
}

/// What is said of the sessions of a user.
fn sessions(wire: &mut Wire, number: u32, mark: [u8; 16]) -> Vec<String> {
    let start = Start {
        list: true,
        pipes: true,
        ..Start::default()
    };
    let mut terminal = Terminal::new(number, &start);
    terminal.stream.mark = mark;
    terminal.stream.open(wire);
    terminal.finish(wire);
    assert_eq!(terminal.exit, Some(0));
    let text = terminal.text();
    let without_age = |line: &str| line.rsplit_once(' ').unwrap().0.to_owned();
    text.lines().map(without_age).collect()
}

#[test]
fn a_session_is_left_and_found_again_by_its_name() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let script = "echo begun; trap 'stty size' WINCH; x=; \
        until [ \"$x\" = end ]; do read x && echo \"<$x>\"; done; exit 4";
    let mut first = session(&mut wire, 0, "work", script);
    first.until(&mut wire, "begun");
    wire.send(first.stream.header(kind::CLOSE), &[]);
    let gone = || vec!["work detached".to_owned()];
    let mut number = 100;
    until(|| {
        number += 1;
        sessions(&mut wire, number, MARK) == gone()
    });
    drop(wire);
    let mut wire = runner.accept();
    let mut second = session(&mut wire, 1, "work", "echo another");
    second.until(&mut wire, "begun");
    second.until(&mut wire, "24 80");
    second.send(&mut wire, INPUT, b"word\n");
    second.until(&mut wire, "<word>");
    assert_eq!(sessions(&mut wire, 200, MARK), ["work attached"]);
    second.send(&mut wire, INPUT, b"end\n");
    second.finish(&mut wire);
    assert_eq!(second.exit, Some(4));
    assert!(!second.text().contains("another"));
    assert!(sessions(&mut wire, 201, MARK).is_empty());
}

#[test]
fn who_opens_a_session_takes_it_from_whoever_has_it() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut first = session(&mut wire, 0, "work", "echo ready; cat");
    first.until(&mut wire, "ready");
    let mut second = session(&mut wire, 1, "work", "");
    let mut over = false;
    while !(over && second.text().contains("ready")) {
        let message = wire.any();
        if message.id == first.stream.id {
            over |= first.took(&mut wire, message) == kind::EOF;
        } else {
            second.took(&mut wire, message);
        }
    }
    assert!(first.taken);
    assert_eq!(first.exit, None);
    second.send(&mut wire, INPUT, b"mine\n");
    second.until(&mut wire, "mine\r\nmine");
}

#[test]
fn a_session_is_its_users_alone_and_ends_with_the_right_to_it() {
    let (runner, folder) = (Runner::new(), tempdir("sessions"));
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let other = [9; 16];
    let ended = folder.join("ended");
    let script = format!(
        "trap 'touch {}; exit' HUP; echo ready; while :; do sleep 0.05; done",
        ended.display()
    );
    let mut mine = session(&mut wire, 0, "work", &script);
    mine.until(&mut wire, "ready");
    wire.send(mine.stream.header(kind::CLOSE), &[]);
    assert!(sessions(&mut wire, 100, other).is_empty());
    let start = Start {
        size: [24, 80],
        command: &["sh", "-c", "echo theirs; cat"],
        session: "work",
        ..Start::default()
    };
    let mut theirs = Terminal::new(1, &start);
    theirs.stream.mark = other;
    theirs.stream.open(&mut wire);
    theirs.until(&mut wire, "theirs");
    let end = |mark: [u8; 16]| [&mark[..], b"no longer yours"].concat();
    let revoke = kohakuriver_tunnel::protocol::Header::new(kind::REVOKE, TCP, 0);
    wire.send(revoke, &end(MARK));
    until_there(&ended);
    assert_eq!(sessions(&mut wire, 101, other), ["work attached"]);
    theirs.send(&mut wire, END, b"");
    theirs.finish(&mut wire);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn one_user_keeps_a_part_of_all_terminals_at_most() {
    let runner = Runner::new();
    let mut command = client_command(&runner.url());
    command.env("KOHAKURIVER_TERMINALS", "8");
    let _client = Client::spawn(command);
    let mut wire = runner.accept();
    for number in 0..2 {
        session(&mut wire, number, &format!("number-{number}"), "cat");
    }
    let start = Start {
        size: [24, 80],
        session: "one-more",
        ..Start::default()
    };
    let one_more = Terminal::new(2, &start);
    one_more.stream.connect_with(&mut wire, HOLD);
    let refusal = one_more.stream.next(&mut wire);
    assert!(refusal.text().starts_with("EDQUOT: "), "{}", refusal.text());
}

#[test]
fn a_session_without_anybody_runs_at_full_speed_and_to_its_end() {
    let (runner, folder) = (Runner::new(), tempdir("session-alone"));
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let go = folder.join("go");
    let script = format!(
        "echo ready; until [ -e {} ]; do sleep 0.05; done; head -c 10000000 /dev/zero; echo",
        go.display()
    );
    let mut terminal = session(&mut wire, 0, "job", &script);
    terminal.until(&mut wire, "ready");
    wire.send(terminal.stream.header(kind::CLOSE), &[]);
    fs::write(&go, "").unwrap();
    let mut number = 100;
    until(|| {
        number += 1;
        sessions(&mut wire, number, MARK).is_empty()
    });
    fs::remove_dir_all(folder).unwrap();
}
