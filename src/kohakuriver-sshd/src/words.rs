//! A command line as a shell would split it: quotes and backslashes (POSIX.1-2024, Shell Command Language §2.2).

/// A byte of a word, and whether the shell would see more in it than itself.
pub type Letter = (u8, bool);

/// A command line's words.
#[derive(Debug, Default)]
pub struct Words {
    /// The words.
    pub words: Vec<Vec<Letter>>,
    /// False where a quote was not closed, or nothing stood behind the last backslash.
    pub is_complete: bool,
}

/// Splits a line at spaces outside of quotes. None where a byte in it is `foreign`: that gets the byte and the quote that
/// it stands in.
pub fn split(line: &[u8], foreign: impl Fn(u8, Option<u8>) -> bool) -> Option<Words> {
    let mut found = Words {
        is_complete: true,
        ..Words::default()
    };
    let mut word: Option<Vec<Letter>> = None;
    let mut quote = None;
    let mut bytes = line.iter().copied();
    while let Some(byte) = bytes.next() {
        match (quote, byte) {
            (Some(open), _) if byte == open => quote = None,
            (None, b'\'' | b'"') => {
                quote = Some(byte);
                word.get_or_insert_default();
            }
            (None | Some(b'"'), b'\\') => {
                let word = word.get_or_insert_default();
                match bytes.next() {
                    Some(next) => {
                        if quote.is_some() && !b"$`\"\\".contains(&next) {
                            word.push((b'\\', false));
                        }
                        word.push((next, false));
                    }
                    None => found.is_complete = false,
                }
            }
            _ if foreign(byte, quote) => return None,
            (None, b' ' | b'\t' | b'\n') => found.words.extend(word.take()),
            _ => word.get_or_insert_default().push((byte, quote.is_none())),
        }
    }
    found.words.extend(word);
    found.is_complete &= quote.is_none();
    Some(found)
}

/// The bytes of a word.
pub fn plain(word: &[Letter]) -> Vec<u8> {
    word.iter().map(|(byte, _)| *byte).collect()
}
