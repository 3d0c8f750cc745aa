//! A suffix store on disk: its texts alone, since the index is made again in a fraction of a second.
//!
//! Little-endian: `FARTHSFX`, version (u32), number of texts (u32), then for each its length (u32) and tokens (u32 each),
//! then a checksum (u64) of all before.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::store::SuffixStore;
use crate::checksum::checksum;
use crate::error::Error;
use crate::load::FormatError;

const MAGIC: &[u8; 8] = b"FARTHSFX";
const VERSION: u32 = 1;

impl SuffixStore {
    /// Writes the store to `path`, whole or not at all.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let failed =
            |error: std::io::Error| Error::Store { file: path.display().to_string(), reason: error.to_string() };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        let mut texts = 0u32;
        self.for_each_text(|tokens| {
            texts += 1;
            bytes.extend_from_slice(&(tokens.len() as u32).to_le_bytes());
            bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        });
        bytes[12..16].copy_from_slice(&texts.to_le_bytes());
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());

        let unfinished = unfinished(path);
        let written = (|| {
            let mut file = File::create(&unfinished)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&unfinished, path)
        })();
        if written.is_err() {
            // The error is that of the writing; a rest that can't be removed changes nothing about it.
            let _ = fs::remove_file(&unfinished);
        }
        written.map_err(failed)
    }

    /// Adds the texts of a file that [`SuffixStore::save`] wrote, the newest last; nothing where it is damaged.
    pub fn load(&self, path: &Path) -> Result<(), Error> {
        let name = || path.display().to_string();
        let refused = |error: std::io::Error| FormatError::Io { file: name(), got: error.to_string() };
        // Before opening: to open a pipe would block.
        let kind = fs::metadata(path).map_err(refused)?.file_type();
        if !kind.is_file() {
            let got = if kind.is_dir() { "a directory" } else { "a device or a pipe" };
            return Err(FormatError::NotAFile { file: name(), got }.into());
        }
        let bytes = fs::read(path).map_err(refused)?;
        let damaged = |(expected, got)| FormatError::Suffixes { file: name(), expected, got };
        Ok(self.load_texts(&name(), checked(&bytes).map_err(damaged)?)?)
    }

    /// The same from the bytes of a file of that name, without their checksum.
    pub fn load_texts(&self, file: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let damaged = |(expected, got)| FormatError::Suffixes { file: file.to_owned(), expected, got };
        for text in parse(bytes).map_err(damaged)? {
            let tokens: Vec<u32> = text.iter().map(|token| u32::from_le_bytes(*token)).collect();
            self.append(self.open(), &tokens);
        }
        Ok(())
    }
}

/// Beside `path`, so that to rename it is one operation.
fn unfinished(path: &Path) -> PathBuf {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}-{count}.unfinished", std::process::id()));
    PathBuf::from(name)
}

/// What was expected and what was got.
type Damage = (&'static str, String);

/// All but the checksum, which agrees.
fn checked(bytes: &[u8]) -> Result<&[u8], Damage> {
    if !bytes.starts_with(MAGIC) {
        return Err(("a file that starts with FARTHSFX", format!("{:02x?}", &bytes[..bytes.len().min(8)])));
    }
    let Some((body, sum)) = bytes.split_last_chunk::<8>() else {
        return Err(("at least 24 bytes", bytes.len().to_string()));
    };
    let (expected, got) = (checksum(body), u64::from_le_bytes(*sum));
    if expected != got {
        return Err(("a checksum that agrees", format!("{got:016x} where the bytes give {expected:016x}")));
    }
    Ok(body)
}

/// The texts of a file without its checksum.
fn parse(bytes: &[u8]) -> Result<Vec<&[[u8; 4]]>, Damage> {
    let Some((head, body)) = bytes.split_first_chunk::<16>() else {
        return Err(("at least 24 bytes", bytes.len().to_string()));
    };
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if word(8) != VERSION {
        return Err(("version 1", word(8).to_string()));
    }
    let (mut words, left) = body.as_chunks::<4>();
    if !left.is_empty() {
        return Err(("whole tokens", format!("{} bytes", body.len())));
    }
    let mut texts = Vec::new();
    for _ in 0..word(12) {
        let Some((length, behind)) = words.split_first() else {
            return Err(("the length of a text", "the end of the file".to_owned()));
        };
        let length = u32::from_le_bytes(*length) as usize;
        let Some((text, behind)) = behind.split_at_checked(length) else {
            return Err(("the tokens of a text", format!("{} of {length}", behind.len())));
        };
        texts.push(text);
        words = behind;
    }
    if words.is_empty() { Ok(texts) } else { Err(("the end of the file", format!("{} more words", words.len()))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("farthing-suffixes-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn saved(store: &SuffixStore, name: &str) -> Vec<u8> {
        let path = directory(name).join("store");
        store.save(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
        bytes
    }

    fn texts(store: &SuffixStore) -> Vec<Vec<u32>> {
        let mut all = Vec::new();
        store.for_each_text(|tokens| all.push(tokens.to_vec()));
        all
    }

    #[test]
    fn a_saved_store_comes_back() {
        let store = SuffixStore::new(1 << 20).unwrap();
        for text in [&[1u32, 2, 3][..], &[u32::MAX, 0], &[7]] {
            store.append(store.open(), text);
        }
        let directory = directory("back");
        let path = directory.join("store");
        store.save(&path).unwrap();
        store.save(&path).unwrap();
        let other = SuffixStore::new(1 << 20).unwrap();
        other.load(&path).unwrap();
        assert_eq!(texts(&other), texts(&store));
        assert!(matches!(other.load(&directory), Err(Error::Format(FormatError::NotAFile { .. }))));
        assert!(matches!(other.load(&directory.join("none")), Err(Error::Format(FormatError::Io { .. }))));
        assert!(matches!(store.save(&directory.join("none/store")), Err(Error::Store { .. })));
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn every_changed_byte_is_an_error() {
        let store = SuffixStore::new(1 << 20).unwrap();
        store.append(store.open(), &[1, 2, 3]);
        let bytes = saved(&store, "changed");
        assert_eq!(checked(&bytes).and_then(parse).unwrap().len(), 1);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            assert!(checked(&changed).and_then(parse).is_err(), "byte {at}");
            assert!(checked(&bytes[..at]).and_then(parse).is_err(), "{at} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_words_parse_or_are_refused(words in prop::collection::vec(0u32..6, 0..12), texts in 0u32..5) {
            let mut bytes = [&MAGIC[..], &VERSION.to_le_bytes(), &texts.to_le_bytes()].concat();
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            if let Ok(parsed) = parse(&bytes) {
                prop_assert_eq!(parsed.len(), texts as usize);
            }
        }
    }
}
