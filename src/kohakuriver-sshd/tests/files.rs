//! scp, sftp, rsync and git over this server.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};

use common::{Server, feed, noise, text};

fn succeed(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

fn sftp(server: &Server, batch: &str) -> (bool, String) {
    let mut command = Command::new("sftp");
    command.args(["-q", "-F", &server.config(), "-b", "-", "task"]);
    let mut client = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let feeder = feed(client.stdin.take().unwrap(), batch.as_bytes().to_vec());
    let output = client.wait_with_output().unwrap();
    let _ = feeder.join();
    (
        output.status.success(),
        text(&output.stdout) + &text(&output.stderr),
    )
}

#[test]
fn scp_copies_sixty_four_megabytes_there_and_back_unchanged() {
    let server = Server::start(&[]);
    let [here, there, back] = ["here", "there", "back"].map(|name| server.directory.text(name));
    fs::write(&here, noise(64 << 20)).unwrap();
    fs::set_permissions(&here, fs::Permissions::from_mode(0o640)).unwrap();
    let scp = |from: &str, to: &str| {
        succeed(Command::new("scp").args(["-q", "-p", "-F", &server.config(), from, to]))
    };
    scp(&here, &format!("task:{there}"));
    scp(&format!("task:{there}"), &back);
    assert!(fs::read(&here).unwrap() == fs::read(&back).unwrap());
    let (first, last) = (fs::metadata(&here).unwrap(), fs::metadata(&back).unwrap());
    assert_eq!((first.mode(), first.mtime()), (last.mode(), last.mtime()));
}

#[test]
fn scp_copies_a_tree_to_a_path_below_home() {
    let server = Server::start(&[]);
    let tree = server.directory.file("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/c"), "content").unwrap();
    let name = format!(".kohakuriver-test-{}", std::process::id());
    let target = format!("task:~/{name}");
    succeed(
        Command::new("scp")
            .args(["-q", "-r", "-F", &server.config()])
            .arg(&tree)
            .arg(target),
    );
    let read = server.run(&format!("cat ~/{name}/a/b/c && rm -r ~/{name}"));
    assert_eq!(text(&read.stdout), "content");
}

#[test]
fn sftp_does_all_that_its_client_has_words_for() {
    let server = Server::start(&[]);
    let base = server.directory.text("files");
    fs::create_dir(&base).unwrap();
    fs::write(server.directory.file("one"), "first").unwrap();
    let one = server.directory.text("one");
    fs::write(format!("{one}.more"), "first and more").unwrap();
    let batch = [
        format!("cd {base}"),
        "mkdir d".into(),
        format!("put {one} d/file"),
        "rename d/file d/moved".into(),
        "ln -s moved d/link".into(),
        "ln d/moved d/hard".into(),
        "chmod 600 d/moved".into(),
        format!("get d/link {one}.back"),
        format!("reput {one}.more d/moved"),
        "ls -la d".into(),
        "df .".into(),
        "rm d/hard".into(),
        "mkdir e".into(),
        "rmdir e".into(),
    ];
    let (done, said) = sftp(&server, &batch.join("\n"));
    assert!(done, "{said}");
    assert!(said.contains("-rw-------"), "{said}");
    assert!(said.contains("lrwxrwxrwx"), "{said}");
    assert_eq!(fs::read(format!("{one}.back")).unwrap(), b"first");
    assert_eq!(
        fs::read_link(format!("{base}/d/link")).unwrap().to_str(),
        Some("moved")
    );
    assert!(
        !fs::exists(format!("{base}/d/hard")).unwrap() && !fs::exists(format!("{base}/e")).unwrap()
    );
}

#[test]
fn sftp_says_why_something_can_not_be_done() {
    let server = Server::start(&[]);
    let (done, said) = sftp(&server, "get /no/such/file");
    assert!(!done && said.contains("not found"), "{said}");
    let (done, said) = sftp(&server, &format!("rmdir {}", server.directory.0.display()));
    assert!(!done && said.contains("Failure"), "{said}");
}

#[test]
fn a_directory_of_a_thousand_names_is_listed_in_full() {
    let server = Server::start(&[]);
    let base = server.directory.file("many");
    fs::create_dir(&base).unwrap();
    for number in 0..1000 {
        fs::write(base.join(format!("name-{number}")), "").unwrap();
    }
    let (_, said) = sftp(&server, &format!("ls -1 {}", base.display()));
    assert_eq!(
        said.lines().filter(|line| line.contains("/name-")).count(),
        1000
    );
}

#[test]
fn rsync_copies_a_tree_and_then_only_what_changed() {
    let server = Server::start(&[]);
    let [from, to] = ["from", "to"].map(|name| server.directory.file(name));
    fs::create_dir_all(from.join("a/b")).unwrap();
    fs::write(from.join("a/b/c"), noise(300_000)).unwrap();
    let rsync = || {
        let shell = format!("ssh -F {}", server.config());
        let target = format!("task:{}/", to.display());
        let source = format!("{}/", from.display());
        succeed(Command::new("rsync").args(["-a", "-i", "-e", &shell, &source, &target]))
    };
    assert!(rsync().contains("a/b/c"));
    assert_eq!(
        fs::read(from.join("a/b/c")).unwrap(),
        fs::read(to.join("a/b/c")).unwrap()
    );
    assert!(!rsync().contains("a/b/c"));
}

#[test]
fn git_pushes_and_clones() {
    let server = Server::start(&[]);
    let [bare, work, copy] = ["bare", "work", "copy"].map(|name| server.directory.text(name));
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.env("GIT_SSH_COMMAND", format!("ssh -F {}", server.config()));
        succeed(
            command
                .args([
                    "-c",
                    "user.name=a",
                    "-c",
                    "user.email=a@b",
                    "-c",
                    "init.defaultBranch=main",
                ])
                .args(arguments),
        )
    };
    git(&["init", "-q", "--bare", &bare]);
    git(&["init", "-q", &work]);
    fs::write(format!("{work}/file"), noise(1 << 20)).unwrap();
    git(&["-C", &work, "add", "file"]);
    git(&["-C", &work, "commit", "-q", "-m", "one"]);
    let url = format!("ssh://task{bare}");
    git(&["-C", &work, "push", "-q", &url, "HEAD:main"]);
    git(&["clone", "-q", &url, &copy]);
    assert!(fs::read(format!("{work}/file")).unwrap() == fs::read(format!("{copy}/file")).unwrap());
}

#[test]
fn a_pipe_that_nobody_else_opens_holds_nothing_up() {
    let server = Server::start(&[]);
    let [pipe, content, back] = ["pipe", "content", "back"].map(|name| server.directory.text(name));
    succeed(Command::new("mkfifo").arg(&pipe));
    fs::write(&content, "content").unwrap();
    let batch = format!(
        "-get {pipe} {back}\n-put {content} {pipe}\n-reput {content} {pipe}\nget {content} {back}\n"
    );
    let (done, said) = sftp(&server, &batch);
    assert!(done, "{said}");
    assert_eq!(fs::read(&back).unwrap(), b"content");
}

#[test]
fn a_device_takes_what_is_sent_to_it() {
    let server = Server::start(&[]);
    let content = server.directory.text("content");
    fs::write(&content, noise(100_000)).unwrap();
    let (done, said) = sftp(&server, &format!("put {content} /dev/null\n"));
    assert!(done, "{said}");
}

/// OpenSSH's `cp` has the server do it, where that can.
#[test]
fn a_file_is_copied_in_the_task_without_coming_here_and_a_device_is_not() {
    let server = Server::start(&[]);
    let [file, copy] = ["file", "copy"].map(|name| server.directory.text(name));
    fs::write(&file, noise(3 << 20)).unwrap();
    let (done, said) = sftp(&server, &format!("cp {file} {copy}\n"));
    assert!(done, "{said}");
    assert!(fs::read(&file).unwrap() == fs::read(&copy).unwrap());
    let (done, said) = sftp(&server, &format!("cp /dev/zero {copy}\n"));
    assert!(!done, "{said}");
}
