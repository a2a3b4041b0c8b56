//! The lines that `ls -l` shows in a client: the protocol has the server write them.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::sys;

/// What `ls -l` shows in a client: the protocol has the server write it.
#[derive(Default)]
pub(super) struct Names {
    users: Option<HashMap<u32, String>>,
    groups: Option<HashMap<u32, String>>,
}

impl Names {
    pub(super) fn describe(&mut self, meta: &Metadata) -> String {
        let users = self.users.get_or_insert_with(|| ids("/etc/passwd"));
        let user = users
            .get(&meta.uid())
            .cloned()
            .unwrap_or_else(|| meta.uid().to_string());
        let groups = self.groups.get_or_insert_with(|| ids("/etc/group"));
        let group = groups
            .get(&meta.gid())
            .cloned()
            .unwrap_or_else(|| meta.gid().to_string());
        let (mode, links, size) = (mode_text(meta.mode()), meta.nlink(), meta.len());
        format!(
            "{mode} {links:4} {user:8} {group:8} {size:8} {}",
            date_text(meta.mtime())
        )
    }
}

/// Names by number, of a file such as `/etc/passwd`.
pub(super) fn ids(path: &str) -> HashMap<u32, String> {
    let content = sys::read_file(Path::new(path)).unwrap_or_default();
    let text = String::from_utf8_lossy(&content);
    let entry = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        Some((fields.nth(1)?.parse().ok()?, name))
    };
    text.lines().filter_map(entry).collect()
}

pub(super) fn mode_text(mode: u32) -> String {
    let first = match mode & libc::S_IFMT {
        libc::S_IFDIR => 'd',
        libc::S_IFLNK => 'l',
        libc::S_IFCHR => 'c',
        libc::S_IFBLK => 'b',
        libc::S_IFIFO => 'p',
        libc::S_IFSOCK => 's',
        _ => '-',
    };
    let mut text = String::from(first);
    for (shift, special, mark) in [
        (6, libc::S_ISUID, 's'),
        (3, libc::S_ISGID, 's'),
        (0, libc::S_ISVTX, 't'),
    ] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, false) => mark.to_ascii_uppercase(),
            (true, true) => mark,
        });
    }
    text
}

/// Day and time of this half year, day and year of any other; UTC.
pub(super) fn date_text(seconds: i64) -> String {
    pub(super) const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    pub(super) const HALF_YEAR: i64 = 182 * 86400;
    let (year, month, day) = civil(seconds.div_euclid(86400));
    let month = MONTHS[month as usize - 1];
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs() as i64);
    if (now - HALF_YEAR..=now).contains(&seconds) {
        let minutes = seconds.rem_euclid(86400) / 60;
        format!("{month} {day:2} {:02}:{:02}", minutes / 60, minutes % 60)
    } else {
        format!("{month} {day:2}  {year}")
    }
}

/// Year, month and day of a day counted from 1970-01-01. Years begin in March here, so that the leap day is their last.
pub(super) fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates_also_around_leap_days() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (-1, (1969, 12, 31)),
            (20_514, (2026, 3, 2)),
        ] {
            assert_eq!(civil(days), date, "{days}");
        }
    }

    #[test]
    fn modes_read_as_ls_writes_them() {
        assert_eq!(mode_text(libc::S_IFREG | 0o644), "-rw-r--r--");
        assert_eq!(mode_text(libc::S_IFDIR | 0o1777), "drwxrwxrwt");
        assert_eq!(mode_text(libc::S_IFREG | 0o4654), "-rwSr-xr--");
    }
}
