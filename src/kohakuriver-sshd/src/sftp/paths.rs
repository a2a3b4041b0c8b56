//! Requests about paths (draft-ietf-secsh-filexfer-02 §6.5, §6.6, §6.8 to §6.11).

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Server;
use super::attributes::Wanted;
use super::protocol::{Done, Refused, kind, status};
use crate::wire::{Malformed, Put, Reader};

impl Server {
    pub(super) fn set_attributes(
        &self,
        reader: &mut Reader<'_>,
        follow: bool,
    ) -> Result<(), Refused> {
        let path = self.path(reader)?;
        Wanted::read(reader)?.apply(&path, follow)?;
        Ok(())
    }

    pub(super) fn make_directory(&self, reader: &mut Reader<'_>) -> Result<(), Refused> {
        let path = self.path(reader)?;
        let mode = Wanted::read(reader)?.mode.unwrap_or(0o777);
        fs::DirBuilder::new().mode(mode & 0o7777).create(path)?;
        Ok(())
    }

    pub(super) fn rename(&self, reader: &mut Reader<'_>) -> Result<(), Refused> {
        let (from, to) = (self.path(reader)?, self.path(reader)?);
        if fs::symlink_metadata(&to).is_ok() {
            return Err(Refused::Status(
                status::FAILURE,
                "there is something of that name already",
            ));
        }
        fs::rename(from, to)?;
        Ok(())
    }

    pub(super) fn link(&self, reader: &mut Reader<'_>) -> Result<(), Refused> {
        // OpenSSH's order, not the draft's: what it points to comes first.
        let target = PathBuf::from(OsStr::from_bytes(reader.string()?));
        std::os::unix::fs::symlink(target, self.path(reader)?)?;
        Ok(())
    }

    /// Something to ask a file's system about; the file itself isn't opened.
    pub(super) fn place(&self, reader: &mut Reader<'_>) -> Result<File, Refused> {
        Ok(OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(self.path(reader)?)?)
    }

    /// The next string as a path; relative ones begin at home.
    pub(super) fn path(&self, reader: &mut Reader<'_>) -> Result<PathBuf, Malformed> {
        Ok(self.home.join(OsStr::from_bytes(reader.string()?)))
    }

    /// `~` is home, as a shell has it; other users' homes aren't known here.
    pub(super) fn expand(&self, path: &[u8]) -> Result<PathBuf, Refused> {
        match path {
            b"~" => Ok(self.home.clone()),
            [b'~', b'/', rest @ ..] => Ok(self.home.join(OsStr::from_bytes(rest))),
            [b'~', ..] => Err(Refused::Status(
                status::FAILURE,
                "the home of another user isn't known",
            )),
            _ => Ok(self.home.join(OsStr::from_bytes(path))),
        }
    }
}

pub(super) fn one_name(path: &Path, reply: &mut Vec<u8>) -> Done {
    let name = path.as_os_str().as_bytes();
    reply.put_u32(1);
    reply.put_string(name);
    reply.put_string(name);
    reply.put_u32(0);
    Ok(kind::NAME)
}

/// The full path without links. The last part may be missing: clients ask before they create it.
pub(super) fn real_path(path: &Path) -> io::Result<PathBuf> {
    match (path.canonicalize(), path.parent(), path.file_name()) {
        (Err(error), Some(parent), Some(name)) if error.kind() == io::ErrorKind::NotFound => {
            Ok(parent.canonicalize()?.join(name))
        }
        (result, ..) => result,
    }
}
