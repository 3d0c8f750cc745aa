//! What every fuzz target asserts: no panic, at most one second for each MiB and one more, and no more memory than twice
//! the input and 64 MiB.

mod allocation;
pub mod large;
#[path = "../../rust/core/tests/support/mod.rs"]
#[expect(dead_code, reason = "shared with the tests, which use the rest")]
mod support;
pub mod text;

use std::time::Duration;

use farthing::load::Checkpoint;

const SLACK: usize = 64 << 20;

/// Time this process has spent computing: a busy machine must not look like a slow parser.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec, which is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Runs `load` on an input of `bytes` bytes and asserts its bounds.
///
/// # Panics
/// When a bound is broken.
pub fn bounded<T>(bytes: usize, load: impl FnOnce() -> T) -> T {
    let (start, before) = (processor_time(), allocation::reset_peak());
    let result = load();
    let (seconds, peak) = (processor_time() - start, allocation::peak() - before);
    assert!(peak <= 2 * bytes + SLACK, "{bytes} bytes: expected at most {} allocated, got {peak}", 2 * bytes + SLACK);
    let limit = Duration::from_secs(1 + bytes as u64 / (1 << 20));
    assert!(seconds <= limit, "{bytes} bytes: expected at most {limit:?}, got {seconds:?}");
    result
}

/// Loads a model file from memory, with the copy of the input counted, and reads all of it.
pub fn model(bytes: &[u8]) {
    match bounded(bytes.len(), || Checkpoint::from_bytes(bytes.to_vec())) {
        Ok(checkpoint) => support::exercise(&checkpoint),
        Err(error) => assert!(error.to_string().contains("got"), "{error}"),
    }
}
