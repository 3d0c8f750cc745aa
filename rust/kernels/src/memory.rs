//! Zeroed, 64-byte-aligned memory for panels and pages; large blocks are 2 MiB-aligned and ask for huge pages.
//!
//! What huge pages give a 4096² product with one row, 2 threads, medians of three pairs of runs with and without: ternary
//! of 2 bits 93 and 111, 66 and 75, 67 and 80 µs; int4 in groups of 128 the same within the noise of the memory (187 and
//! 209, 194 and 190, 127 and 122 µs).

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};

/// The system refused an allocation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("out of memory: got no {bytes} bytes from the system")]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub bytes: usize,
}

const CACHE_LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;

enum Origin {
    Heap(Layout),
    #[cfg(unix)]
    Map {
        base: *mut libc::c_void,
        length: usize,
    },
}

/// An owned byte buffer aligned to 64 bytes, zeroed at birth. Large ones occupy memory only where they are written.
pub struct AlignedBytes {
    start: *mut u8,
    length: usize,
    origin: Origin,
}

// SAFETY: the buffer is owned and has no interior mutability; access follows the usual borrow rules.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `length` zero bytes.
    ///
    /// ```
    /// let bytes = farthing_kernels::memory::AlignedBytes::zeroed(100)?;
    /// assert_eq!(bytes.len(), 100);
    /// assert_eq!(bytes.as_ptr() as usize % 64, 0);
    /// # Ok::<(), farthing_kernels::memory::OutOfMemory>(())
    /// ```
    pub fn zeroed(length: usize) -> Result<AlignedBytes, OutOfMemory> {
        #[cfg(unix)]
        if length >= HUGE_PAGE {
            return AlignedBytes::mapped(length);
        }
        let layout = Layout::from_size_align(length.max(1), CACHE_LINE).map_err(|_| OutOfMemory { bytes: length })?;
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err(OutOfMemory { bytes: length });
        }
        Ok(AlignedBytes { start, length, origin: Origin::Heap(layout) })
    }

    #[cfg(unix)]
    fn mapped(length: usize) -> Result<AlignedBytes, OutOfMemory> {
        let whole = length.checked_add(HUGE_PAGE).ok_or(OutOfMemory { bytes: length })?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(OutOfMemory { bytes: length });
        }
        let skip = (base as usize).next_multiple_of(HUGE_PAGE) - base as usize;
        // SAFETY: skip < HUGE_PAGE, so the start and `length` bytes behind it lie inside the mapping.
        let start = unsafe { base.cast::<u8>().add(skip) };
        #[cfg(all(target_os = "linux", not(miri)))]
        // SAFETY: the range lies inside our own mapping; the advice changes no contents, and failure is harmless.
        unsafe {
            libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE);
        }
        Ok(AlignedBytes { start, length, origin: Origin::Map { base, length: whole } })
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        match self.origin {
            // SAFETY: allocated with this very layout.
            Origin::Heap(layout) => unsafe { dealloc(self.start, layout) },
            #[cfg(unix)]
            // SAFETY: mapped by us with this base and length, and unmapped once.
            Origin::Map { base, length } => unsafe {
                libc::munmap(base, length);
            },
        }
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: start is valid for length initialised (zeroed) bytes for the life of self.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

impl std::fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBytes({})", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_are_zero_and_aligned() {
        // An interpreter takes its time.
        let most = if cfg!(miri) { HUGE_PAGE } else { 5 * HUGE_PAGE + 3 };
        for length in [0, 1, 63, 4096, HUGE_PAGE, most] {
            let mut bytes = AlignedBytes::zeroed(length).unwrap();
            assert_eq!(bytes.len(), length);
            assert_eq!(bytes.as_ptr() as usize % CACHE_LINE, 0);
            assert!(bytes.iter().all(|&byte| byte == 0));
            if let Some(last) = bytes.last_mut() {
                *last = 7;
            }
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert_eq!(AlignedBytes::zeroed(usize::MAX).unwrap_err(), OutOfMemory { bytes: usize::MAX });
        assert!(AlignedBytes::zeroed(1 << 60).is_err());
    }
}
