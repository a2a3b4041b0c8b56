//! `tunnel-client run`: an init for the command, whatever the tunnel does.

mod support;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use kohakuriver_tunnel::protocol::kind;
use support::*;

/// Where no runner is.
static NOWHERE: LazyLock<Reserved> = LazyLock::new(closed_port);

/// `run -- sh -c SCRIPT`, with no runner to be found.
fn run(script: &str) -> Command {
    let mut command = client_command(&format!("http://127.0.0.1:{}", NOWHERE.port));
    command
        .args(["run", "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

#[test]
fn the_exit_code_is_the_commands() {
    for code in [0, 7, 255] {
        assert_eq!(
            Client::spawn(run(&format!("exit {code}"))).wait().code(),
            Some(code)
        );
    }
}

#[test]
fn a_command_that_a_signal_kills_gives_128_and_the_signal() {
    assert_eq!(Client::spawn(run("kill -9 $$")).wait().code(), Some(137));
}

#[test]
fn a_command_that_cannot_be_started_is_said_in_a_sentence() {
    let no_program = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    for (program, code) in [("/no/such/program", 127), (no_program, 126), ("/", 126)] {
        let mut command = client_command("http://127.0.0.1:1");
        command.args(["run", "--", program]);
        let mut client = Client::spawn(command);
        assert_eq!(client.wait().code(), Some(code), "{program}");
        client.line_with(&format!("can't start {program}"));
    }
}

#[test]
fn signals_reach_the_command() {
    let signals = [
        ("TERM", libc::SIGTERM),
        ("INT", libc::SIGINT),
        ("HUP", libc::SIGHUP),
        ("USR1", libc::SIGUSR1),
        ("WINCH", libc::SIGWINCH),
    ];
    for (name, signal) in signals {
        let script =
            format!("trap 'exit 42' {name}; echo ready; while :; do read -r line || sleep 1; done");
        let mut client = Client::spawn(run(&script));
        let mut lines = BufReader::new(client.child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        client.signal(signal);
        // A shell may serve its trap only when `read` returns.
        let _ = client.child.stdin.take().unwrap().write_all(b"\n");
        assert_eq!(client.wait().code(), Some(42), "{name}");
    }
}

#[test]
fn a_commands_input_can_stay_open_and_empty_whatever_ours_is() {
    let mut command = client_command(&format!("http://127.0.0.1:{}", NOWHERE.port));
    let script = "test -p /dev/fd/0 && echo a pipe; cat; exit 1";
    command
        .args(["--open-stdin", "run", "--", "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut client = Client::spawn(command);
    let mut lines = BufReader::new(client.child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "a pipe");
    client.signal(libc::SIGTERM);
    assert_eq!(client.wait().code(), Some(128 + libc::SIGTERM));
}

#[test]
fn an_orphan_is_reaped() {
    // The orphan's parent is gone before it ends; its zombie would still be in /proc.
    let script = "pid=$( (sh -c 'read -r go < /dev/fd/3' 3<&0 >/dev/null & echo $!) ); echo $pid; \
                  read -r line; while [ -e /proc/$pid ]; do :; done; echo reaped";
    let mut client = Client::spawn(run(script));
    let mut stdin = client.child.stdin.take().unwrap();
    let mut lines = BufReader::new(client.child.stdout.take().unwrap()).lines();
    let pid: i32 = lines.next().unwrap().unwrap().parse().unwrap();
    assert!(pid > 1);
    stdin.write_all(b"\n\n").unwrap();
    drop(stdin);
    assert_eq!(lines.next().unwrap().unwrap(), "reaped");
    assert_eq!(client.wait().code(), Some(0));
}

#[test]
fn the_command_has_the_limit_of_open_files_that_we_were_given() {
    let mut limited = Command::new("sh");
    let inner = run("ulimit -n");
    limited
        .env_clear()
        .args(["-c", "ulimit -S -n 123; exec \"$@\"", "sh"]);
    limited
        .arg(inner.get_program())
        .args(inner.get_args())
        .stdout(Stdio::piped());
    let mut client = Client::spawn(limited);
    let mut output = String::new();
    client
        .child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert_eq!(output.trim(), "123");
}

#[test]
fn the_command_does_not_outlive_us() {
    let mut client = Client::spawn(run("echo ready; read -r line; exec sleep 1000"));
    let mut output = BufReader::new(client.child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    client.child.kill().unwrap();
    assert_eq!(client.wait().signal(), Some(libc::SIGKILL));
    // The command held the other end of its standard output.
    assert_eq!(output.read_line(&mut line).unwrap(), 0);
}

#[test]
fn the_command_lives_on_when_the_tunnel_gives_up_or_is_replaced() {
    let runner = Runner::new();
    let mut command = client_command(&runner.url());
    command
        .args([
            "--max-reconnect",
            "1",
            "run",
            "--",
            "sh",
            "-c",
            "read -r line; exit 5",
        ])
        .stdin(Stdio::piped());
    let mut client = Client::spawn(command);
    runner.accept().write(&frame(8, &4000u16.to_be_bytes()));
    client.line_with("no attempts are left");
    assert!(client.child.try_wait().unwrap().is_none());
    drop(client.child.stdin.take());
    assert_eq!(client.wait().code(), Some(5));
}

#[test]
fn the_tunnel_serves_beside_the_command() {
    let runner = Runner::new();
    let mut command = client_command(&runner.url());
    command
        .args(["run", "--", "sh", "-c", "read -r line; exit 3"])
        .stdin(Stdio::piped());
    let mut client = Client::spawn(command);
    let mut wire = runner.accept();
    wire.open(1, echo(), u64::MAX);
    wire.data(1, b"beside");
    assert_eq!(wire.bytes(1, 6), b"beside");
    drop(client.child.stdin.take());
    assert_eq!(wire.close_code(), 1001);
    assert_eq!(client.wait().code(), Some(3));
}

#[test]
fn the_last_words_of_a_command_reach_the_user() {
    let runner = Runner::new();
    // Takes one connection, writes a lot, and ends at once.
    let script = "import socket\ns = socket.create_server(('127.0.0.1', 0))\n\
                  print(s.getsockname()[1], flush=True)\nc, _ = s.accept()\nc.sendall(b'w' * 1000000)";
    let mut command = client_command(&runner.url());
    command
        .args(["run", "--", "python3", "-c", script])
        .stdout(Stdio::piped());
    let mut client = Client::spawn(command);
    let mut wire = runner.accept();
    let mut lines = BufReader::new(client.child.stdout.take().unwrap()).lines();
    let port = lines.next().unwrap().unwrap();
    wire.open(1, port.parse().unwrap(), u64::MAX);
    assert_eq!(wire.bytes(1, 1_000_000).len(), 1_000_000);
    wire.expect(kind::EOF, 1);
    assert_eq!(client.wait().code(), Some(0));
}

#[test]
fn a_broken_pipe_ends_the_command_as_it_would_without_us() {
    assert_eq!(
        Client::spawn(run("kill -PIPE $$; exit 1")).wait().code(),
        Some(128 + libc::SIGPIPE)
    );
}

#[test]
fn without_a_command_it_stays_until_it_is_told_to_stop() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let runner = Runner::new();
        let mut client = Client::with(&runner, &["run"]);
        let _wire = runner.accept();
        client.line_with("is up");
        client.signal(signal);
        assert_eq!(client.wait().code(), Some(0));
    }
}

#[test]
fn as_process_1_of_a_namespace_it_passes_on_the_exit_code() {
    let inner = run("sleep 0 & [ $PPID = 1 ] && exit 9");
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--pid", "--fork"]);
    command.arg(inner.get_program()).args(inner.get_args());
    assert_eq!(Client::spawn(command).wait().code(), Some(9));
}

#[test]
fn an_image_may_hold_nothing_but_the_tunnel_client() {
    let (runner, root) = (Runner::new(), tempdir("empty-root"));
    let inner = client_command(&runner.url());
    std::fs::copy(inner.get_program(), root.join("tunnel-client")).unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "--root"])
        .arg(&root)
        .arg("/tunnel-client");
    command.args(inner.get_args());
    let client = Client::spawn(command);
    drop(runner.accept_request());
    client.line_with("no tunnel");
    let mut wire = runner.accept();
    wire.open(1, echo(), u64::MAX);
    wire.data(1, b"bare");
    assert_eq!(wire.bytes(1, 4), b"bare");
    drop(client);
    std::fs::remove_dir_all(root).unwrap();
}

#[test]
fn a_bad_command_line_exits_with_2_and_a_sentence() {
    let mut command = client_command("https://runner");
    command
        .env("KOHAKURIVER_TUNNEL_CA", "no certificate")
        .arg("run");
    let mut client = Client::spawn(command);
    assert_eq!(client.wait().code(), Some(2));
    client.line_with("the authorities that were given: holds no certificate");
}

#[test]
fn signals_that_the_parent_ignores_are_served_and_stay_ignored_in_the_command() {
    let mut command = run("grep SigIgn /proc/self/status; exec sleep 1000 <&-");
    // SAFETY: signal(2) may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGTERM, libc::SIG_IGN);
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut client = Client::spawn(command);
    let mut lines = BufReader::new(client.child.stdout.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    let ignored = u64::from_str_radix(line.rsplit('\t').next().unwrap(), 16).unwrap();
    assert_ne!(ignored & 1 << (libc::SIGTERM - 1), 0, "{line}");
    client.signal(libc::SIGKILL);
    client.wait();

    let mut command = client_command(&Runner::new().url());
    command.arg("run");
    // SAFETY: as above.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGTERM, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut client = Client::spawn(command);
    client.line_with("no tunnel");
    client.signal(libc::SIGTERM);
    assert_eq!(client.wait().code(), Some(0));
}

#[test]
fn a_commands_exit_code_is_known_where_the_parent_ignores_the_end_of_children() {
    let mut command = run("exit 7");
    // SAFETY: signal(2) may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    assert_eq!(Client::spawn(command).wait().code(), Some(7));
}

#[test]
fn standard_descriptors_may_be_closed() {
    for closed in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let runner = Runner::new();
        let inner = client_command(&runner.url());
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("exec \"$@\" {closed}"), "sh"])
            .arg(inner.get_program())
            .args(inner.get_args())
            .args(["run", "--", "sh", "-c", "exec sleep 1000"]);
        let _client = Client::spawn(command);
        let mut wire = runner.accept();
        wire.open(1, echo(), u64::MAX);
        wire.data(1, b"open");
        assert_eq!(wire.bytes(1, 4), b"open", "{closed}");
    }
}

#[test]
fn a_standard_error_that_nobody_reads_stops_nothing() {
    let runner = Runner::new();
    let (_unread, mut full) = std::io::pipe().unwrap();
    // SAFETY: takes no pointers.
    let size = unsafe {
        libc::fcntl(
            std::os::fd::AsRawFd::as_raw_fd(&full),
            libc::F_SETPIPE_SZ,
            4096,
        )
    };
    full.write_all(&vec![0; size as usize]).unwrap();
    let mut command = client_command(&runner.url());
    let mut child = command.stderr(full).spawn().unwrap();
    let mut wire = runner.accept();
    wire.open(1, echo(), u64::MAX);
    wire.data(1, b"on");
    assert_eq!(wire.bytes(1, 2), b"on");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_standard_output_that_takes_nothing_is_an_exit_code() {
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel-client"));
    command.arg("--help").stdout(full);
    assert_eq!(Client::spawn(command).wait().code(), Some(1));
}

#[test]
fn bytes_that_are_no_text_reach_the_command() {
    let mut command = client_command("http://127.0.0.1:1");
    command
        .args(["run", "--", "sh", "-c", "printf %s \"$1$WORD\"", "sh"])
        .arg(OsStr::from_bytes(b"\xe9\xff"))
        .env("WORD", OsStr::from_bytes(b"\xfe"))
        .env("RECONNECT_DELAY", OsStr::from_bytes(b"\xfe"))
        .stdout(Stdio::piped());
    let mut client = Client::spawn(command);
    let mut output = Vec::new();
    client
        .child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut output)
        .unwrap();
    assert_eq!(output, b"\xe9\xff\xfe");
}
