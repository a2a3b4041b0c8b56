//! This container's token, and proof that this is the client that it was before (docs/protocol.md §5).

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Mutex;

use data_encoding::HEXLOWER;

use crate::log;
use crate::sys;

/// Where the token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file that stays.
    File(PathBuf),
    /// In a file that is removed once it is read, so that nobody else reads it.
    Taken(PathBuf),
    /// It was given.
    Given(Secret),
}

/// A token that nobody gets to see by mistake.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("…")
    }
}

/// The token, and this client's own id, made at random when it starts.
pub struct Token {
    place: Option<Place>,
    held: Mutex<Option<String>>,
    /// The id, in letters that a header takes.
    pub client: String,
}

impl Token {
    /// The token at a place; none for a runner that wants none.
    pub fn new(place: Option<Place>) -> Self {
        let mut id = [0; 16];
        sys::random(&mut id);
        Self {
            place,
            held: Mutex::new(None),
            client: HEXLOWER.encode(&id),
        }
    }

    /// Reads the first token from a descriptor of this process, and closes that, so that no command gets it. An error is
    /// a clause.
    pub fn read_first(&self, descriptor: RawFd) -> Result<(), String> {
        let of = format!("descriptor {descriptor}");
        let mut text = String::new();
        sys::inherited(descriptor)
            .and_then(|mut file| file.read_to_string(&mut text))
            .map_err(|error| format!("{of}: {error}"))?;
        let mut held = self.held.lock().unwrap_or_else(|held| held.into_inner());
        *held = Some(checked(&text).ok_or_else(|| format!("{of}: holds no token"))?);
        Ok(())
    }

    /// The token: a newer one where there is one, else the one that is held. An error is a clause.
    pub fn now(&self) -> Result<Option<String>, String> {
        let mut held = self.held.lock().unwrap_or_else(|held| held.into_inner());
        let Some(place) = &self.place else {
            return Ok(held.clone());
        };
        match (read(place), &*held) {
            (Ok(token), _) => *held = Some(token),
            (Err(reason), None) => return Err(reason),
            (Err(_), Some(_)) => {}
        }
        Ok(held.clone())
    }

    /// Whether there is one to be taken.
    pub fn is_there(&self) -> bool {
        matches!(&self.place, Some(Place::Taken(path)) if path.exists())
    }

    /// Takes what is to be taken while it is good: now, as the runner says that it is there, or before a command is
    /// started that could read it.
    pub fn take(&self) {
        if let Some(Place::Taken(_)) = self.place {
            let _ = self.now();
        }
    }
}

fn read(place: &Place) -> Result<String, String> {
    let path = match place {
        Place::Given(secret) => return Ok(secret.0.clone()),
        Place::File(path) | Place::Taken(path) => path,
    };
    let unreadable = |reason: &str| format!("{}: {reason}", path.display());
    let text = fs::read_to_string(path).map_err(|error| unreadable(&error.to_string()))?;
    let token = checked(&text).ok_or_else(|| unreadable("holds no token"))?;
    if let Place::Taken(path) = place {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log!(Warn, "{}: can't be removed: {error}", path.display());
            }
            _ => {}
        }
    }
    Ok(token)
}

/// The token in a text, if it is one.
fn checked(text: &str) -> Option<String> {
    let token = text.trim();
    let is_one = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    is_one.then(|| token.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn file(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("kr-token-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder.join("token")
    }

    #[test]
    fn a_token_that_is_taken_is_held_and_its_file_is_gone_until_there_is_a_newer_one() {
        let path = file("taken");
        let token = Token::new(Some(Place::Taken(path.clone())));
        assert!(token.now().is_err());
        fs::write(&path, "one\n").unwrap();
        assert!(token.is_there());
        token.take();
        assert!(!path.exists() && !token.is_there());
        assert_eq!(token.now().unwrap().as_deref(), Some("one"));
        fs::write(&path, "two").unwrap();
        assert_eq!(token.now().unwrap().as_deref(), Some("two"));
        assert!(!path.exists());
        fs::remove_dir(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_first_token_from_a_descriptor_is_held_until_there_is_a_newer_one_and_the_descriptor_is_closed()
     {
        let path = file("descriptor");
        let token = Token::new(Some(Place::Taken(path.clone())));
        fs::write(&path, "one\n").unwrap();
        let descriptor = fs::File::open(&path).unwrap().into_raw_fd();
        fs::remove_file(&path).unwrap();
        token.read_first(descriptor).unwrap();
        assert_eq!(token.now().unwrap().as_deref(), Some("one"));
        assert!(!std::path::Path::new(&format!("/proc/self/fd/{descriptor}")).exists());
        assert!(token.read_first(1 << 20).is_err());
        fs::write(&path, "two").unwrap();
        assert_eq!(token.now().unwrap().as_deref(), Some("two"));
        fs::remove_dir(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_token_in_a_file_that_stays_is_left_there() {
        let path = file("stays");
        fs::write(&path, "one").unwrap();
        let token = Token::new(Some(Place::File(path.clone())));
        token.take();
        assert_eq!(token.now().unwrap().as_deref(), Some("one"));
        assert!(path.exists());
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn each_client_has_an_id_of_its_own() {
        let [one, two] = [Token::new(None), Token::new(None)];
        assert_eq!(one.client.len(), 32);
        assert_ne!(one.client, two.client);
        assert_eq!(one.now().unwrap(), None);
    }
}
