//! Clients that are not OpenSSH's, each with its own idea of how to begin.

mod common;

use std::process::{Command, Output, Stdio};

use common::{Server, text};

fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn lets_in(command: &mut Command) {
    let output = output(command.arg("echo in; exit 3"));
    let told = (text(&output.stdout), output.status.code());
    assert_eq!(told, ("in\n".into(), Some(3)), "{}", text(&output.stderr));
}

/// It sends the first message of the exchange that it likes best before it knows what the server likes.
#[test]
fn a_dropbear_client_that_guesses_the_exchange_gets_in() {
    let server = Server::start(&[]);
    let (key, own) = (server.directory.text("id"), server.directory.text("id.db"));
    let converted =
        output(Command::new("dropbearconvert").args(["openssh", "dropbear", &key, &own]));
    assert!(converted.status.success(), "{}", text(&converted.stderr));
    let port = server.address.port().to_string();
    let mut client = Command::new("dbclient");
    client.env("HOME", &server.directory.0);
    lets_in(client.args(["-y", "-y", "-i", &own, "-p", &port, "root@127.0.0.1"]));
}

#[test]
fn a_putty_client_gets_in() {
    let server = Server::start(&[]);
    let (key, own) = (server.directory.text("id"), server.directory.text("id.ppk"));
    let converted = output(Command::new("puttygen").args([&key, "-O", "private", "-o", &own]));
    assert!(converted.status.success(), "{}", text(&converted.stderr));
    let host_key = server.directory.text("host_key");
    let printed = text(&output(Command::new("ssh-keygen").args(["-lf", &host_key])).stdout);
    let fingerprint = printed.split(' ').nth(1).unwrap();
    let port = server.address.port().to_string();
    let mut client = Command::new("plink");
    client.env("HOME", &server.directory.0);
    client.args(["-batch", "-ssh", "-i", &own, "-P", &port]);
    lets_in(client.args(["-hostkey", fingerprint, "root@127.0.0.1"]));
}
