//! The user that everything runs as, found without a user database where there is none.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::sys;

const SHELLS: [&str; 3] = ["/bin/bash", "/bin/ash", "/bin/sh"];
const NO_SHELLS: [&str; 3] = ["nologin", "false", "sync"];

/// The user that everything runs as: whoever started this server.
#[derive(Debug, Clone)]
pub struct User {
    /// The login name.
    pub name: String,
    /// Where sessions begin; `/` where the user's home is missing.
    pub home: PathBuf,
    /// The shell; None where there is none.
    pub shell: Option<PathBuf>,
}

impl User {
    /// The user of this process. `/etc/passwd` may be missing; `shell` comes before what is found.
    pub fn of_this_process(shell: Option<PathBuf>) -> Self {
        let passwd = sys::read_file(Path::new("/etc/passwd")).unwrap_or_default();
        let entry = passwd_entry(&passwd, sys::user_id());
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let name = entry.and_then(|entry| Some(str::from_utf8(entry.name).ok()?.to_owned()));
        let name = name.or_else(|| variable("USER")?.into_string().ok());
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        let home = entry.map(|entry| path(entry.home));
        let home = home.or_else(|| variable("HOME").map(PathBuf::from));
        let login = entry
            .map(|entry| path(entry.shell))
            .filter(|shell| is_login_shell(shell));
        let asked = variable("SHELL").map(PathBuf::from);
        let found = [shell, asked, login]
            .into_iter()
            .flatten()
            .chain(SHELLS.map(PathBuf::from));
        Self {
            name: name.unwrap_or_else(|| if sys::user_id() == 0 { "root" } else { "user" }.into()),
            home: home
                .filter(|home| home.is_absolute() && home.is_dir())
                .unwrap_or_else(|| "/".into()),
            shell: found.into_iter().find(|shell| is_executable(shell)),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    name: &'a [u8],
    home: &'a [u8],
    shell: &'a [u8],
}

/// The file's other fields, people's names above all, are in any encoding.
fn passwd_entry(passwd: &[u8], id: u32) -> Option<Entry<'_>> {
    let id = id.to_string();
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        match fields[..] {
            [name, _, uid, _, _, home, shell] if uid == id.as_bytes() => {
                Some(Entry { name, home, shell })
            }
            _ => None,
        }
    })
}

fn is_login_shell(shell: &Path) -> bool {
    !NO_SHELLS
        .iter()
        .any(|name| shell.file_name() == Some(OsStr::new(name)))
}

/// Is this the full path of a program?
pub fn is_executable(path: &Path) -> bool {
    path.is_absolute()
        && fs::metadata(path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_passwd_entry_of_a_user_is_found_by_its_id_in_a_file_of_any_encoding() {
        let passwd =
            b"root:x:0:0::/root:/bin/ash\nbroken\nme:x:1000:1000:M\xfcller:/home/me:/sbin/nologin\n";
        assert_eq!(passwd_entry(passwd, 1000).unwrap().home, b"/home/me");
        assert_eq!(passwd_entry(passwd, 0).unwrap().shell, b"/bin/ash");
        assert!(passwd_entry(passwd, 7).is_none());
        assert!(!is_login_shell(Path::new("/sbin/nologin")));
    }
}
