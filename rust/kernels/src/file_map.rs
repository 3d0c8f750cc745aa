//! A file of packed weights in the address space: parts of it are fetched and given back one by one.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::{Mmap, MmapOptions};

/// Bytes that a part of a map starts at a multiple of, so that it suits the kernels as memory of our own does.
const CACHE_LINE: usize = 64;
/// The smallest page of any system.
const PAGE: usize = 4096;

/// A read-only map of a whole file. What is read without having been fetched is fetched then, slowly.
///
/// As with every map, a process that truncates the file later makes reads fault; one that rewrites it changes what is read.
#[derive(Debug)]
pub struct FileMap {
    map: Mmap,
    file: File,
}

impl FileMap {
    /// Maps `file`, which is not empty.
    pub fn new(file: File) -> io::Result<FileMap> {
        // SAFETY: the mapping is private and read-only; what remains is the hazard that the type's documentation names.
        // Readers check bounds against the length of the map alone and take nothing in it for an address.
        let map = unsafe { MmapOptions::new().map_copy_read_only(&file) }?;
        Ok(FileMap { map, file })
    }

    /// Fetches `range` from the file, ahead of its use: in reads as large as the system makes, and no byte beside it.
    ///
    /// # Panics
    /// When the range is not inside the file.
    pub fn fetch(&self, range: Range<usize>) -> io::Result<()> {
        let bytes = &self.map[range.clone()];
        #[cfg(target_os = "linux")]
        {
            // Without it, a walk through the pages waits for one small read after the other: 0.8 GB/s instead of 1.7.
            self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len())?;
            match self.map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len()) {
                // Linux before 5.14.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                done => return done,
            }
        }
        let touched = bytes.iter().step_by(PAGE).fold(0, |sum: u8, &byte| sum.wrapping_add(byte));
        std::hint::black_box(touched);
        Ok(())
    }

    /// Gives the memory of `range` back; a later read fetches it again. Where the system knows no such wish, nothing happens.
    ///
    /// # Panics
    /// When the range is not inside the file.
    pub fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.map.len(), "{range:?} of {} bytes", self.map.len());
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the mapping is file-backed and never written, so dropped pages come back with the file's bytes.
            let dropped = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
            // Pages that stay cost memory, not correctness.
            drop(dropped);
            drop_cached(&self.file, range);
        }
    }

    /// Bytes of the file that are in memory: in this map or in the system's cache.
    pub fn resident_bytes(&self) -> usize {
        #[cfg(target_os = "linux")]
        {
            let mut pages = vec![0_u8; self.map.len().div_ceil(PAGE)];
            // SAFETY: the range is our map, and the vector has a byte for each of its pages.
            let failed = unsafe { libc::mincore(self.map.as_ptr() as *mut _, self.map.len(), pages.as_mut_ptr()) };
            if failed == 0 {
                return pages.iter().filter(|&&page| page & 1 != 0).count() * PAGE;
            }
        }
        self.map.len()
    }

    /// A part of the file, for a matrix; nothing where it does not lie inside or starts at no multiple of 64.
    pub fn part(self: &Arc<Self>, range: Range<usize>) -> Option<MappedBytes> {
        let inside = range.start <= range.end && range.end <= self.map.len();
        (inside && range.start.is_multiple_of(CACHE_LINE)).then(|| MappedBytes { map: Arc::clone(self), range })
    }
}

/// Asks the system to forget what its cache holds of `range` of `file`; pages that are not yet written stay.
pub fn drop_cached(file: &File, range: Range<usize>) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let (offset, length) = (range.start as libc::off_t, range.len() as libc::off_t);
        // SAFETY: advice on a descriptor that we hold; it changes no contents.
        unsafe {
            libc::posix_fadvise(file.as_raw_fd(), offset, length, libc::POSIX_FADV_DONTNEED);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, range);
}

impl Deref for FileMap {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Bytes of a [`FileMap`], which they keep alive.
#[derive(Clone)]
pub struct MappedBytes {
    map: Arc<FileMap>,
    range: Range<usize>,
}

impl Deref for MappedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_fetched_and_given_back() {
        let path = std::env::temp_dir().join(format!("farthing-map-{}", std::process::id()));
        let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 8) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Arc::new(FileMap::new(File::open(&path).unwrap()).unwrap());
        std::fs::remove_file(&path).unwrap();
        let part = map.part(4096..70_000).unwrap();
        for _ in 0..2 {
            map.fetch(4096..70_000).unwrap();
            assert_eq!(part[..], bytes[4096..70_000]);
            map.release(4096..70_000);
        }
        assert_eq!(part[..], bytes[4096..70_000]);
        assert!(map.resident_bytes() > 0);
        for wrong in [32..64, 64..(1 << 20) + 1] {
            assert!(map.part(wrong).is_none());
        }
    }
}
