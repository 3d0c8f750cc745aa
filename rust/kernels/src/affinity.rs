//! Which CPUs this process may use, how much of their time, and which of them a pool has for itself.
//!
//! The affinity mask says which CPUs, the quota of the control groups how many at a time. Where the system tells which CPUs
//! share a core, one CPU of each core comes first.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The CPUs of the calling thread's affinity mask, one of each core before the second of any; empty where the system
/// doesn't say.
pub fn allowed_cpus() -> Vec<usize> {
    ordered(&mask(), siblings).0
}

/// How many of the [`allowed_cpus`] are cores of their own; 0 where the system doesn't say.
pub fn allowed_cores() -> usize {
    ordered(&mask(), siblings).1
}

/// CPUs' worth of time that the control groups (version 2 or 1) grant this process: the least along its path; `None`
/// without a limit.
///
/// ```
/// assert!(farthing_kernels::affinity::cpu_quota().is_none_or(|cpus| cpus > 0.0));
/// ```
pub fn cpu_quota() -> Option<f64> {
    if !cfg!(target_os = "linux") || cfg!(miri) {
        return None;
    }
    quota(&std::fs::read_to_string("/proc/self/cgroup").ok()?, Path::new("/sys/fs/cgroup"))
}

/// Cores allowed, at most as many as the quota pays for, at least 1.
pub(crate) fn usable_cores() -> usize {
    let cores = match allowed_cores() {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        cores => cores,
    };
    cpu_quota().map_or(cores, |quota| cores.min(quota as usize)).max(1)
}

/// `cpus` with one of each core first, and the number of cores. `siblings(cpu)` names the core of a CPU.
fn ordered(cpus: &[usize], siblings: impl Fn(usize) -> Option<String>) -> (Vec<usize>, usize) {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut ranked: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        let count = seen.entry(siblings(cpu).unwrap_or_else(|| format!("cpu {cpu}"))).or_default();
        ranked.push((*count, cpu));
        *count += 1;
    }
    ranked.sort_unstable();
    (ranked.into_iter().map(|(_, cpu)| cpu).collect(), seen.len())
}

fn siblings(cpu: usize) -> Option<String> {
    std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).ok()
}

/// The least quota of the groups that `membership` (the text of `/proc/self/cgroup`) names, and of their parents. A
/// container often sees its own group at the root, whatever its path says.
fn quota(membership: &str, root: &Path) -> Option<f64> {
    let mut least: Option<f64> = None;
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let mounts: &[&str] = match controllers {
            "" => &["", "unified"],
            _ if controllers.split(',').any(|controller| controller == "cpu") => &["cpu", "cpu,cpuacct"],
            _ => continue,
        };
        for mount in mounts {
            for group in Path::new(path.trim_start_matches('/')).ancestors() {
                let found = quota_of(&root.join(mount).join(group));
                least = [least, found].into_iter().flatten().reduce(f64::min);
            }
        }
    }
    least
}

/// The quota of one group: `cpu.max` holds quota and period, `max` being none; version 1 has a file for each, -1 being none.
fn quota_of(group: &Path) -> Option<f64> {
    let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    let text = read("cpu.max").or_else(|| Some(read("cpu.cfs_quota_us")? + " " + &read("cpu.cfs_period_us")?))?;
    let mut numbers = text.split_whitespace().map(|number| number.parse::<f64>().ok());
    let (quota, period) = (numbers.next()??, numbers.next()??);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// CPUs that pools of this process have claimed.
static TAKEN: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

/// CPUs that no other pool of this process uses, until dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) cpus: Vec<usize>,
}

impl Claim {
    /// `count` of the `allowed` CPUs, from `home` on if it is free; `None` when too few are.
    pub(crate) fn new(count: usize, allowed: Vec<usize>, home: Option<usize>) -> Option<Claim> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cpus: Vec<usize> = allowed.into_iter().filter(|cpu| !taken.contains(cpu)).collect();
        if let Some(at) = cpus.iter().position(|&cpu| Some(cpu) == home) {
            cpus.rotate_left(at);
        }
        if cpus.len() < count {
            return None;
        }
        cpus.truncate(count);
        taken.extend(&cpus);
        Some(Claim { cpus })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        for cpu in &self.cpus {
            taken.remove(cpu);
        }
    }
}

#[cfg(all(target_os = "linux", not(miri)))]
mod system {
    use std::os::unix::thread::JoinHandleExt;
    use std::thread::JoinHandle;

    const BITS: usize = u64::BITS as usize;

    /// The calling thread's CPUs, ascending.
    pub(super) fn mask() -> Vec<usize> {
        let mut words = vec![0u64; 16];
        // The system refuses a buffer shorter than its own masks.
        while words.len() <= 1 << 10 {
            // SAFETY: the buffer has that many bytes, and the call writes no more.
            let status = unsafe { libc::sched_getaffinity(0, size_of_val(&words[..]), words.as_mut_ptr().cast()) };
            if status == 0 {
                return (0..words.len() * BITS).filter(|cpu| (words[cpu / BITS] >> (cpu % BITS)) & 1 == 1).collect();
            }
            words.resize(words.len() * 2, 0);
        }
        Vec::new()
    }

    /// Keeps `thread` on `cpu`. A refusal is harmless: the thread stays where the system puts it.
    pub(crate) fn pin(thread: &JoinHandle<()>, cpu: usize) {
        let mut words = vec![0u64; (cpu / BITS + 1).max(16)];
        words[cpu / BITS] = 1 << (cpu % BITS);
        // SAFETY: the handle keeps the thread's id valid; the buffer has that many bytes.
        unsafe {
            libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of_val(&words[..]), words.as_ptr().cast());
        }
    }

    /// The CPU on which the calling thread runs.
    pub(crate) fn current_cpu() -> Option<usize> {
        // SAFETY: takes nothing and touches no memory.
        usize::try_from(unsafe { libc::sched_getcpu() }).ok()
    }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
mod system {
    use std::thread::JoinHandle;

    pub(super) fn mask() -> Vec<usize> {
        Vec::new()
    }

    pub(crate) fn pin(_: &JoinHandle<()>, _: usize) {}

    pub(crate) fn current_cpu() -> Option<usize> {
        None
    }
}

use system::mask;
pub(crate) use system::{current_cpu, pin};

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn one_cpu_of_each_core_comes_first() {
        let pairs = |cpu: usize| Some(format!("{},{}", cpu % 4, cpu % 4 + 4));
        assert_eq!(ordered(&[0, 1, 4, 5, 6], pairs), (vec![0, 1, 6, 4, 5], 3));
        assert_eq!(ordered(&[3, 7, 9], |_| None), (vec![3, 7, 9], 3));
        assert_eq!(ordered(&[], pairs), (vec![], 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads and writes files")]
    fn the_least_quota_on_the_path_counts() {
        let root = std::env::temp_dir().join(format!("farthing-quota-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let got = |membership: &str| quota(membership, &root);
        assert_eq!(got("0::/pod/box\n"), None);
        write("pod/box/cpu.max", "max 100000\n");
        assert_eq!(got("0::/pod/box\n"), None);
        write("pod/cpu.max", "250000 100000\n");
        assert_eq!(got("0::/pod/box\n"), Some(2.5));
        write("pod/box/cpu.max", "50000 100000\n");
        assert_eq!(got("0::/pod/box\n"), Some(0.5));
        assert_eq!(got("0::/pod/other\n"), Some(2.5));
        write("pod/cpu.max", "nonsense");
        assert_eq!(got("0::/pod\n"), None);
        write("cpu/slice/cpu.cfs_quota_us", "-1\n");
        write("cpu/slice/cpu.cfs_period_us", "100000\n");
        assert_eq!(got("4:memory:/slice\n2:cpu,cpuacct:/slice\n"), None);
        write("cpu/slice/cpu.cfs_quota_us", "300000\n");
        assert_eq!(got("4:memory:/slice\n2:cpu,cpuacct:/slice\n"), Some(3.0));
        assert_eq!(got("3:cpuset:/slice\n"), None);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn claims_do_not_overlap() {
        // Numbers beyond any machine of the tests: pools of other tests claim real ones.
        let cpus = || vec![90_000, 90_001, 90_002];
        let first = Claim::new(2, cpus(), Some(90_001)).unwrap();
        assert_eq!(first.cpus, [90_001, 90_002]);
        assert!(Claim::new(2, cpus(), None).is_none());
        let second = Claim::new(1, cpus(), Some(90_000)).unwrap();
        assert_eq!(second.cpus, [90_000]);
        drop(first);
        assert_eq!(Claim::new(2, cpus(), None).unwrap().cpus, [90_001, 90_002]);
    }

    #[test]
    fn the_mask_and_the_cores_agree() {
        let (cpus, cores) = (allowed_cpus(), allowed_cores());
        assert!(cores <= cpus.len() && (cores > 0 || cpus.is_empty()));
        assert!(usable_cores() >= 1);
    }
}
