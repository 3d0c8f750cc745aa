//! Regions on the threads of an OpenMP runtime that the process has already loaded, such as PyTorch's.
//!
//! The threads of such a runtime spin for milliseconds behind each of its regions; a pool of our own beside them would
//! share their cores. Called is the entry point that compilers use, `GOMP_parallel` of GNU's runtime; LLVM's has it too.

use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

type Body = unsafe extern "C" fn(*mut c_void);
type Parallel = unsafe extern "C" fn(Body, *mut c_void, c_uint, c_uint);
type Count = unsafe extern "C" fn() -> c_int;

/// An OpenMP runtime of this process.
#[derive(Clone, Copy, Debug)]
pub struct OpenMp {
    parallel: Parallel,
    most_threads: Count,
}

/// What the threads of a region share.
struct Region<'a> {
    next: AtomicUsize,
    threads: usize,
    body: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl OpenMp {
    /// The runtime whose symbols are visible to the whole process, if there is one.
    pub fn loaded() -> Option<OpenMp> {
        #[cfg(unix)]
        {
            // SAFETY: the names end with a zero.
            let symbol = |name: &std::ffi::CStr| unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            let (parallel, most) = (symbol(c"GOMP_parallel"), symbol(c"omp_get_max_threads"));
            if parallel.is_null() || most.is_null() {
                return None;
            }
            // SAFETY: OpenMP runtimes give these names these types.
            Some(unsafe {
                OpenMp {
                    parallel: std::mem::transmute::<*mut c_void, Parallel>(parallel),
                    most_threads: std::mem::transmute::<*mut c_void, Count>(most),
                }
            })
        }
        #[cfg(not(unix))]
        None
    }

    /// Threads that the runtime would give a region of the calling thread.
    pub fn threads(self) -> usize {
        // SAFETY: the function takes nothing and may be called at any time.
        usize::try_from(unsafe { (self.most_threads)() }).unwrap_or(1).max(1)
    }

    /// Calls `body(index)` once for each index below `threads`, on as many threads as the runtime lends.
    pub(crate) fn run(self, threads: usize, body: &(dyn Fn(usize) + Sync)) {
        let region = Region { next: AtomicUsize::new(0), threads, body, panic: Mutex::new(None) };
        // SAFETY: the runtime returns when all its threads have left `work`, so `region` outlives them.
        unsafe { (self.parallel)(work, (&raw const region).cast_mut().cast(), threads as c_uint, 0) };
        if let Some(payload) = region.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(payload);
        }
    }
}

/// Takes shares until none is left: a runtime may lend fewer threads than were asked for.
///
/// # Safety
/// `region` points at a live `Region`.
unsafe extern "C" fn work(region: *mut c_void) {
    // SAFETY: the caller's promise; shared references only.
    let region = unsafe { &*region.cast::<Region<'_>>() };
    loop {
        let index = region.next.fetch_add(1, Ordering::Relaxed);
        if index >= region.threads {
            return;
        }
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (region.body)(index))) {
            *region.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::pool::Pool;

    /// GNU's runtime comes with every C compiler that can build Rust's dependencies.
    fn runtime() -> Option<OpenMp> {
        // SAFETY: loading the library runs its initialisers only.
        unsafe { libc::dlopen(c"libgomp.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        OpenMp::loaded()
    }

    #[test]
    fn lent_threads_run_every_share_once_and_pass_panics_on() {
        let Some(runtime) = runtime() else { return };
        assert!(runtime.threads() >= 1);
        let pool = Pool::lent(runtime, 5);
        assert_eq!(pool.threads(), 5);
        for _ in 0..100 {
            let counts = [const { AtomicUsize::new(0) }; 5];
            pool.run(|index| {
                counts[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.into_iter().all(|count| count.into_inner() == 1));
        }
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(|index| assert_ne!(index, 3, "planted"))));
        assert!(caught.is_err());
    }
}
