//! Zeroed, 64-byte-aligned memory for panels and pages, in huge pages.
//!
//! Buffers of any size but the smallest are cut one after the other from regions of whole huge pages, so that none has a
//! tail of small ones: on a virtual machine a walk through two page tables can cost 2 µs for every 4 KiB that are read,
//! eight times what the bytes themselves take. A region is given back when the last of its buffers is dropped.
//!
//! What huge pages give a 4096² product with one row, 2 threads, medians of three pairs of runs with and without: ternary
//! of 2 bits 93 and 111, 66 and 75, 67 and 80 µs; int4 in groups of 128 the same within the noise of the memory (187 and
//! 209, 194 and 190, 127 and 122 µs). One process in 25 had its matrices in scattered small pages and took 8 to 18 times as long.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
#[cfg(unix)]
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The system refused an allocation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("out of memory: got no {bytes} bytes from the system")]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub bytes: usize,
}

const CACHE_LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;
/// Buffers below this size come from the heap.
#[cfg(unix)]
const SMALL: usize = 16 << 10;
/// Bytes of a region, unless a buffer needs more.
#[cfg(unix)]
const REGION: usize = 32 << 20;

enum Origin {
    Heap(Layout),
    /// Keeps the region alive.
    #[cfg(unix)]
    Region(#[allow(dead_code)] Arc<Region>),
}

/// A private mapping of whole huge pages.
#[cfg(unix)]
struct Region {
    base: *mut libc::c_void,
    /// Bytes from `base` on that are mapped.
    mapped: usize,
    start: *mut u8,
    length: usize,
}

// SAFETY: the region only owns its mapping; buffers cut from it do not overlap.
#[cfg(unix)]
unsafe impl Send for Region {}
// SAFETY: as above.
#[cfg(unix)]
unsafe impl Sync for Region {}

#[cfg(unix)]
impl Region {
    fn new(length: usize) -> Option<Region> {
        let length = length.checked_next_multiple_of(HUGE_PAGE)?;
        let mapped = length.checked_add(HUGE_PAGE)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let skip = (base as usize).next_multiple_of(HUGE_PAGE) - base as usize;
        // SAFETY: skip < HUGE_PAGE, so the start and `length` bytes behind it lie inside the mapping.
        let start = unsafe { base.cast::<u8>().add(skip) };
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies inside our own mapping; the advice changes no contents, and failure is harmless.
        unsafe {
            libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE);
        }
        Some(Region { base, mapped, start, length })
    }
}

#[cfg(unix)]
impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this base and length, and unmapped once, after the last buffer.
        unsafe {
            libc::munmap(self.base, self.mapped);
        }
    }
}

/// The region that buffers are cut from, as long as one of them lives, and how much of it is taken.
#[cfg(unix)]
static CURRENT: Mutex<(Weak<Region>, usize)> = Mutex::new((Weak::new(), 0));

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
        if length >= SMALL {
            return AlignedBytes::cut(length).ok_or(OutOfMemory { bytes: length });
        }
        let layout = Layout::from_size_align(length.max(1), CACHE_LINE).map_err(|_| OutOfMemory { bytes: length })?;
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err(OutOfMemory { bytes: length });
        }
        Ok(AlignedBytes { start, length, origin: Origin::Heap(layout) })
    }

    /// The next `length` bytes of the current region, or of a new one.
    #[cfg(unix)]
    fn cut(length: usize) -> Option<AlignedBytes> {
        let taken = length.checked_next_multiple_of(CACHE_LINE)?;
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let old = current.0.upgrade().map(|region| (region.length - current.1, region));
        let (region, used) = match old {
            Some((room, region)) if room >= taken => (region, current.1),
            old => {
                let region = Arc::new(Region::new(taken.max(REGION))?);
                let room = old.map_or(0, |(room, _)| room);
                if room > region.length - taken {
                    // The old region has more room for the buffers to come.
                    return Some(AlignedBytes { start: region.start, length, origin: Origin::Region(region) });
                }
                current.0 = Arc::downgrade(&region);
                (region, 0)
            }
        };
        current.1 = used + taken;
        // SAFETY: `used + taken` bytes lie inside the region.
        let start = unsafe { region.start.add(used) };
        Some(AlignedBytes { start, length, origin: Origin::Region(region) })
    }

    /// Asks the system to gather what was written into huge pages, where it gave small ones. Failure is harmless.
    pub fn gather(&self) {
        #[cfg(target_os = "linux")]
        if let Origin::Region(_) = self.origin {
            const COLLAPSE: libc::c_int = 25;
            let first = self.start as usize / HUGE_PAGE * HUGE_PAGE;
            let last = (self.start as usize + self.length).next_multiple_of(HUGE_PAGE);
            // SAFETY: whole huge pages of our own region; the advice changes no contents.
            unsafe {
                libc::madvise(first as *mut libc::c_void, last - first, COLLAPSE);
            }
        }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if let Origin::Heap(layout) = self.origin {
            // SAFETY: allocated with this very layout.
            unsafe { dealloc(self.start, layout) }
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
