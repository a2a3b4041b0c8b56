//! Forwarded ports, sockets and agents, with OpenSSH's client.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::thread;

use common::{Server, feed, noise, text};

/// Sends back what it gets, and its end.
fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut writer = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut stream, &mut writer);
                let _ = writer.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// Adds a forward to a shared connection; gives what the client says, which is the port for `-R 0`.
fn forward(server: &Server, path: &str, options: &[&str]) -> String {
    let options = [&["-S", path, "-O", "forward"], options].concat();
    let output = server.ssh(&options).output().unwrap();
    assert!(
        output.status.success(),
        "{options:?} {}",
        text(&output.stderr)
    );
    text(&output.stdout).trim().to_owned()
}

/// Forwards a free local port to `target` on `host`, as the task sees it; that port.
fn local_forward(server: &Server, path: &str, host: &str, target: u16) -> u16 {
    let port = free_port();
    let spec = format!("127.0.0.1:{port}:{host}:{target}");
    forward(server, path, &["-L", &spec]);
    port
}

fn comes_back(mut stream: TcpStream) {
    let sent = noise(5_000_000);
    let writer = stream.try_clone().unwrap();
    let copy = sent.clone();
    let feeder = thread::spawn(move || {
        feed(writer.try_clone().unwrap(), copy)
            .join()
            .unwrap()
            .unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    feeder.join().unwrap();
    assert!(received == sent, "{} bytes", received.len());
}

#[test]
fn a_local_forward_carries_bytes_and_each_direction_s_end() {
    let server = Server::start(&[]);
    let (_master, path) = server.master();
    for host in ["127.0.0.1", "localhost"] {
        let port = local_forward(&server, &path, host, echo());
        comes_back(TcpStream::connect(("127.0.0.1", port)).unwrap());
    }
}

#[test]
fn a_remote_forward_listens_in_the_task_on_a_port_that_is_told_until_it_is_cancelled() {
    let server = Server::start(&[]);
    let (_master, path) = server.master();
    let target = echo();
    let spec = format!("127.0.0.1:0:127.0.0.1:{target}");
    let port: u16 = forward(&server, &path, &["-R", &spec]).parse().unwrap();
    comes_back(TcpStream::connect(("127.0.0.1", port)).unwrap());
    let fixed = free_port();
    let spec = format!("127.0.0.1:{fixed}:127.0.0.1:{target}");
    forward(&server, &path, &["-R", &spec]);
    comes_back(TcpStream::connect(("127.0.0.1", fixed)).unwrap());
    let options = ["-S", &path, "-O", "cancel", "-R", &spec];
    assert!(server.ssh(&options).output().unwrap().status.success());
    // The client doesn't wait for the answer, but what it asks next comes behind it.
    assert!(
        server
            .ssh(&["-S", &path])
            .arg("true")
            .output()
            .unwrap()
            .status
            .success()
    );
    assert!(TcpStream::connect(("127.0.0.1", fixed)).is_err());
}

#[test]
fn a_socks_proxy_reaches_names_that_the_task_knows() {
    let server = Server::start(&[]);
    let (_master, path) = server.master();
    let (port, target) = (free_port(), echo());
    forward(&server, &path, &["-D", &format!("127.0.0.1:{port}")]);
    let ask = |name: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(&[5, 1, 0]).unwrap();
        stream.read_exact(&mut [0; 2]).unwrap();
        let mut request = vec![5, 1, 0, 3, name.len() as u8];
        request.extend_from_slice(name.as_bytes());
        request.extend_from_slice(&target.to_be_bytes());
        stream.write_all(&request).unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).map(|()| (answer[1], stream))
    };
    let (code, stream) = ask("localhost").unwrap();
    assert_eq!(code, 0);
    comes_back(stream);
    assert!(ask("no-such-name.invalid").map_or(true, |(code, _)| code != 0));
}

#[test]
fn a_forward_whose_target_reads_nothing_stalls_no_other() {
    let server = Server::start(&[]);
    let (_master, path) = server.master();
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = deaf.local_addr().unwrap().port();
    let port = local_forward(&server, &path, "127.0.0.1", target);
    let stalled = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let _held = deaf.accept().unwrap();
    stalled
        .set_write_timeout(Some(std::time::Duration::from_millis(500)))
        .unwrap();
    let mut written = 0;
    while let Ok(count) = (&stalled).write(&[0; 65536]) {
        written += count;
        assert!(written < 256 << 20, "something on the way holds any amount");
    }
    let port = local_forward(&server, &path, "127.0.0.1", echo());
    comes_back(TcpStream::connect(("127.0.0.1", port)).unwrap());
}

#[test]
fn a_forward_to_a_closed_port_ends_at_once_and_harms_nothing() {
    let server = Server::start(&[]);
    let (_master, path) = server.master();
    let port = local_forward(&server, &path, "127.0.0.1", free_port());
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    assert!(
        server
            .ssh(&["-S", &path])
            .arg("true")
            .output()
            .unwrap()
            .status
            .success()
    );
}

#[test]
fn unix_sockets_are_forwarded_both_ways() {
    let server = Server::start(&[]);
    let (_master, path) = server.master();
    let [here, there] = ["here.sock", "there.sock"].map(|name| server.directory.text(name));
    for option in ["-L", "-R"] {
        let listener = UnixListener::bind(&there).unwrap();
        forward(&server, &path, &[option, &format!("{here}:{there}")]);
        let mut client = UnixStream::connect(&here).unwrap();
        let (mut target, _) = listener.accept().unwrap();
        client.write_all(b"hello").unwrap();
        common::read_exactly(&mut target, b"hello");
        target.write_all(b"world").unwrap();
        common::read_exactly(&mut client, b"world");
        std::fs::remove_file(&there).unwrap();
        if option == "-L" {
            std::fs::remove_file(&here).unwrap();
        }
    }
}

#[test]
fn a_forwarded_agent_is_reachable_for_this_user_alone_and_gone_afterwards() {
    let server = Server::start(&[]);
    let (id, config) = (server.directory.text("id"), server.config());
    let there = "ssh-add -l && stat -c %a $(dirname $SSH_AUTH_SOCK) && echo $SSH_AUTH_SOCK";
    let here = format!("ssh-add -q {id} && ssh -A -F {config} task '{there}'");
    let output = Command::new("ssh-agent")
        .args(["sh", "-c", &here])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = text(&output.stdout);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 3, "{said} {}", text(&output.stderr));
    assert!(lines[0].contains("ED25519"));
    assert_eq!(lines[1], "700");
    // The connection's end may be seen a moment after the client is gone.
    while std::fs::exists(lines[2]).unwrap() {
        thread::yield_now();
    }
}
