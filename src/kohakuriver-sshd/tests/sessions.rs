//! Shells and commands, with OpenSSH's client.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use common::{Directory, Process, Server, feed, make_key, noise, read_exactly, text};
use kohakuriver_sshd::sys::{self, Size};

#[test]
fn output_errors_and_exit_code_of_a_command_arrive_apart() {
    let server = Server::start(&[]);
    let output = server.run("echo out; echo err >&2; exit 7");
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        ("out\n".into(), "err\n".into())
    );
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn the_exit_code_is_told_also_where_output_ends_before_the_program() {
    let server = Server::start(&[]);
    let (_master, path) = server.master();
    for _ in 0..20 {
        let output = server
            .ssh(&["-S", &path])
            .arg("exec >&- 2>&-; exit 9")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(9));
    }
}

#[test]
fn a_program_that_a_signal_ended_is_told_as_such() {
    let server = Server::start(&[]);
    let output = server.ssh(&["-v"]).arg("kill -KILL $$").output().unwrap();
    assert_eq!(output.status.code(), Some(255));
    assert!(
        text(&output.stderr).contains("exit-signal"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_shell_reads_its_commands_from_standard_input_and_is_a_login_shell() {
    let server = Server::start(&["--shell", "/bin/sh"]);
    let mut shell = server
        .ssh(&["-T"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    shell
        .stdin
        .take()
        .unwrap()
        .write_all(b"echo $0 $SHELL\nexit 5\n")
        .unwrap();
    let output = shell.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "-sh /bin/sh\n");
    assert_eq!(output.status.code(), Some(5));
}

#[test]
fn language_reaches_the_program_and_other_variables_do_not() {
    let server = Server::start(&[]);
    let options = ["-o", "SetEnv=LC_TIME=xx_YY.UTF-8 LD_AUDIT=/evil"];
    let output = server
        .ssh(&options)
        .arg("echo $LC_TIME,$LD_AUDIT,$USER,$SSH_CONNECTION")
        .output()
        .unwrap();
    let line = text(&output.stdout);
    assert!(line.starts_with("xx_YY.UTF-8,,"), "{line}");
    assert!(
        line.trim_end()
            .ends_with(&server.address.port().to_string()),
        "{line}"
    );
}

#[test]
fn a_terminal_has_the_size_of_the_clients_and_follows_it() {
    let server = Server::start(&[]);
    let terminal = sys::open_terminal().unwrap();
    let size = |characters| Size {
        characters,
        pixels: (0, 0),
    };
    sys::resize(terminal.master.as_raw_fd(), size((80, 24)));
    let slave = || Stdio::from(terminal.slave.try_clone().unwrap());
    let script = "tty -s && stty size; trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut command = server.ssh(&["-t"]);
    command
        .arg(script)
        .env("TERM", "xterm")
        .stdin(slave())
        .stdout(slave())
        .stderr(slave());
    // SAFETY: the closure only makes system calls.
    unsafe { command.pre_exec(|| sys::lead_session(true)) };
    let mut client = Process(command.spawn().unwrap());
    drop(command);
    let mut seen = String::new();
    let mut wait_for = |what: &str| {
        while !seen.contains(what) {
            let mut space = [0; 1024];
            sys::wait(
                &mut [sys::interest(terminal.master.as_raw_fd(), libc::POLLIN)],
                None,
            )
            .unwrap();
            let count = sys::read(terminal.master.as_raw_fd(), &mut space).unwrap();
            seen.push_str(&text(&space[..count]));
        }
    };
    wait_for("24 80");
    wait_for("ready");
    sys::resize(terminal.master.as_raw_fd(), size((132, 50)));
    wait_for("50 132");
    assert_eq!(client.0.wait().unwrap().code(), Some(4));
}

#[test]
fn a_program_in_a_terminal_is_told_when_its_client_is_gone() {
    let server = Server::start(&[]);
    let witness = server.directory.file("hung-up");
    let made = std::process::Command::new("mkfifo")
        .arg(&witness)
        .status()
        .unwrap();
    assert!(made.success());
    let script = format!(
        "trap 'echo told > {}; exit' HUP; echo ready; while :; do sleep 0.05; done",
        witness.display()
    );
    let mut command = server.ssh(&["-tt"]);
    let mut client = Process(
        command
            .arg(script)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    read_exactly(client.0.stdout.as_mut().unwrap(), b"ready");
    client.0.kill().unwrap();
    assert_eq!(fs::read_to_string(&witness).unwrap(), "told\n");
}

#[test]
fn what_a_program_left_running_does_not_keep_its_terminal_open() {
    let server = Server::start(&[]);
    let output = server
        .ssh(&["-tt"])
        .arg("(trap '' HUP; sleep 600) & echo pid $! .; exit 3")
        .output()
        .unwrap();
    let pid = text(&output.stdout)
        .split_whitespace()
        .nth(1)
        .unwrap()
        .to_owned();
    std::process::Command::new("kill")
        .arg(pid)
        .status()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn bytes_come_back_unchanged_through_a_reader_that_is_slow_to_start() {
    let server = Server::start(&[]);
    let sent = noise(32 << 20);
    let mut echo = server
        .ssh(&[])
        .arg("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map(Process)
        .unwrap();
    let stdin = echo.0.stdin.take().unwrap();
    let fd = stdin.as_raw_fd();
    sys::set_nonblocking(fd).unwrap();
    // Fill everything on the way until nothing moves, and only then begin to read.
    let (mut written, patience) = (0, std::time::Duration::from_millis(500));
    loop {
        let mut interest = [sys::interest(fd, libc::POLLOUT)];
        sys::wait(&mut interest, Some(patience)).unwrap();
        if interest[0].revents == 0 {
            break;
        }
        written += sys::write(fd, &sent[written..]).unwrap_or(0);
        assert!(
            written < sent.len(),
            "something on the way holds any amount"
        );
    }
    // SAFETY: fcntl touches no memory.
    unsafe { libc::fcntl(fd, libc::F_SETFL, 0) };
    let feeder = feed(stdin, sent[written..].to_vec());
    let mut received = Vec::new();
    echo.0
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut received)
        .unwrap();
    feeder.join().unwrap().unwrap();
    assert!(
        received == sent,
        "{} of {} bytes",
        received.len(),
        sent.len()
    );
}

#[test]
fn a_session_that_takes_no_input_stalls_no_other_on_its_connection() {
    let server = Server::start(&[]);
    let (_master, path) = server.master();
    let zero = fs::File::open("/dev/zero").unwrap();
    let mut command = server.ssh(&["-S", &path]);
    let stalled = command
        .arg("echo ready; exec sleep 600")
        .stdin(zero)
        .stdout(Stdio::piped());
    let mut stalled = Process(stalled.spawn().unwrap());
    read_exactly(stalled.0.stdout.as_mut().unwrap(), b"ready\n");
    for _ in 0..3 {
        let output = server
            .ssh(&["-S", &path])
            .arg("head -c 8000000 /dev/zero | wc -c; exit 2")
            .output()
            .unwrap();
        assert_eq!(
            (text(&output.stdout), output.status.code()),
            ("8000000\n".into(), Some(2))
        );
    }
}

#[test]
fn keys_are_renewed_in_the_middle_of_data_by_either_side() {
    let server = Server::start(&["--rekey-bytes", "1000000"]);
    for option in ["RekeyLimit=default", "RekeyLimit=300K"] {
        let sent = noise(16 << 20);
        let mut echo = server.ssh(&["-o", option]);
        let mut echo = echo
            .arg("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let feeder = feed(echo.stdin.take().unwrap(), sent.clone());
        let output = echo.wait_with_output().unwrap();
        feeder.join().unwrap().unwrap();
        assert!(
            output.stdout == sent,
            "{option}: {} bytes",
            output.stdout.len()
        );
        assert!(output.status.success());
    }
}

#[test]
fn fifty_sessions_at_once_each_get_their_own() {
    let server = Server::start(&[]);
    let mut clients: Vec<Process> = (0..50)
        .map(|_| {
            server
                .ssh(&[])
                .arg("echo up; cat")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .map(Process)
        .collect();
    for client in &mut clients {
        read_exactly(client.0.stdout.as_mut().unwrap(), b"up\n");
    }
    for (number, client) in clients.iter_mut().enumerate() {
        writeln!(client.0.stdin.take().unwrap(), "session {number}").unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let mut rest = String::new();
        client
            .0
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut rest)
            .unwrap();
        assert_eq!(rest, format!("session {number}\n"));
        assert!(client.0.wait().unwrap().success());
    }
}

#[test]
fn one_session_or_connection_too_many_is_refused_and_its_place_is_free_again_later() {
    let server = Server::start(&["--max-sessions", "1"]);
    let (master, path) = server.master();
    let only_shared = ["-S", &path, "-o", "ProxyCommand=false"];
    let second = server.ssh(&only_shared).arg("true").output().unwrap();
    assert!(
        text(&second.stderr).contains("refused by peer"),
        "{}",
        text(&second.stderr)
    );
    let other = server.run("true");
    assert!(
        text(&other.stderr).contains("too many connections"),
        "{}",
        text(&other.stderr)
    );
    drop(master);
    while !server.run("true").status.success() {}
}

#[test]
fn every_kind_of_key_and_cipher_lets_its_owner_in() {
    let server = Server::start(&[]);
    let kinds: [&[&str]; 4] = [
        &["-t", "rsa", "-b", "2048"],
        &["-t", "ecdsa", "-b", "256"],
        &["-t", "ecdsa", "-b", "384"],
        &["-t", "ed25519"],
    ];
    let ciphers = [
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "chacha20-poly1305@openssh.com",
    ];
    let path = server.directory.text("other");
    for (number, kind) in kinds.iter().enumerate() {
        for name in [&path, &format!("{path}.pub")] {
            let _ = fs::remove_file(name);
        }
        make_key(path.as_ref(), kind);
        fs::copy(format!("{path}.pub"), server.directory.file("authorized")).unwrap();
        let identity = format!("IdentityFile={path}");
        let output = server
            .ssh(&["-o", &identity, "-c", ciphers[number % 3]])
            .arg("echo in")
            .output()
            .unwrap();
        assert_eq!(
            text(&output.stdout),
            "in\n",
            "{kind:?}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn only_authorized_keys_count_and_only_without_options_and_at_once() {
    let server = Server::start(&[]);
    let authorized = server.directory.file("authorized");
    let line = fs::read_to_string(&authorized).unwrap();
    let is_let_in = || {
        let output = server.run("true");
        let denied = text(&output.stderr).contains("Permission denied (publickey)");
        assert_ne!(output.status.success(), denied, "{}", text(&output.stderr));
        !denied
    };
    assert!(is_let_in());
    for refused in [
        "",
        "# nothing\n",
        &format!("restrict {line}"),
        &format!("command=\"x\" {line}"),
    ] {
        fs::write(&authorized, refused).unwrap();
        assert!(!is_let_in(), "{refused}");
    }
    fs::write(&authorized, format!("# mine\n\n{line}")).unwrap();
    assert!(is_let_in());
    fs::remove_file(&authorized).unwrap();
    assert!(!is_let_in());
}

#[test]
fn a_login_name_is_the_users_own_or_root_or_one_that_was_given() {
    let server = Server::start(&["--login", "my-task"]);
    for (name, code) in [("root", 0), ("my-task", 0), ("nobody-else", 255)] {
        let output = server.ssh(&["-l", name]).arg("true").output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{name}");
    }
}

#[test]
fn the_host_key_is_private_and_the_same_after_a_restart() {
    let mut server = Server::start(&[]);
    let mode = fs::metadata(server.directory.file("host_key"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    server.process.0.kill().unwrap();
    let (directory, key) = (
        std::mem::replace(&mut server.directory, Directory::new()),
        server.host_key.clone(),
    );
    let second = Server::start_in(directory, &[]);
    assert_eq!(second.host_key, key);
    assert!(second.run("true").status.success());
}

#[test]
fn a_host_key_that_ssh_keygen_made_is_used() {
    let directory = Directory::new();
    make_key(&directory.file("id"), &["-t", "ed25519"]);
    fs::copy(directory.file("id.pub"), directory.file("authorized")).unwrap();
    make_key(&directory.file("host_key"), &["-t", "ed25519"]);
    let server = Server::start_in(directory, &[]);
    let public = fs::read_to_string(server.directory.file("host_key.pub")).unwrap();
    assert!(public.starts_with(&server.host_key));
    assert!(server.run("true").status.success());
}

#[test]
fn programs_with_their_full_path_work_in_a_task_without_a_shell() {
    use kohakuriver_sshd::{keys::HostKeys, server, shared::Shared, user::User};
    use std::sync::Arc;
    // A real server lends its keys and configuration; this one differs in its user alone.
    let mut lender = Server::start(&[]);
    let shared = Shared {
        host_keys: Arc::new(HostKeys::load_or_make(&[lender.directory.file("host_key")]).unwrap()),
        algorithms: &kohakuriver_sshd::algorithms::ALL,
        authorized_keys: lender.directory.file("authorized"),
        user: User {
            name: "root".into(),
            home: "/".into(),
            shell: None,
        },
        logins: Vec::new(),
        files: sys::raise_file_limit().unwrap(),
        rekey_bytes: 1 << 30,
        most: 8,
        connections: Default::default(),
        strangers: Default::default(),
        sessions: Default::default(),
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    lender.address = listener.local_addr().unwrap();
    lender.reconfigure();
    std::thread::spawn(move || server::serve(&listener, &Arc::new(shared)));
    assert_eq!(text(&lender.run("/bin/echo 'a  b' c").stdout), "a  b c\n");
    for options in [&["-T"][..], &["-tt"]] {
        let output = lender.ssh(options).output().unwrap();
        let sentence = text(&output.stderr);
        assert_eq!(output.status.code(), Some(127));
        assert!(sentence.contains("this task has no shell"), "{sentence}");
    }
    assert_eq!(lender.run("echo hi").status.code(), Some(127));
}

#[test]
fn the_line_of_a_session_that_is_idle_stays_open_and_alive() {
    let server = Server::start(&[]);
    let options = [
        "-o",
        "ServerAliveInterval=1",
        "-o",
        "ServerAliveCountMax=1",
        "-vvv",
    ];
    let mut command = server.ssh(&options);
    let command = command
        .arg("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut client = Process(command.spawn().unwrap());
    let mut lines = BufReader::new(client.0.stderr.take().unwrap()).lines();
    // Answers to its requests, without which it would have given up.
    let asked = lines
        .by_ref()
        .map_while(Result::ok)
        .filter(|line| line.contains("receive packet: type 82"));
    assert_eq!(asked.take(3).count(), 3);
    drop(client.0.stdin.take());
    assert!(client.0.wait().unwrap().success());
}
