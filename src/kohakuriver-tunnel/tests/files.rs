//! Files as a user's end reads and writes them, over a real line and in real folders (docs/protocol.md §6, "Files").

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use kohakuriver_tunnel::files;
use rustix::fs::{Mode, OFlags};

const LIST: u8 = 0x21;
const READ: u8 = 0x22;
const MAP: u8 = 0x23;
const SUMS: u8 = 0x24;
const PUT: u8 = 0x25;
const WRITE: u8 = 0x26;
const PART: u8 = 0x27;
const FINISH: u8 = 0x28;
const FOLDER: u8 = 0x29;
const SYMLINK: u8 = 0x2a;
const LINK: u8 = 0x2b;
const ATTRIBUTES: u8 = 0x2c;
const REMOVE: u8 = 0x2d;
const GET: u8 = 0x2e;
const HELLO: u8 = 0x47;
const DONE: u8 = 0x41;
const ENTRIES: u8 = 0x42;
const DATA: u8 = 0x43;
const RESULTS: u8 = 0x46;
const ERROR: u8 = 0x4f;

static FOLDERS: AtomicU32 = AtomicU32::new(0);

/// A folder of a test's own, for as long as it runs.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let number = FOLDERS.fetch_add(1, Ordering::SeqCst);
        let name = format!("kohakuriver-files-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(path.join("in")).unwrap();
        Self(path)
    }

    /// What is copied.
    fn inside(&self, name: &str) -> PathBuf {
        self.0.join("in").join(name)
    }

    /// What is beside it, and nobody's business.
    fn outside(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The user's end of one stream.
struct User {
    line: UnixStream,
    served: JoinHandle<std::io::Result<()>>,
}

impl User {
    fn open(access: &str, path: &Path) -> (Self, u8, Vec<u8>) {
        let (line, far) = UnixStream::pair().unwrap();
        let asked: Vec<OsString> = vec![access.into(), path.into()];
        let served = thread::spawn(move || files::serve(&asked, &OsString::new(), &far));
        let mut user = Self { line, served };
        let (tag, payload) = user.hear();
        (user, tag, payload)
    }

    fn to(folder: &Folder) -> Self {
        let (user, tag, payload) = Self::open("to", &folder.0.join("in"));
        assert_eq!((tag, payload), (HELLO, vec![1]));
        user
    }

    fn hear(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 5];
        self.line.read_exact(&mut head).unwrap();
        let mut payload = vec![0; u32::from_be_bytes(head[1..].try_into().unwrap()) as usize];
        self.line.read_exact(&mut payload).unwrap();
        (head[0], payload)
    }

    fn say(&mut self, tag: u8, payload: &[u8]) {
        let head = [&[tag][..], &(payload.len() as u32).to_be_bytes()].concat();
        self.line.write_all(&[&head, payload].concat()).unwrap();
    }

    fn ask(&mut self, tag: u8, path: &str, rest: &[u8]) -> (u8, Vec<u8>) {
        self.say(tag, &[&text(path), rest].concat());
        self.hear()
    }

    fn succeeds(&mut self, tag: u8, path: &str, rest: &[u8]) {
        let (answer, payload) = self.ask(tag, path, rest);
        assert_eq!(answer, DONE, "{}", String::from_utf8_lossy(&payload));
    }

    /// What becomes of one file that is put.
    fn put(&mut self, path: &str, mode: u32, data: &[u8]) -> Vec<u8> {
        self.say(PUT, &put(&[(path, mode, Some(data))], false));
        let (tag, results) = self.hear();
        assert_eq!(tag, RESULTS, "{}", String::from_utf8_lossy(&results));
        results
    }

    fn refuses_put(&mut self, path: &str) -> String {
        let results = self.put(path, 0o600, b"x");
        assert_eq!(results[0], 3, "{path}");
        assert_eq!(results[1..3], (results.len() as u16 - 3).to_be_bytes());
        String::from_utf8(results[3..].to_vec()).unwrap()
    }

    fn refuses(&mut self, tag: u8, path: &str, rest: &[u8]) -> String {
        let (answer, payload) = self.ask(tag, path, rest);
        assert_eq!(answer, ERROR, "{tag:#x} {path}");
        String::from_utf8(payload).unwrap()
    }
}

fn text(path: &str) -> Vec<u8> {
    [&(path.len() as u16).to_be_bytes()[..], path.as_bytes()].concat()
}

fn attributes(mode: u32) -> Vec<u8> {
    [
        &mode.to_be_bytes()[..],
        &[0; 9],
        &1_000_000_000i64.to_be_bytes(),
        &7u32.to_be_bytes(),
    ]
    .concat()
}

fn summed(data: &[u8]) -> Vec<u8> {
    [&crc32fast::hash(data).to_be_bytes()[..], data].concat()
}

/// A request to write whole files; what has no data could not be read.
fn put(files: &[(&str, u32, Option<&[u8]>)], beside: bool) -> Vec<u8> {
    let (mut heads, mut contents) = (Vec::new(), Vec::new());
    for (path, mode, data) in files {
        heads.extend([text(path), attributes(*mode)].concat());
        contents.extend(match data {
            Some(data) => [&(data.len() as u32).to_be_bytes()[..], data].concat(),
            None => [vec![0xff; 4], text("EIO: why")].concat(),
        });
    }
    let length = (heads.len() as u32).to_be_bytes();
    summed(&[&[beside.into()][..], &length, &heads, &contents].concat())
}

/// A request for whole files, and the sizes that they had.
fn get(files: &[(&str, u32)]) -> Vec<u8> {
    let each = |(path, size): &(&str, u32)| [&text(path)[..], &size.to_be_bytes()].concat();
    files.iter().flat_map(each).collect()
}

fn range(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

#[test]
fn a_file_that_is_put_has_its_bytes_its_mode_and_its_time() {
    let folder = Folder::new();
    let mut user = User::to(&folder);
    user.succeeds(FOLDER, "a", b"");
    for beside in [false, false, true] {
        // The second time it is there already.
        user.say(PUT, &put(&[("a/f", 0o640, Some(b"hello"))], beside));
        assert_eq!(user.hear(), (RESULTS, vec![0]));
        let about = fs::metadata(folder.inside("a/f")).unwrap();
        assert_eq!(fs::read(folder.inside("a/f")).unwrap(), b"hello");
        assert_eq!(about.permissions().mode() & 0o7777, 0o640);
        assert_eq!((about.mtime(), about.mtime_nsec()), (1_000_000_000, 7));
    }
    assert_eq!(fs::read_dir(folder.inside("a")).unwrap().count(), 1);
}

#[test]
fn of_many_files_each_that_can_be_written_or_read_is() {
    let folder = Folder::new();
    fs::create_dir(folder.inside("full")).unwrap();
    let mut user = User::to(&folder);
    let files: [(&str, u32, Option<&[u8]>); 5] = [
        ("a", 0o600, Some(b"first")),
        ("full", 0o600, Some(b"x")),
        ("../b", 0o600, Some(b"x")),
        ("c", 0o600, None),
        ("empty", 0o600, Some(b"")),
    ];
    user.say(PUT, &put(&files, false));
    let (tag, results) = user.hear();
    let failed = |why: &str| [vec![3], text(why)].concat();
    let said = [
        vec![0],
        failed("EISDIR: Is a directory"),
        failed("EINVAL: Invalid argument"),
        vec![2, 0],
    ];
    assert_eq!((tag, results), (RESULTS, said.concat()));
    assert!(!folder.inside("c").exists() && !folder.outside("b").exists());
    assert_eq!(fs::read_dir(folder.inside("")).unwrap().count(), 3);
    // One that has grown or shrunk since it was listed is none of those that were asked for.
    let wanted = [
        ("a", 5),
        ("a", 4),
        ("a", 6),
        ("full", 0),
        ("c", 1),
        ("empty", 0),
    ];
    user.say(GET, &get(&wanted));
    let (tag, data) = user.hear();
    let none = |why: &str| [vec![0xff; 4], text(why)].concat();
    let contents = [
        b"\0\0\0\x05first".to_vec(),
        none("EIO: It changed while it was copied"),
        none("EIO: It changed while it was copied"),
        none("EINVAL: Invalid argument"),
        none("ENOENT: No such file or directory"),
        vec![0; 4],
    ];
    assert_eq!((tag, data), (DATA, summed(&contents.concat())));
}

#[test]
fn a_file_in_pieces_has_its_name_once_it_is_whole() {
    let folder = Folder::new();
    let mut user = User::to(&folder);
    let part = ".f.kohakuriver-1";
    assert_eq!(user.ask(PART, part, &9u64.to_be_bytes()), (DONE, vec![0]));
    for (offset, data) in [(5u64, &b"data"[..]), (0, b"some ")] {
        user.succeeds(
            WRITE,
            part,
            &[&offset.to_be_bytes()[..], &summed(data)].concat(),
        );
    }
    assert!(!folder.inside("f").exists());
    assert_eq!(user.ask(PART, part, &9u64.to_be_bytes()), (DONE, vec![2]));
    let (_, sums) = user.ask(SUMS, part, &[0u64, 9].map(u64::to_be_bytes).concat());
    assert_eq!(sums, crc32fast::hash(b"some data").to_be_bytes());
    user.succeeds(FINISH, part, &[text("f"), attributes(0o600)].concat());
    assert_eq!(fs::read(folder.inside("f")).unwrap(), b"some data");
    assert!(!folder.inside(part).exists());
}

#[test]
fn a_part_that_another_has_too_is_made_anew() {
    let folder = Folder::new();
    let part = ".f.kohakuriver-1";
    fs::write(folder.inside(part), b"theirs").unwrap();
    fs::hard_link(folder.inside(part), folder.inside("theirs")).unwrap();
    let mut user = User::to(&folder);
    assert_eq!(user.ask(PART, part, &4u64.to_be_bytes()), (DONE, vec![0]));
    let rest = [&[0; 8][..], &summed(b"mine")].concat();
    user.succeeds(WRITE, part, &rest);
    assert_eq!(fs::read(folder.inside("theirs")).unwrap(), b"theirs");
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(folder.inside(part), Some(12345), None).unwrap();
        assert_eq!(user.ask(PART, part, &4u64.to_be_bytes()), (DONE, vec![0]));
        assert_eq!(fs::metadata(folder.inside(part)).unwrap().uid(), 0);
    }
}

#[test]
fn files_whose_long_names_begin_alike_get_each_its_own_bytes() {
    let folder = Folder::new();
    let names = ["1", "2"].map(|end| "n".repeat(240) + end);
    for name in &names {
        fs::write(folder.inside(name), b"old").unwrap();
    }
    // Two streams that write over them, again and again, as those of one copy do.
    let writers = names.clone().map(|name| {
        let mut user = User::to(&folder);
        thread::spawn(move || {
            for _ in 0..500 {
                assert_eq!(user.put(&name, 0o600, name.as_bytes()), [0]);
            }
        })
    });
    for writer in writers {
        writer.join().unwrap();
    }
    for name in &names {
        assert_eq!(fs::read(folder.inside(name)).unwrap(), name.as_bytes());
    }
    assert_eq!(fs::read_dir(folder.inside("")).unwrap().count(), 2);
}

#[test]
fn nothing_is_read_or_written_by_way_of_a_symbolic_link() {
    let folder = Folder::new();
    fs::create_dir(folder.outside("secret")).unwrap();
    fs::write(folder.outside("secret/f"), b"secret").unwrap();
    symlink("../secret", folder.inside("way")).unwrap();
    symlink("../secret/f", folder.inside("file")).unwrap();
    let mut user = User::to(&folder);
    for path in ["way/f", "file"] {
        user.refuses(READ, path, &range(0, 6));
        user.refuses(MAP, path, &[0; 8]);
        user.refuses(PART, path, &[0; 8]);
        user.refuses(ATTRIBUTES, path, &attributes(0o777));
    }
    user.refuses(LIST, "way/f", b"");
    user.refuses_put("way/new");
    user.say(GET, &get(&[("way/f", 6), ("file", 6)]));
    let none = |why: &str| [vec![0xff; 4], text(why)].concat();
    let neither = [
        none("ENOTDIR: Not a directory"),
        none("ELOOP: Too many levels of symbolic links"),
    ];
    assert_eq!(user.hear(), (DATA, summed(&neither.concat())));
    user.refuses(REMOVE, "way/f", &[0]);
    user.refuses(FOLDER, "way/new", b"");
    user.refuses(SYMLINK, "way/new", &[text("/"), attributes(0o777)].concat());
    user.refuses(LINK, "here", &text("way/f"));
    user.refuses(LINK, "here", &text("file"));
    // The link itself goes, and not what it leads to.
    assert_eq!(user.put("file", 0o600, b"x"), [0]);
    user.succeeds(FOLDER, "way", b"");
    assert_eq!(fs::read(folder.outside("secret/f")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(folder.outside("secret")).unwrap().count(), 1);
}

#[test]
fn no_path_leads_out_of_the_folder() {
    let folder = Folder::new();
    fs::write(folder.outside("f"), b"outside").unwrap();
    let mut user = User::to(&folder);
    for path in [
        "../f",
        "/etc/passwd",
        "a/../../f",
        ".",
        "..",
        "",
        "a//f",
        "./f",
    ] {
        user.refuses(READ, path, &range(0, 1));
        user.refuses_put(path);
        user.refuses(REMOVE, path, &[0]);
    }
    assert_eq!(fs::read(folder.outside("f")).unwrap(), b"outside");
}

#[test]
fn who_names_a_file_gets_that_and_its_parts_alone() {
    let folder = Folder::new();
    fs::write(folder.inside("f"), b"mine").unwrap();
    fs::write(folder.inside("g"), b"other").unwrap();
    let (mut user, tag, payload) = User::open("to", &folder.inside("f"));
    assert_eq!((tag, &payload[..]), (HELLO, &b"\0f"[..]));
    let (tag, data) = user.ask(READ, "f", &range(0, 10));
    assert_eq!((tag, &data[4..]), (DATA, &b"mine"[..]));
    user.succeeds(PART, ".f.kohakuriver-12", &[0; 8]);
    for path in ["g", ".g.kohakuriver-12", "f/x", ".fx", "in/f"] {
        user.refuses(READ, path, &range(0, 10));
        user.refuses_put(path);
    }
    let mode = || {
        fs::metadata(folder.inside(""))
            .unwrap()
            .permissions()
            .mode()
    };
    let before = mode();
    let said = user.refuses(ATTRIBUTES, "", &attributes(0o777));
    assert_eq!((&said[..8], mode()), ("EACCES: ", before));
    let (tag, entries) = user.ask(LIST, "", b"");
    assert_eq!((tag, entries[0]), (ENTRIES, b'f'));
}

#[test]
fn who_came_to_read_writes_nothing() {
    let folder = Folder::new();
    fs::write(folder.inside("f"), b"mine").unwrap();
    let (mut user, tag, _) = User::open("from", &folder.0.join("in"));
    assert_eq!(tag, HELLO);
    for (tag, rest) in [
        (WRITE, [vec![0; 8], summed(b"x")].concat()),
        (PART, vec![0; 8]),
        (FINISH, [text("g"), attributes(0o600)].concat()),
        (FOLDER, vec![]),
        (SYMLINK, [text("g"), attributes(0o600)].concat()),
        (LINK, text("g")),
        (ATTRIBUTES, attributes(0o600)),
        (REMOVE, vec![0]),
    ] {
        assert!(user.refuses(tag, "f", &rest).starts_with("EROFS: "));
    }
    user.say(PUT, &put(&[("f", 0o600, Some(b"x"))], false));
    let (tag, why) = user.hear();
    assert_eq!((tag, &why[..7]), (ERROR, &b"EROFS: "[..]));
    assert_eq!(fs::read(folder.inside("f")).unwrap(), b"mine");
}

#[test]
fn the_holes_of_a_file_are_told() {
    let folder = Folder::new();
    let file = fs::File::create(folder.inside("f")).unwrap();
    file.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"data", 32 << 20).unwrap();
    let mut user = User::to(&folder);
    let (_, segments) = user.ask(MAP, "f", &[0; 8]);
    assert_eq!(segments.len(), 16);
    assert_eq!(segments[..8], (32u64 << 20).to_be_bytes());
}

#[test]
fn what_has_too_long_a_path_is_told_by_its_folder() {
    let folder = Folder::new();
    // No path that is given to the system may be so long.
    let way = vec!["n".repeat(255); 16];
    let mut at = fs::File::open(folder.inside("")).unwrap();
    for name in &way {
        rustix::fs::mkdirat(&at, name.as_str(), Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, name.as_str(), OFlags::DIRECTORY, Mode::empty())
            .unwrap()
            .into();
    }
    rustix::fs::mkdirat(&at, "below", Mode::RWXU).unwrap();
    let mut user = User::to(&folder);
    let (tag, entries) = user.ask(LIST, "", b"");
    assert_eq!(tag, ENTRIES);
    let why = text("ENAMETOOLONG: File name too long");
    assert!(entries.ends_with(&[text(&way.join("/")), why].concat()));
}

#[test]
fn a_place_that_is_not_there_is_told_and_the_stream_ends() {
    let folder = Folder::new();
    let (user, tag, payload) = User::open("from", &folder.inside("nothing"));
    assert_eq!(tag, ERROR);
    assert!(payload.starts_with(b"ENOENT: "));
    user.served.join().unwrap().unwrap();
}

#[test]
fn a_request_that_makes_no_sense_or_is_too_long_ends_the_stream() {
    let folder = Folder::new();
    for (tag, payload) in [
        (0x20, text("f")),
        (READ, text("f")),
        (WRITE, vec![0xff; 40]),
        (PUT, vec![0xff; 40]),
        (PUT, summed(&[0, 0, 0, 0, 9])),
        (PUT, summed(b"\0\0\0\0\0left")),
        (GET, get(&[("f", 1 << 20), ("f", 4096)])),
    ] {
        let mut user = User::to(&folder);
        user.say(tag, &payload);
        assert!(user.served.join().unwrap().is_err());
    }
    let mut user = User::to(&folder);
    user.line.write_all(&[PUT, 0xff, 0xff, 0xff, 0xff]).unwrap();
    assert!(user.served.join().unwrap().is_err());
}
