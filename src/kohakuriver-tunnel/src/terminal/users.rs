//! As whom a command runs: the container's own `/etc/passwd` and `/etc/group`, read as an engine's exec does.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

/// What a process is to become.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// The user that is called so: `NAME` or `NUMBER`, with `:GROUP` or without. The error says which one there is not.
pub fn find(called: &OsStr) -> Result<User, String> {
    let called = String::from_utf8_lossy(called.as_bytes()).into_owned();
    let read = |path| match std::fs::read(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(format!("{path}: {error}")),
        text => Ok(String::from_utf8_lossy(&text.unwrap_or_default()).into_owned()),
    };
    find_in(&called, &read("/etc/passwd")?, &read("/etc/group")?)
}

fn find_in(called: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (name, wanted_group) = match called.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (called, None),
    };
    let mut lines = passwd.lines().map(fields).filter(|line| line.len() >= 4);
    let number = name.parse::<u32>().ok();
    let entry =
        lines.find(|line| line[0] == name || (number.is_some() && line[2].parse().ok() == number));
    let (uid, mut gid, home) = match (&entry, number) {
        (Some(line), _) => (parsed(line[2])?, parsed(line[3])?, line.get(5).copied()),
        (None, Some(number)) => (number, 0, None),
        (None, None) => return Err(format!("there is no user {name:?} in the container")),
    };
    let mut groups = Vec::new();
    if let Some(wanted) = wanted_group {
        gid = group_number(wanted, group)?;
    } else if let Some(line) = &entry {
        groups = member_of(line[0], group);
    }
    Ok(User {
        uid,
        gid,
        groups,
        home: home
            .filter(|home| !home.is_empty())
            .unwrap_or("/")
            .to_owned(),
    })
}

fn fields(line: &str) -> Vec<&str> {
    line.trim().split(':').collect()
}

fn parsed(number: &str) -> Result<u32, String> {
    number
        .parse()
        .map_err(|_| format!("{number:?} in the container's /etc/passwd is no number"))
}

fn group_number(wanted: &str, group: &str) -> Result<u32, String> {
    let named = group.lines().map(fields).find(|line| line[0] == wanted);
    let number = named.and_then(|line| line.get(2)?.parse().ok());
    number
        .or_else(|| wanted.parse().ok())
        .ok_or_else(|| format!("there is no group {wanted:?} in the container"))
}

fn member_of(name: &str, group: &str) -> Vec<u32> {
    let has = |line: &Vec<&str>| line.len() >= 4 && line[3].split(',').any(|member| member == name);
    let lines = group.lines().map(fields).filter(has);
    lines.filter_map(|line| line[2].parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nme:x:1000:1001::/home/me:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:you,me\nwheel:x:10:me\n";

    #[test]
    fn a_user_is_who_the_container_says() {
        let me = find_in("me", PASSWD, GROUP).unwrap();
        assert_eq!((me.uid, me.gid, &me.home[..]), (1000, 1001, "/home/me"));
        assert_eq!(me.groups, [50, 10]);
        assert_eq!(find_in("1000", PASSWD, GROUP).unwrap(), me);
        let staff = find_in("me:staff", PASSWD, GROUP).unwrap();
        assert_eq!((staff.gid, staff.groups.len()), (50, 0));
        let unknown = find_in("7:8", PASSWD, GROUP).unwrap();
        assert_eq!((unknown.uid, unknown.gid, &unknown.home[..]), (7, 8, "/"));
    }

    #[test]
    fn whom_there_is_not_is_named() {
        assert!(
            find_in("nobody", PASSWD, GROUP)
                .unwrap_err()
                .contains("nobody")
        );
        assert!(
            find_in("me:none", PASSWD, GROUP)
                .unwrap_err()
                .contains("none")
        );
    }
}
