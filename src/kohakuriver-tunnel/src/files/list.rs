//! What is in a folder, and in all folders in it.

use std::io::{self, Write};

use rustix::fs::{self as sys, AtFlags, Dir, FileType, Stat};
use rustix::io::Errno;

use super::tree::Tree;
use super::wire::{LONGEST_PATH, Taken, reply, sentence, tag};

/// How much is told in one answer, about.
const ANSWER: usize = 64 << 10;
/// An entry whose file has holes.
const SPARSE: u8 = 1;

/// Tells all that is below a path, each folder before what is in it, or what a file is. An empty path is the root: what
/// is in it is told, or the one name that there is.
pub fn list(tree: &mut Tree, path: &[u8], to: &mut impl Write) -> io::Result<io::Result<()>> {
    let one = match tree.only() {
        Some(only) if path.is_empty() => Some(only.to_vec()),
        _ if path.is_empty() => None,
        _ => Some(path.to_vec()),
    };
    let mut told = Vec::new();
    let root = match one {
        None => {
            let about = sys::fstat(tree.inside(b"")?)?;
            tell(b'd', Some(&about), b"", b"", &mut told);
            Some(Vec::new())
        }
        Some(path) => match entry(tree, &path, &mut told) {
            Ok(is_folder) => is_folder.then_some(path),
            Err(error) => return Ok(Err(error)),
        },
    };
    // All names before anything is told: who hears of the first ones may make more, in a folder of these.
    let folders = root.map(|root| all_names(tree, root)).unwrap_or_default();
    for (folder, names) in folders {
        let looked_at = match names {
            Ok(names) => inside(tree, &folder, &names, &mut told, to)?,
            Err(error) => Err(error),
        };
        if let Err(error) = looked_at {
            failed(&folder, &error, &mut told);
        }
    }
    reply(to, tag::ENTRIES, &told)?;
    reply(to, tag::DONE, &[Taken::All as u8]).map(Ok)
}

type Names = Vec<Vec<u8>>;

/// All folders from one on, each before those in it, and the names in each.
fn all_names(tree: &mut Tree, root: Vec<u8>) -> Vec<(Vec<u8>, io::Result<Names>)> {
    let mut all = Vec::new();
    let mut folders = vec![root];
    while let Some(folder) = folders.pop() {
        let mut below = Vec::new();
        let names = names(tree, &folder, &mut below);
        below.sort_unstable();
        let below = below.iter().rev().map(|name| join(&folder, name));
        folders.extend(below.filter(|path| path.len() <= LONGEST_PATH));
        all.push((folder, names));
    }
    all
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    match folder {
        b"" => name.to_vec(),
        folder => [folder, name].join(&b'/'),
    }
}

/// What the names in one folder are.
fn inside(
    tree: &mut Tree,
    folder: &[u8],
    names: &Names,
    told: &mut Vec<u8>,
    to: &mut impl Write,
) -> io::Result<io::Result<()>> {
    let mut too_long = false;
    for name in names {
        let path = join(folder, name);
        if path.len() > LONGEST_PATH {
            too_long = true;
            continue;
        }
        match entry(tree, &path, told) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failed(&path, &error, told),
        }
        if told.len() >= ANSWER {
            reply(to, tag::ENTRIES, told)?;
            told.clear();
        }
    }
    // The path itself can't be told.
    Ok(if too_long {
        Err(Errno::NAMETOOLONG.into())
    } else {
        Ok(())
    })
}

/// The names in a folder, in order; those that are folders are added to `below`.
fn names(tree: &mut Tree, folder: &[u8], below: &mut Names) -> io::Result<Names> {
    let mut names = Vec::new();
    let folder = tree.inside(folder)?;
    for each in Dir::read_from(folder)? {
        let each = each?;
        let name = each.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match each.file_type() {
            FileType::Unknown => sys::statat(folder, each.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                .map_or(FileType::Unknown, |about| {
                    FileType::from_raw_mode(about.st_mode)
                }),
            kind => kind,
        };
        if kind == FileType::Directory {
            below.push(name.to_vec());
        }
        names.push(name.to_vec());
    }
    names.sort_unstable();
    Ok(names)
}

/// One entry; whether it is a folder.
fn entry(tree: &mut Tree, path: &[u8], told: &mut Vec<u8>) -> io::Result<bool> {
    let (folder, name) = tree.place(path)?;
    let about = sys::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(about.st_mode);
    let (letter, target) = match kind {
        FileType::RegularFile => (b'f', Vec::new()),
        FileType::Directory => (b'd', Vec::new()),
        FileType::Symlink => {
            let target = sys::readlinkat(folder, name, Vec::new())?;
            (b'l', target.into_bytes())
        }
        _ => (b'o', Vec::new()),
    };
    tell(letter, Some(&about), path, &target, told);
    Ok(kind == FileType::Directory)
}

/// An entry that says why something is missing.
fn failed(path: &[u8], error: &io::Error, told: &mut Vec<u8>) {
    tell(b'e', None, path, sentence(error).as_bytes(), told);
}

fn tell(kind: u8, about: Option<&Stat>, path: &[u8], target: &[u8], told: &mut Vec<u8>) {
    let file = about.filter(|_| kind == b'f');
    let sparse = file.is_some_and(|about| about.st_blocks * 512 < about.st_size);
    let (device, number) = match file {
        Some(about) if about.st_nlink > 1 => (about.st_dev, about.st_ino),
        _ => (0, 0),
    };
    told.push(kind);
    told.push(if sparse { SPARSE } else { 0 });
    told.extend_from_slice(
        &about
            .map_or(0, |about| about.st_mode & 0o7777)
            .to_be_bytes(),
    );
    told.extend_from_slice(&about.map_or(0, |about| about.st_uid).to_be_bytes());
    told.extend_from_slice(&about.map_or(0, |about| about.st_gid).to_be_bytes());
    told.extend_from_slice(&about.map_or(0, |about| about.st_mtime).to_be_bytes());
    told.extend_from_slice(
        &about
            .map_or(0, |about| about.st_mtime_nsec as u32)
            .to_be_bytes(),
    );
    told.extend_from_slice(&file.map_or(0, |about| about.st_size as u64).to_be_bytes());
    told.extend_from_slice(&device.to_be_bytes());
    told.extend_from_slice(&number.to_be_bytes());
    for text in [path, target] {
        told.extend_from_slice(&(text.len() as u16).to_be_bytes());
        told.extend_from_slice(text);
    }
}
