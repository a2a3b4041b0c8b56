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
    let mut folders = Vec::new();
    match one {
        None => {
            let about = sys::fstat(tree.inside(b"")?)?;
            tell(b'd', Some(&about), b"", b"", &mut told);
            folders.push(Vec::new());
        }
        Some(path) => match entry(tree, &path, &mut told) {
            Ok(true) => folders.push(path),
            Ok(false) => {}
            Err(error) => return Ok(Err(error)),
        },
    }
    while let Some(folder) = folders.pop() {
        if let Err(error) = inside(tree, &folder, &mut told, &mut folders, to)? {
            failed(&folder, &error, &mut told);
        }
    }
    reply(to, tag::ENTRIES, &told)?;
    reply(to, tag::DONE, &[Taken::All as u8]).map(Ok)
}

/// What is in one folder; those in it are added to `folders`.
fn inside(
    tree: &mut Tree,
    folder: &[u8],
    told: &mut Vec<u8>,
    folders: &mut Vec<Vec<u8>>,
    to: &mut impl Write,
) -> io::Result<io::Result<()>> {
    let mut names = match names(tree, folder) {
        Ok(names) => names,
        Err(error) => return Ok(Err(error)),
    };
    names.sort_unstable();
    let first = folders.len();
    let mut too_long = false;
    for name in names {
        let path = match folder {
            b"" => name,
            folder => [folder, &name].join(&b'/'),
        };
        if path.len() > LONGEST_PATH {
            too_long = true;
            continue;
        }
        match entry(tree, &path, told) {
            Ok(true) => folders.push(path),
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failed(&path, &error, told),
        }
        if told.len() >= ANSWER {
            reply(to, tag::ENTRIES, told)?;
            told.clear();
        }
    }
    folders[first..].reverse();
    // The path itself can't be told.
    Ok(if too_long {
        Err(Errno::NAMETOOLONG.into())
    } else {
        Ok(())
    })
}

fn names(tree: &mut Tree, folder: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for each in Dir::read_from(tree.inside(folder)?)? {
        let name = each?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
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
