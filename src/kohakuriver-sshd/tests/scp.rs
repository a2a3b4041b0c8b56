//! `scp -O` to a server that finds no scp program: the server does the remote half itself.

mod common;

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Command, Output, Stdio};

use common::{Server, noise, text};

fn scp(server: &Server, arguments: &[&str]) -> Output {
    let mut command = Command::new("scp");
    command
        .args(["-O", "-q", "-F", &server.config()])
        .args(arguments);
    command.stdin(Stdio::null()).output().unwrap()
}

fn succeed(server: &Server, arguments: &[&str]) {
    let output = scp(server, arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn a_large_file_arrives_whole_both_ways_with_its_mode_and_times() {
    let server = Server::without_programs();
    let [here, there, back] = ["here", "th ere", "back"].map(|name| server.directory.text(name));
    fs::write(&here, noise(32 << 20)).unwrap();
    fs::set_permissions(&here, Permissions::from_mode(0o440)).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    fs::File::open(&here).unwrap().set_modified(old).unwrap();
    let remote = format!("task:{}", there.replace(' ', "\\ "));
    succeed(&server, &["-p", &here, &remote]);
    succeed(&server, &["-p", &remote, &back]);
    assert!(fs::read(&here).unwrap() == fs::read(&back).unwrap());
    for copy in [&there, &back] {
        let meta = fs::metadata(copy).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o440, 1_000_000_000));
    }
}

#[test]
fn a_tree_arrives_both_ways_and_wildcards_and_home_are_understood() {
    let server = Server::without_programs();
    let [tree, there, back] = ["tree", "there", "back"].map(|name| server.directory.text(name));
    fs::create_dir_all(format!("{tree}/a/b")).unwrap();
    fs::create_dir(&back).unwrap();
    fs::write(format!("{tree}/a/b/c"), "content").unwrap();
    fs::write(format!("{tree}/empty.txt"), "").unwrap();
    succeed(&server, &["-r", &tree, &format!("task:{there}")]);
    succeed(&server, &["-r", &format!("task:{there}"), &back]);
    assert_eq!(fs::read(format!("{back}/there/a/b/c")).unwrap(), b"content");
    succeed(&server, &[&format!("task:{there}/*.t?t"), &back]);
    assert!(fs::exists(format!("{back}/empty.txt")).unwrap());
    let name = format!(".kohakuriver-test-{}", std::process::id());
    succeed(
        &server,
        &[&format!("{tree}/a/b/c"), &format!("task:~/{name}")],
    );
    succeed(&server, &[&format!("task:{name}"), &format!("{back}/home")]);
    let removed = server.run(&format!("/bin/rm ~/{name}"));
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    assert_eq!(fs::read(format!("{back}/home")).unwrap(), b"content");
}

#[test]
fn several_files_go_into_a_directory_and_only_into_one() {
    let server = Server::without_programs();
    let [one, two, into] = ["one", "two", "into"].map(|name| server.directory.text(name));
    fs::create_dir(&into).unwrap();
    fs::write(&one, "1").unwrap();
    fs::write(&two, "2").unwrap();
    succeed(&server, &[&one, &two, &format!("task:{into}")]);
    assert_eq!(fs::read(format!("{into}/two")).unwrap(), b"2");
    let output = scp(&server, &[&one, &two, &format!("task:{into}/one")]);
    assert!(
        text(&output.stderr).contains("Not a directory"),
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_longer_file_is_replaced_in_full() {
    let server = Server::without_programs();
    let [short, long] = ["short", "long"].map(|name| server.directory.text(name));
    fs::write(&short, "short").unwrap();
    fs::write(&long, noise(1000)).unwrap();
    succeed(&server, &[&short, &format!("task:{long}")]);
    assert_eq!(fs::read(&long).unwrap(), b"short");
}

#[test]
fn what_can_not_be_copied_is_named_and_the_rest_arrives() {
    let server = Server::without_programs();
    let [here, good, fifo] = ["here", "good", "fifo"].map(|name| server.directory.text(name));
    fs::create_dir(&here).unwrap();
    fs::write(&good, "good").unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let [missing, fifo, good] =
        [&format!("{good}.no"), &fifo, &good].map(|path| format!("task:{path}"));
    let output = scp(&server, &[&missing, &fifo, &good, &here]);
    let said = text(&output.stderr);
    assert!(
        said.contains("No such file or directory") && said.contains("not a regular file"),
        "{said}"
    );
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(fs::read(format!("{here}/good")).unwrap(), b"good");
    let output = scp(&server, &[&format!("{here}/good"), "task:/proc/no-such/x"]);
    assert!(text(&output.stderr).contains("No such file"), "{output:?}");
}

#[test]
fn a_full_disk_is_told() {
    let server = Server::without_programs();
    let [here, full] = ["here", "full"].map(|name| server.directory.text(name));
    fs::write(&here, noise(1 << 20)).unwrap();
    fs::create_dir(&full).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "none", &full])
        .output();
    if !mount.unwrap().status.success() {
        let in_ci = std::env::var_os("CI").is_some_and(|value| value == "true");
        assert!(!in_ci, "this test has to run in CI, as root");
        eprintln!("NOT TESTED: only root can make a small disk");
        return;
    }
    let output = scp(&server, &[&here, &format!("task:{full}/x")]);
    assert!(
        Command::new("umount")
            .arg(&full)
            .status()
            .unwrap()
            .success()
    );
    assert!(text(&output.stderr).contains("No space left"), "{output:?}");
    assert_eq!(output.status.code(), Some(1));
}

/// What a client says that is no honest one, and the server's last answer.
fn say(server: &Server, command: &str, lines: &[u8]) -> (String, Option<i32>) {
    let mut ssh = server.ssh(&[]);
    ssh.arg(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut client = ssh.spawn().unwrap();
    client.stdin.take().unwrap().write_all(lines).unwrap();
    let mut said = String::new();
    client
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    (said, client.wait().unwrap().code())
}

#[test]
fn nothing_is_written_outside_of_the_directory_that_was_named() {
    let server = Server::without_programs();
    let into = server.directory.text("into");
    fs::create_dir(&into).unwrap();
    for name in ["../out", "..", ".", "", "/out", "a/b"] {
        for line in [
            format!("C0644 0 {name}\n\0"),
            format!("D0755 0 {name}\nC0644 0 out\n\0E\n"),
        ] {
            let (said, code) = say(&server, &format!("scp -r -t {into}"), line.as_bytes());
            assert!(said.contains("\u{1}scp: "), "{name}: {said:?}");
            assert_eq!(code, Some(1), "{name}");
        }
    }
    assert!(fs::read_dir(&into).unwrap().next().is_none());
    assert!(!server.directory.file("out").exists());
}

#[test]
fn a_link_in_a_tree_that_leads_round_ends() {
    let server = Server::without_programs();
    let [tree, back] = ["tree", "back"].map(|name| server.directory.text(name));
    fs::create_dir(&tree).unwrap();
    symlink("x", format!("{tree}/x")).unwrap();
    let output = scp(&server, &["-r", &format!("task:{tree}"), &back]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn a_device_takes_a_file_and_keeps_its_mode() {
    let server = Server::without_programs();
    let [here, device] = ["here", "null"].map(|name| server.directory.text(name));
    fs::write(&here, noise(1 << 20)).unwrap();
    let made = Command::new("mknod")
        .args(["-m", "622", &device, "c", "1", "3"])
        .status()
        .unwrap();
    let device = if made.success() { &device } else { "/dev/null" };
    let before = fs::metadata(device).unwrap();
    for options in [&[][..], &["-p"]] {
        succeed(
            &server,
            &[options, &[&here, &format!("task:{device}")]].concat(),
        );
    }
    let after = fs::metadata(device).unwrap();
    assert_eq!((after.rdev(), after.mode()), (before.rdev(), before.mode()));
}

#[test]
fn a_pipe_takes_a_file_while_somebody_reads_it() {
    let server = Server::without_programs();
    let [here, fifo] = ["here", "fifo"].map(|name| server.directory.text(name));
    fs::write(&here, noise(1 << 20)).unwrap();
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let remote = format!("task:{fifo}");
    let output = scp(&server, &[&here, &remote]);
    assert!(text(&output.stderr).contains("nobody reads"), "{output:?}");
    assert_eq!(output.status.code(), Some(1));
    // It can be opened for both at once, and so without waiting for the other end.
    let mut end = fs::File::options()
        .read(true)
        .write(true)
        .open(&fifo)
        .unwrap();
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; 1 << 20];
        end.read_exact(&mut got).unwrap();
        got
    });
    succeed(&server, &[&here, &remote]);
    assert!(reader.join().unwrap() == fs::read(&here).unwrap());
}

#[test]
fn a_copy_into_a_pipe_that_nobody_empties_ends_with_its_client() {
    let server = Server::without_programs();
    let fifo = server.directory.text("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let _end = fs::File::options()
        .read(true)
        .write(true)
        .open(&fifo)
        .unwrap();
    let process = format!("/proc/{}/task", server.process.0.id());
    let copying = || {
        let threads = fs::read_dir(&process).unwrap().flatten();
        let name = |path: std::path::PathBuf| fs::read(path.join("comm")).unwrap_or_default();
        threads.filter(|each| name(each.path()) == b"scp\n").count()
    };
    let mut client = server.ssh(&[]);
    client
        .arg(format!("scp -t {fifo}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut client = client.spawn().unwrap();
    let mut input = client.stdin.take().unwrap();
    input.write_all(b"C0644 10000000 x\n").unwrap();
    let _ = input.write_all(&vec![0; 300_000]);
    common::read_exactly(client.stdout.as_mut().unwrap(), &[0, 0]);
    assert_eq!(copying(), 1);
    client.kill().unwrap();
    client.wait().unwrap();
    common::eventually(|| copying() == 0);
}
