//! The user that everything runs as, found without a user database where there is none.

use std::ffi::OsStr;
use std::fs;
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
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let entry = passwd_entry(&passwd, sys::user_id());
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let name = entry.map(|entry| entry.name.to_owned());
        let name = name.or_else(|| variable("USER")?.into_string().ok());
        let home = entry.map(|entry| PathBuf::from(entry.home));
        let home = home.or_else(|| variable("HOME").map(PathBuf::from));
        let login = entry
            .map(|entry| PathBuf::from(entry.shell))
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
    name: &'a str,
    home: &'a str,
    shell: &'a str,
}

fn passwd_entry(passwd: &str, id: u32) -> Option<Entry<'_>> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields[..] {
            [name, _, uid, _, _, home, shell] if uid.parse() == Ok(id) => {
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
    fn the_passwd_entry_of_a_user_is_found_by_its_id() {
        let passwd =
            "root:x:0:0::/root:/bin/ash\nbroken\nme:x:1000:1000:,,,:/home/me:/sbin/nologin\n";
        assert_eq!(passwd_entry(passwd, 1000).unwrap().home, "/home/me");
        assert_eq!(passwd_entry(passwd, 0).unwrap().shell, "/bin/ash");
        assert!(passwd_entry(passwd, 7).is_none());
        assert!(!is_login_shell(Path::new("/sbin/nologin")));
    }
}
