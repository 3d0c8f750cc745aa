//! Read-only bytes of a model file, mapped from disk or held in memory.

use std::fs::{self, File};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use memmap2::{Mmap, MmapOptions};

use super::error::FormatError;
use crate::checksum::checksum;

enum Bytes {
    Map(Mmap),
    Owned(Vec<u8>),
}

/// The whole of a file. Dereferences to its bytes.
pub(super) struct Mapped {
    bytes: Bytes,
    /// Where it lies, and when it was last written.
    origin: Option<(PathBuf, SystemTime)>,
}

impl Mapped {
    pub(super) fn open(path: &Path) -> Result<Mapped, FormatError> {
        let name = || path.display().to_string();
        let refused = |error: std::io::Error| FormatError::Io { file: name(), got: error.to_string() };
        // Before opening: to open a pipe would block.
        let kind = fs::metadata(path).map_err(refused)?.file_type();
        if !kind.is_file() {
            let got = if kind.is_dir() { "a directory" } else { "a device or a pipe" };
            return Err(FormatError::NotAFile { file: name(), got });
        }
        let file = File::open(path).map_err(refused)?;
        let expected = file.metadata().map_err(refused)?.len();
        let Ok(length) = usize::try_from(expected) else {
            return Err(FormatError::Io { file: name(), got: format!("{expected} bytes, more than an address space") });
        };
        if length == 0 {
            return Ok(Mapped::from(Vec::new()));
        }
        // SAFETY: the mapping is private and read-only, and its length is that of the file now and, checked below, after
        // mapping. What remains is the hazard of every map: a process that truncates or rewrites the file later makes
        // reads fault or change. Parsed offsets are not read again, and each access checks its bounds against the length
        // of the map, so changed bytes give wrong weights, never an access outside the map.
        let map = unsafe { MmapOptions::new().len(length).map_copy_read_only(&file) }.map_err(refused)?;
        let metadata = file.metadata().map_err(refused)?;
        let got = metadata.len();
        if got != expected {
            return Err(FormatError::FileChanged { file: name(), got, expected });
        }
        let origin = metadata.modified().ok().map(|modified| (path.to_path_buf(), modified));
        Ok(Mapped { bytes: Bytes::Map(map), origin })
    }

    /// Where it lies; nowhere for bytes in memory.
    pub(super) fn path(&self) -> &Path {
        self.origin.as_ref().map_or(Path::new(""), |(path, _)| path)
    }

    /// A line that changes with the file: path, length, time of the last change, a checksum of its two ends.
    pub(super) fn identity(&self) -> String {
        const END: usize = 1 << 20;
        let modified = self.origin.as_ref().map_or(UNIX_EPOCH, |&(_, modified)| modified);
        let path = fs::canonicalize(self.path()).unwrap_or_else(|_| self.path().to_path_buf());
        let nanoseconds = modified.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let (head, tail) = (&self[..self.len().min(END)], &self[self.len().saturating_sub(END)..]);
        let sum = checksum(head) ^ checksum(tail).rotate_left(1);
        format!("{}, {} bytes of {nanoseconds}, {sum:016x}\n", path.display(), self.len())
    }

    /// Drops the pages of `range` from memory; a later read fetches them from the file again.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Bytes::Map(map) = &self.bytes
            && !range.is_empty()
            && range.end <= map.len()
        {
            // SAFETY: the mapping is file-backed and never written, so dropped pages come back with the file's bytes.
            let dropped =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
            // Advice only: pages that stay cost memory, not correctness.
            drop(dropped);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }
}

impl From<Vec<u8>> for Mapped {
    fn from(bytes: Vec<u8>) -> Mapped {
        Mapped { bytes: Bytes::Owned(bytes), origin: None }
    }
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Map(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}
