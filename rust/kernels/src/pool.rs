//! The decode pool: a fixed set of threads that spin between parallel regions and park when idle.
//!
//! A region runs one closure once per thread index; who does what is decided by the index alone, so results never
//! depend on scheduling. A share that its worker has not begun when the caller is done with its own, because the worker
//! sleeps or other work has its core, is taken by the caller. Fork-join libraries cost 13–40 µs a region; a token of a small model has 150 regions.

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::affinity::{Claim, allowed_cores, allowed_cpus, current_cpu, pin, usable_cores};
use crate::openmp::OpenMp;

/// How long a waiting thread spins before it parks.
const SPIN: Duration = Duration::from_micros(100);

#[repr(align(128))]
struct Padded<T>(T);

/// A borrowed closure with its lifetime erased; valid while the region that published it runs.
#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize),
}

struct Shared {
    epoch: Padded<AtomicU32>,
    /// For each index the last epoch in which someone has taken its share.
    taken: Vec<Padded<AtomicU32>>,
    pending: Padded<AtomicUsize>,
    sleepers: Padded<AtomicUsize>,
    stop: AtomicBool,
    job: Padded<std::cell::UnsafeCell<Option<Job>>>,
    gate: Mutex<()>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Shared {
    /// Whether the share of `index` in `epoch` is now ours: no one else has taken it, and the region waits for it.
    fn take(&self, index: usize, epoch: u32) -> bool {
        let free = epoch.wrapping_sub(1);
        self.taken[index].0.compare_exchange(free, epoch, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

// SAFETY: `job` is written only by the thread that holds the region lock, before the store of `epoch` that workers
// acquire, and never while `pending` > 0; it is read only by who has taken a share, which is pending. Everything else is
// atomic or locked.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointers in `job` are used only inside a region, while the closure they borrow is alive.
unsafe impl Send for Shared {}

/// A persistent pool of `threads` workers, the calling thread counted as worker 0.
pub struct Pool {
    threads: usize,
    process: u32,
    region: Mutex<Option<Claim>>,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Who lends the threads, when they are not ours.
    lender: Option<OpenMp>,
}

impl Pool {
    /// A pool of `threads` (at least 1) workers; `threads - 1` are spawned. Those of the first pool that has a thread for
    /// each core are pinned, see [`pinning`]; the affinity of calling threads is never touched.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            epoch: Padded(AtomicU32::new(0)),
            taken: (0..threads.max(1)).map(|_| Padded(AtomicU32::new(0))).collect(),
            pending: Padded(AtomicUsize::new(0)),
            sleepers: Padded(AtomicUsize::new(0)),
            stop: AtomicBool::new(false),
            job: Padded(std::cell::UnsafeCell::new(None)),
            gate: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let spawn = |index: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("farthing-{index}")).spawn(move || work(&shared, index))
        };
        // A system that refuses a thread gets a smaller pool; the results are the same.
        let workers: Vec<_> = (1..threads.max(1)).map_while(|index| spawn(index).ok()).collect();
        let threads = workers.len() + 1;
        let claim = seats(threads);
        if let Some(claim) = &claim {
            workers.iter().zip(&claim.cpus[1..]).for_each(|(worker, &cpu)| pin(worker, cpu));
        }
        Pool { threads, process: std::process::id(), region: Mutex::new(claim), shared, workers, lender: None }
    }

    /// A pool whose regions run on the threads of an OpenMP runtime, cut into `threads` (at least 1) shares.
    pub fn lent(lender: OpenMp, threads: usize) -> Pool {
        let mut pool = Pool::new(1);
        (pool.threads, pool.lender) = (threads.max(1), Some(lender));
        pool
    }

    /// Number of workers, the caller included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `body(index)` once for each index in `0..threads()`, in parallel, and returns when all have returned.
    ///
    /// Callers on several threads take turns. After a `fork` the workers are gone and the caller does all the work.
    /// A panic in any worker is raised again here. Must not be called from inside a region of the same pool.
    ///
    /// ```
    /// use std::sync::atomic::{AtomicUsize, Ordering};
    /// let pool = farthing_kernels::pool::Pool::new(2);
    /// let sum = AtomicUsize::new(0);
    /// pool.run(|index| { sum.fetch_add(index + 1, Ordering::Relaxed); });
    /// assert_eq!(sum.into_inner(), (1..=pool.threads()).sum());
    /// ```
    pub fn run<F: Fn(usize) + Sync>(&self, body: F) {
        if self.threads == 1 || std::process::id() != self.process {
            return (0..self.threads).for_each(body);
        }
        if let Some(lender) = self.lender {
            return lender.run(self.threads, &body);
        }
        let mut region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(claim) = &mut *region {
            self.make_way(claim);
        }
        let shared = &*self.shared;
        // SAFETY: no region is in progress (the lock is ours and `pending` is 0), so no worker reads `job`.
        unsafe { *shared.job.0.get() = Some(Job { data: (&raw const body).cast(), call: call::<F> }) };
        shared.pending.0.store(self.threads - 1, Ordering::Relaxed);
        let epoch = shared.epoch.0.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        if shared.sleepers.0.load(Ordering::SeqCst) > 0 {
            drop(shared.gate.lock().unwrap_or_else(PoisonError::into_inner));
            shared.wake.notify_all();
        }
        let mut mine = catch_unwind(AssertUnwindSafe(|| body(0)));
        for index in 1..self.threads {
            if shared.take(index, epoch) {
                let theirs = catch_unwind(AssertUnwindSafe(|| body(index)));
                mine = mine.and(theirs);
                shared.pending.0.fetch_sub(1, Ordering::Release);
            }
        }
        let mut spins = 0u32;
        while shared.pending.0.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < 1 << 11 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(region);
        if let Err(payload) = mine {
            resume_unwind(payload);
        }
        if let Some(payload) = theirs {
            resume_unwind(payload);
        }
    }

    /// A caller goes where the system puts it; a worker pinned there takes the place that the caller left.
    fn make_way(&self, claim: &mut Claim) {
        let here = current_cpu();
        if let Some(worker) = claim.cpus[1..].iter().position(|&cpu| Some(cpu) == here) {
            claim.cpus.swap(0, worker + 1);
            pin(&self.workers[worker], claim.cpus[worker + 1]);
        }
    }
}

/// Calls the closure that `data` points at.
///
/// # Safety
/// `data` points at a live `F`.
unsafe fn call<F: Fn(usize) + Sync>(data: *const (), index: usize) {
    // SAFETY: the caller's promise.
    let body = unsafe { &*data.cast::<F>() };
    body(index);
}

impl Drop for Pool {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            return self.workers.drain(..).for_each(std::mem::forget);
        }
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.gate.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads)
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    while let Some(epoch) = wait(shared, seen) {
        seen = epoch;
        if !shared.take(index, epoch) {
            continue;
        }
        // SAFETY: a region began before its epoch was seen, and its job stays put until the share just taken is done.
        let job = unsafe { *shared.job.0.get() };
        if let Some(job) = job {
            // SAFETY: the region's caller waits for `pending` before its closure goes out of scope.
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.data, index) })) {
                *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
        }
        shared.pending.0.fetch_sub(1, Ordering::Release);
    }
}

/// The first epoch other than `seen`; nothing when the pool shuts down.
fn wait(shared: &Shared, seen: u32) -> Option<u32> {
    let start = Instant::now();
    let next = || Some(shared.epoch.0.load(Ordering::SeqCst)).filter(|&epoch| epoch != seen);
    loop {
        for _ in 0..64 {
            if let Some(epoch) = next() {
                return Some(epoch);
            }
            std::hint::spin_loop();
        }
        if shared.stop.load(Ordering::Relaxed) {
            return None;
        }
        if start.elapsed() > SPIN {
            break;
        }
    }
    let mut gate = shared.gate.lock().unwrap_or_else(PoisonError::into_inner);
    shared.sleepers.0.fetch_add(1, Ordering::SeqCst);
    while next().is_none() && !shared.stop.load(Ordering::SeqCst) {
        gate = shared.wake.wait(gate).unwrap_or_else(PoisonError::into_inner);
    }
    shared.sleepers.0.fetch_sub(1, Ordering::SeqCst);
    next()
}

/// Whether workers are pinned; `FARTHING_PIN=0` leaves them to the system.
///
/// A pool whose threads are as many as the allowed cores pins each worker to a core of its own. Where another process is
/// busy, the system otherwise lets workers share a core with it for tens of milliseconds, with everyone waiting: 30 layers
/// of a small model took 1.7–5.6 ms pinned and 6–35 ms not beside one busy process on two CPUs, 2.0 and 16.7 ms
/// beside another such loop; alone, 1.4 and 1.5 ms, and 130 µs less to wake a worker. Smaller pools are not
/// pinned, since several processes would choose the same cores while others are idle; nor are further pools of a process.
pub fn pinning() -> bool {
    std::env::var_os("FARTHING_PIN").is_none_or(|value| value != "0")
}

/// A CPU for each thread of a new pool, the first for its callers; `None` when it is not to be pinned.
fn seats(threads: usize) -> Option<Claim> {
    let cores = allowed_cores();
    let whole = threads > 1 && cores > 0 && threads >= cores && pinning();
    if whole { Claim::new(threads, allowed_cpus(), current_cpu()) } else { None }
}

/// The threads to use when the caller names none: `FARTHING_NUM_THREADS`, `RAYON_NUM_THREADS`, `OMP_NUM_THREADS`, else
/// the cores that the affinity mask and the control groups' quota allow.
pub fn default_threads() -> usize {
    ["FARTHING_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"]
        .iter()
        .find_map(|name| std::env::var(name).ok()?.parse().ok().filter(|&threads: &usize| threads > 0))
        .unwrap_or_else(usable_cores)
}

/// The `index`-th of `parts` contiguous, nearly equal ranges of `0..length`.
///
/// ```
/// use farthing_kernels::pool::share;
/// assert_eq!((share(5, 0, 2), share(5, 1, 2)), (0..3, 3..5));
/// ```
pub fn share(length: usize, index: usize, parts: usize) -> Range<usize> {
    let (base, extra) = (length / parts, length % parts);
    let start = index * base + index.min(extra);
    start..start + base + usize::from(index < extra)
}

/// A mutable slice that the threads of one region share, each writing ranges of its own.
#[derive(Clone, Copy)]
pub struct Disjoint<'a, T> {
    start: *mut T,
    length: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose contract keeps ranges of different threads apart.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Borrows `slice` for a region.
    pub fn new(slice: &'a mut [T]) -> Disjoint<'a, T> {
        Disjoint { start: slice.as_mut_ptr(), length: slice.len(), lifetime: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The elements in `range`.
    ///
    /// # Panics
    /// When the range lies outside the slice.
    ///
    /// # Safety
    /// No element of `range` may be reached through another `slice` at the same time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.length, "{range:?} of {}", self.length);
        // SAFETY: inside the borrowed slice (asserted); exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_runs_once_in_each_of_many_regions() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads);
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            // An interpreter takes its time.
            let rounds = if cfg!(miri) { 20 } else { 2000 };
            for round in 0..rounds {
                pool.run(|index| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                if round == rounds / 2 {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == rounds));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for bad in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(|index| assert_ne!(index, bad, "planted"))));
            assert!(caught.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(|index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 3);
    }

    #[test]
    #[cfg(target_os = "linux")]
    #[cfg_attr(miri, ignore = "asks the system for its CPUs")]
    fn callers_keep_their_affinity_and_pools_their_cores() {
        let before = allowed_cpus();
        let pools: Vec<Pool> = [2, allowed_cores(), allowed_cores(), 3].map(Pool::new).into();
        let mut seen = std::collections::BTreeSet::new();
        for pool in &pools {
            for _ in 0..100 {
                pool.run(|_| std::hint::spin_loop());
            }
            if let Some(claim) = &*pool.region.lock().unwrap() {
                assert_eq!(claim.cpus.len(), pool.threads());
                assert!(claim.cpus.iter().all(|cpu| before.contains(cpu) && seen.insert(*cpu)), "{claim:?}");
            }
        }
        assert_eq!(allowed_cpus(), before);
    }

    #[test]
    #[cfg(target_os = "linux")]
    #[cfg_attr(miri, ignore = "asks the system for its CPUs")]
    fn a_pinned_worker_stays_and_makes_way() {
        let pool = Pool::new(2);
        let Some(&free) = allowed_cpus().get(1) else { return };
        *pool.region.lock().unwrap() = None;
        let places = [allowed_cpus()[0], free];
        let mut claim = Claim { cpus: places.to_vec() };
        for _ in 0..100 {
            pin(&pool.workers[0], claim.cpus[1]);
            pool.make_way(&mut claim);
            let on = Mutex::new(None);
            pool.run(|index| {
                if index == 1 {
                    *on.lock().unwrap() = current_cpu();
                }
                // The caller would take the worker's share if it were done first.
                while index == 0 && on.lock().unwrap().is_none() {
                    std::thread::yield_now();
                }
            });
            assert_eq!(on.into_inner().unwrap(), Some(claim.cpus[1]));
            assert!(places.iter().all(|place| claim.cpus.contains(place)));
            claim.cpus.swap(0, 1);
        }
        claim.cpus.clear();
    }

    #[test]
    fn a_caller_does_what_its_workers_have_not_begun() {
        let mut pool = Pool::new(3);
        // Workers that have left take no share.
        pool.shared.stop.store(true, Ordering::SeqCst);
        pool.shared.wake.notify_all();
        std::thread::sleep(Duration::from_millis(5));
        pool.shared.wake.notify_all();
        pool.workers.drain(..).for_each(|worker| worker.join().unwrap());
        let caller = std::thread::current().id();
        let done = Mutex::new(Vec::new());
        pool.run(|index| {
            assert_eq!(std::thread::current().id(), caller);
            done.lock().unwrap().push(index);
        });
        assert_eq!(done.into_inner().unwrap(), [0, 1, 2]);
    }

    #[test]
    fn several_callers_take_turns() {
        let pool = Pool::new(2);
        let (sum, rounds) = (AtomicUsize::new(0), if cfg!(miri) { 5 } else { 500 });
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        pool.run(|_| {
                            sum.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * rounds * 2);
    }

    #[test]
    fn shares_cover_everything_once() {
        for length in 0..40 {
            for parts in 1..9 {
                let all: Vec<usize> = (0..parts).flat_map(|index| share(length, index, parts)).collect();
                assert_eq!(all, (0..length).collect::<Vec<_>>());
            }
        }
    }
}
