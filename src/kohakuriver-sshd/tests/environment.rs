//! What whoever starts the server may do to it: descriptors, signals, limits, variables, and files that are none.

mod common;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use common::{Directory, Server, text};

/// Runs before the server's program starts, where only system calls may be made.
fn before_start(command: &mut Command, change: fn()) {
    // SAFETY: each caller's function makes system calls, nothing else.
    unsafe {
        command.pre_exec(move || {
            change();
            Ok(())
        })
    };
}

fn lets_in(server: &Server) {
    let output = server.run("echo in; exit 3");
    let told = (text(&output.stdout), output.status.code());
    assert_eq!(told, ("in\n".into(), Some(3)), "{}", text(&output.stderr));
}

#[test]
fn closed_descriptors_at_the_start_are_taken_by_no_connection() {
    let server = Server::start_prepared(|command| {
        before_start(command, || {
            // SAFETY: close touches no memory.
            unsafe { libc::close(0) };
            // SAFETY: as above.
            unsafe { libc::close(2) };
        });
    });
    lets_in(&server);
    for number in [0, 2] {
        let path = format!("/proc/{}/fd/{number}", server.process.0.id());
        assert_eq!(fs::read_link(path).unwrap(), OsStr::new("/dev/null"));
    }
}

#[test]
fn a_log_that_can_not_be_written_ends_no_session() {
    let server = Server::start_prepared(|command| {
        command.stderr(File::options().write(true).open("/dev/full").unwrap());
    });
    lets_in(&server);
}

#[test]
fn signals_that_were_ignored_at_the_start_mean_in_a_session_what_they_always_do() {
    let server = Server::start_prepared(|command| {
        before_start(command, || {
            for signal in 1..32 {
                // SAFETY: signal touches no memory.
                unsafe { libc::signal(signal, libc::SIG_IGN) };
            }
        });
    });
    // Ignored ends of children would take the exit codes with them.
    lets_in(&server);
    for line in ["SigIgn", "SigBlk"] {
        let output = server.run(&format!("grep {line} /proc/self/status"));
        let set = text(&output.stdout)
            .split_whitespace()
            .nth(1)
            .unwrap()
            .to_owned();
        // Above are signals that a C library keeps for itself.
        let usual = u64::from_str_radix(&set, 16).unwrap() & 0x7fff_ffff;
        assert_eq!(usual, 0, "{line} {set}");
    }
}

#[test]
fn a_low_limit_of_open_files_refuses_what_does_not_fit_and_ends_nothing() {
    let server = Server::start_prepared(|command| {
        before_start(command, || {
            let few = libc::rlimit {
                rlim_cur: 12,
                rlim_max: 12,
            };
            // SAFETY: the call reads one rlimit.
            unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &few) };
        });
    });
    let waiting: Vec<_> = (0..20)
        .map(|_| std::net::TcpStream::connect(server.address).unwrap())
        .collect();
    drop(waiting);
    // While the server gets rid of those, one more may be refused like them.
    let is_told = |output: &Output| {
        let said = text(&output.stderr);
        text(&output.stdout) == "in\n" || said.contains("Too many open files")
    };
    let served = (0..100).any(|_| is_told(&server.run("echo in")));
    assert!(served, "{}", server.log());
    let mut server = server;
    assert!(server.process.0.try_wait().unwrap().is_none());
}

#[test]
fn a_home_and_a_language_that_make_no_sense_keep_nobody_out() {
    let odd = OsStr::from_bytes(b"no/such/\xff");
    let server = Server::start_prepared(|command| {
        command.env("HOME", odd).env("LC_ALL", odd).env("USER", odd);
    });
    lets_in(&server);
    let server = Server::start_prepared(|command| {
        let (mark, directory) = ("SSHD_TEST", OsStr::new(""));
        let kept = command.get_envs().find(|(name, _)| *name == mark);
        let kept = kept
            .and_then(|(_, value)| value)
            .unwrap_or(directory)
            .to_owned();
        command.env_clear().env(mark, kept);
    });
    lets_in(&server);
}

#[test]
fn bytes_that_are_no_text_reach_the_command_unchanged() {
    let server = Server::start(&[]);
    let mut ssh = server.ssh(&[]);
    let output = ssh
        .arg(OsStr::from_bytes(b"printf %s '\xff\xfe\x80'"))
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"\xff\xfe\x80");
}

#[test]
fn a_login_name_that_is_no_text_is_a_wrong_name() {
    let server = Server::start(&[]);
    let mut ssh = server.ssh(&[]);
    let output = ssh
        .arg("-l")
        .arg(OsStr::from_bytes(b"ro\xffot"))
        .arg("true")
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("Permission denied"), "{said}");
    lets_in(&server);
}

#[test]
fn a_comment_in_any_encoding_keeps_no_key_out() {
    let server = Server::start(&[]);
    let authorized = server.directory.file("authorized");
    let mut lines = b"# M\xfcller's\n".to_vec();
    lines.extend(fs::read(&authorized).unwrap());
    fs::write(&authorized, lines).unwrap();
    lets_in(&server);
}

/// Runs a server that can't start; `change` is done to its command line.
fn fail(directory: &Directory, change: impl FnOnce(&mut Command)) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel-sshd"));
    command
        .args(["--host-key", &directory.text("host_key")])
        .args(["--authorized-keys", &directory.text("authorized")]);
    change(&mut command);
    let Output { status, stderr, .. } = command.stdin(Stdio::null()).output().unwrap();
    let said = text(&stderr);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("tunnel-sshd: "), "{said}");
    (status.code(), said)
}

fn listen(command: &mut Command) {
    command.args(["--listen", "127.0.0.1:0"]);
}

#[test]
fn a_host_key_that_can_not_be_used_is_told_in_one_sentence() {
    let directory = Directory::with_key();
    let key = directory.file("host_key");
    for content in [&b"garbage"[..], b"\xff\xfe", b""] {
        fs::write(&key, content).unwrap();
        let (code, said) = fail(&directory, listen);
        assert!(said.contains("holds no Ed25519 key"), "{said}");
        assert_eq!(code, Some(1));
    }
    fs::remove_file(&key).unwrap();
    let pipe = Command::new("mkfifo").arg(&key).status().unwrap();
    assert!(pipe.success());
    let (_, said) = fail(&directory, listen);
    assert!(said.contains("holds no Ed25519 key"), "{said}");
    fs::remove_file(&key).unwrap();
    fs::create_dir(&key).unwrap();
    let (code, said) = fail(&directory, listen);
    assert!(said.contains("Is a directory"), "{said}");
    assert_eq!(code, Some(1));
    fs::remove_dir(&key).unwrap();
    let nowhere = |command: &mut Command| {
        listen(command);
        command.args(["--host-key", "/no/such/key"]);
    };
    let (_, said) = fail(&directory, nowhere);
    assert!(said.contains("can't write /no/such/key"), "{said}");
    let twice = |command: &mut Command| {
        listen(command);
        command.args(["--host-key", &directory.text("id")]);
    };
    let (_, said) = fail(&directory, twice);
    assert!(said.contains("a second ssh-ed25519 key"), "{said}");
}

#[test]
fn a_host_key_that_may_not_be_read_is_told_and_not_replaced() {
    let directory = Directory::with_key();
    let key = directory.file("host_key");
    fs::write(&key, "somebody's").unwrap();
    fs::set_permissions(&key, Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(&directory.0, Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel-sshd"));
    // SAFETY: geteuid touches no memory.
    if unsafe { libc::geteuid() } == 0 {
        const NOBODY: u32 = 65534;
        // Nobody may have no way to where programs are built.
        let program = directory.file("program");
        fs::copy(env!("CARGO_BIN_EXE_tunnel-sshd"), &program).unwrap();
        command = Command::new(program);
        command.uid(NOBODY).gid(NOBODY);
    }
    command
        .args(["--listen", "127.0.0.1:0"])
        .args(["--host-key", &directory.text("host_key")])
        .args(["--authorized-keys", &directory.text("authorized")]);
    let output = command.output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("Permission denied"), "{said}");
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1));
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    assert_eq!(fs::read(&key).unwrap(), b"somebody's");
}

#[test]
fn a_file_of_authorized_keys_that_is_missing_at_the_start_is_told() {
    let directory = Directory::with_key();
    fs::remove_file(directory.file("authorized")).unwrap();
    let (code, said) = fail(&directory, listen);
    assert!(said.contains("authorized: No such file"), "{said}");
    assert_eq!(code, Some(1));
}

#[test]
fn an_address_that_can_not_be_listened_on_is_told() {
    let directory = Directory::with_key();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, said) = fail(&directory, |command| {
        command.args(["--listen", &address]);
    });
    assert!(
        said.contains(&format!("can't listen on {address}")),
        "{said}"
    );
    assert_eq!(code, Some(1));
    let (code, _) = fail(&directory, |command| {
        command.args(["--listen", "here"]);
    });
    assert_eq!(code, Some(2));
    let (code, _) = fail(&directory, |command| {
        listen(command);
        command.arg("--login").arg(OsStr::from_bytes(b"\xff"));
    });
    assert_eq!(code, Some(2));
}

#[test]
fn help_that_can_not_be_printed_is_a_failure_and_no_panic() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel-sshd"));
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = command.arg("--help").stdout(full).output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("can't print: No space left"), "{said}");
    assert_eq!(output.status.code(), Some(1));
}
