//! The data types of RFC 4251 §5: what every SSH and SFTP message is made of.

/// A message that ends too soon, or holds a value that it may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// Reads a message from its front. All reads go through [`Reader::take`], the one bounds check.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first byte of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `length` bytes.
    pub fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        if length > self.rest.len() {
            return Err(Malformed);
        }
        let (head, tail) = self.rest.split_at(length);
        self.rest = tail;
        Ok(head)
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Malformed)
        }
    }

    /// What has not been read.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// A `byte`.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.take(1)?[0])
    }

    /// A `boolean`: anything but 0 is true.
    pub fn bool(&mut self) -> Result<bool, Malformed> {
        Ok(self.u8()? != 0)
    }

    /// A `uint32`.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A `uint64`.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from(self.u32()?) << 32 | u64::from(self.u32()?))
    }

    /// A `string`: any bytes.
    pub fn string(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.u32()? as usize;
        self.take(length)
    }

    /// A `string` that has to be UTF-8.
    pub fn text(&mut self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.string()?).map_err(|_| Malformed)
    }

    /// An unsigned `mpint`, without its leading zeros.
    pub fn mpint(&mut self) -> Result<&'a [u8], Malformed> {
        let bytes = self.string()?;
        if bytes.first().is_some_and(|first| first & 0x80 != 0) {
            return Err(Malformed);
        }
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        Ok(&bytes[zeros..])
    }
}

/// Appends the same types to a message.
pub trait Put {
    /// A `byte`.
    fn put_u8(&mut self, value: u8);
    /// Bytes as they are, without a length.
    fn put_raw(&mut self, bytes: &[u8]);

    /// A `boolean`.
    fn put_bool(&mut self, value: bool) {
        self.put_u8(u8::from(value));
    }

    /// A `uint32`.
    fn put_u32(&mut self, value: u32) {
        self.put_raw(&value.to_be_bytes());
    }

    /// A `uint64`.
    fn put_u64(&mut self, value: u64) {
        self.put_raw(&value.to_be_bytes());
    }

    /// A `string`.
    fn put_string(&mut self, bytes: &[u8]) {
        self.put_u32(u32::try_from(bytes.len()).expect("a message is shorter than 4 GiB"));
        self.put_raw(bytes);
    }

    /// An `mpint` from an unsigned number's bytes, the most significant first.
    fn put_mpint(&mut self, bytes: &[u8]) {
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        let digits = &bytes[zeros..];
        let sign = digits.first().is_some_and(|first| first & 0x80 != 0);
        self.put_u32(u32::try_from(digits.len() + usize::from(sign)).expect("a key is short"));
        if sign {
            self.put_u8(0);
        }
        self.put_raw(digits);
    }
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }

    fn put_raw(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_that_claims_more_than_there_is_is_refused() {
        let mut message = Vec::new();
        message.put_u32(u32::MAX);
        message.put_raw(b"short");
        assert_eq!(Reader::new(&message).string(), Err(Malformed));
    }

    #[test]
    fn an_mpint_keeps_its_value_and_its_sign() {
        // The examples of RFC 4251 §5.
        for (digits, encoded) in [
            (&[0u8, 0][..], &[0u8, 0, 0, 0][..]),
            (&[0x80], &[0, 0, 0, 2, 0, 0x80]),
            (&[0, 0x9a, 0x37], &[0, 0, 0, 3, 0, 0x9a, 0x37]),
            (&[0x7f], &[0, 0, 0, 1, 0x7f]),
        ] {
            let mut message = Vec::new();
            message.put_mpint(digits);
            assert_eq!(message, encoded);
            let value: Vec<u8> = digits
                .iter()
                .copied()
                .skip_while(|digit| *digit == 0)
                .collect();
            assert_eq!(Reader::new(&message).mpint(), Ok(&value[..]));
        }
        assert_eq!(Reader::new(&[0, 0, 0, 1, 0x80]).mpint(), Err(Malformed));
    }
}
