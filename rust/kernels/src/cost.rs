//! The cost curve V(M): the time of a product with M rows of x over the time with one, measured on this machine.
//!
//! Several rows cost hardly more than one while memory is the limit, and in proportion where arithmetic is; where one turns
//! into the other depends on format, precision, threads and machine. Scheduling and speculation may ask; results never do.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::format::{Format, PackError, PackedMatrix, Precision};
use crate::isa::Isa;
use crate::matmul::{Input, Job, matmul};
use crate::pool::Pool;

/// Numbers of rows that are measured.
const POINTS: [usize; 14] = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64];
/// Copies of the matrix, used in turn, fill this many bytes, so that weights come from memory.
const RESIDENT: usize = 128 << 20;
/// Time for the rounds of a measurement, beside packing; three rounds are always made.
const PATIENCE: Duration = Duration::from_millis(150);
/// Fewest rounds of a measurement of other work.
const ROUNDS: usize = 3;
/// Sides of a shape class: powers of two in this range, so that a matrix takes at most 64 MiB in one byte a weight.
const SIDES: (usize, usize) = (64, 8192);

/// The time of M rows over the time of one.
///
/// ```
/// use farthing_kernels::cost::CostCurve;
/// use farthing_kernels::format::{Bits, FloatType, Format, Offset, Precision};
/// use farthing_kernels::pool::Pool;
/// let int4 = Format::Integer { bits: Bits::Four, group: 32, offset: Offset::Symmetric, scale: FloatType::F16 };
/// let curve = CostCurve::measure(&Pool::new(1), int4, Precision::A8, 64, 64)?;
/// assert_eq!(curve.at(1), 1.0);
/// assert!(curve.at(16) >= curve.at(7));
/// # Ok::<(), farthing_kernels::format::PackError<std::convert::Infallible>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct CostCurve {
    /// Ascending, at [`POINTS`].
    ratios: [f64; POINTS.len()],
}

impl Default for CostCurve {
    /// The worst case: every row costs as much as the first.
    fn default() -> Self {
        CostCurve { ratios: POINTS.map(|m| m as f64) }
    }
}

impl CostCurve {
    /// Measures products with a matrix `(n, k)`, in a fraction of a second and about 128 MiB.
    ///
    /// The error is that of packing: a format that can't be, or too little memory.
    pub fn measure(
        pool: &Pool,
        format: Format,
        precision: Precision,
        n: usize,
        k: usize,
    ) -> Result<CostCurve, PackError<Infallible>> {
        let first = PackedMatrix::random(n, k, format, precision, 1)?;
        let copies = RESIDENT.div_ceil(first.nbytes());
        let mut matrices = vec![first];
        for _ in 1..copies {
            matrices.push(matrices[0].try_clone()?);
        }
        let most = POINTS[POINTS.len() - 1];
        let x: Vec<f32> = (0..most * k).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect();
        let (mut input, mut out) = (Input::new(), vec![0.0; most * n]);
        let mut times: [Vec<f64>; POINTS.len()] = Default::default();
        let (start, mut turns) = (Instant::now(), matrices.iter().cycle());
        while times[0].len() < 3 || start.elapsed() < PATIENCE {
            for (&m, times) in POINTS.iter().zip(&mut times) {
                let Some(matrix) = turns.next() else { break };
                let (x, out) = (&x[..m * k], &mut out[..m * n]);
                let begin = Instant::now();
                input.prepare(pool, x, m, k, &[matrix]);
                matmul(pool, x, m, &input, &mut [Job { matrix, bias: None, add: false, out }]);
                times.push(begin.elapsed().as_secs_f64());
            }
        }
        Ok(CostCurve::from_times(times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        })))
    }

    /// As [`CostCurve::measure`] for the shape class of `(n, k)`, kept in the cache directory: `XDG_CACHE_HOME/farthing`,
    /// else `~/.cache/farthing`. A file that can't be read, is damaged, or comes from another CPU or version of farthing is
    /// replaced; where nothing can be written, every call measures.
    ///
    /// The shape class has both sides rounded to powers of two from 64 to 8192.
    pub fn cached(
        pool: &Pool,
        format: Format,
        precision: Precision,
        n: usize,
        k: usize,
    ) -> Result<CostCurve, PackError<Infallible>> {
        let key = Key { cpu: cpu_model(), isa: Isa::active(), threads: pool.threads(), format, precision };
        let shape = (class(n), class(k));
        kept(cache_directory().as_deref(), &key.text(shape), || {
            CostCurve::measure(pool, format, precision, shape.0, shape.1)
        })
    }

    /// As [`CostCurve::cached`] for any work, which `run` does with a number of rows up to `most` (at least 2); beyond,
    /// cost rises as between the last two points. `name` says what work it is.
    pub fn cached_work<E>(
        pool: &Pool,
        name: &str,
        most: usize,
        mut run: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<CostCurve, E> {
        let (cpu, isa, threads) = (cpu_model(), Isa::active().name(), pool.threads());
        let key = format!("work {name} {cpu} {isa} {threads} threads farthing {}", env!("CARGO_PKG_VERSION"));
        kept(cache_directory().as_deref(), &key, || {
            let measured = POINTS.partition_point(|&point| point <= most);
            let mut times: [Vec<f64>; POINTS.len()] = Default::default();
            // Threads and caches warm up first.
            POINTS[..measured].iter().try_for_each(|&m| run(m))?;
            let start = Instant::now();
            while times[0].len() < ROUNDS || start.elapsed() < PATIENCE && times[0].len() < 5 * ROUNDS {
                for (&m, times) in POINTS.iter().zip(&mut times[..measured]) {
                    let begin = Instant::now();
                    run(m)?;
                    times.push(begin.elapsed().as_secs_f64());
                }
            }
            // What else runs on the machine only ever adds.
            let mut times = times.map(|times| times.into_iter().reduce(f64::min).unwrap_or_default());
            let (a, b) = (measured - 2, measured - 1);
            let slope = (times[b] - times[a]) / (POINTS[b] - POINTS[a]) as f64;
            for i in measured..POINTS.len() {
                times[i] = times[b] + slope * (POINTS[i] - POINTS[b]) as f64;
            }
            Ok(CostCurve::from_times(times))
        })
    }

    /// V(m): interpolated between measured points; beyond 64 rows in proportion to the rows. 0 for no rows.
    pub fn at(&self, m: usize) -> f64 {
        let last = POINTS.len() - 1;
        if m >= POINTS[last] {
            return self.ratios[last] * m as f64 / POINTS[last] as f64;
        }
        let above = POINTS.partition_point(|&point| point <= m);
        let Some(below) = above.checked_sub(1) else { return 0.0 };
        let share = (m - POINTS[below]) as f64 / (POINTS[above] - POINTS[below]) as f64;
        self.ratios[below] + share * (self.ratios[above] - self.ratios[below])
    }

    /// Ratios that never fall: a time below that of fewer rows is noise.
    fn from_times(times: [f64; POINTS.len()]) -> CostCurve {
        let mut most: f64 = 1.0;
        CostCurve {
            ratios: times.map(|time| {
                most = most.max(time / times[0]);
                most
            }),
        }
    }

    /// The key, then the rows and ratio of each point in a line of its own.
    fn write(&self, key: &str) -> String {
        let mut text = format!("{key}\n");
        for (m, ratio) in POINTS.iter().zip(&self.ratios) {
            let _ = writeln!(text, "{m} {ratio}");
        }
        text
    }

    /// The curve of which [`CostCurve::write`] told; `None` for anything else.
    fn read(text: &str, key: &str) -> Option<CostCurve> {
        let mut lines = text.strip_suffix('\n')?.split('\n');
        if lines.next()? != key {
            return None;
        }
        let mut ratios = [0.0; POINTS.len()];
        let mut least = 1.0;
        for (m, stored) in POINTS.iter().zip(&mut ratios) {
            let ratio: f64 = lines.next()?.strip_prefix(&m.to_string())?.strip_prefix(' ')?.parse().ok()?;
            if !ratio.is_finite() || ratio < least {
                return None;
            }
            (*stored, least) = (ratio, ratio);
        }
        (lines.next().is_none() && ratios[0] == 1.0).then_some(CostCurve { ratios })
    }
}

/// What a curve depends on, beside the shape.
struct Key {
    cpu: String,
    isa: Isa,
    threads: usize,
    format: Format,
    precision: Precision,
}

impl Key {
    fn text(&self, (n, k): (usize, usize)) -> String {
        let Key { cpu, isa, threads, format, precision } = self;
        let (isa, precision, version) = (isa.name(), precision.name(), env!("CARGO_PKG_VERSION"));
        format!("cost {cpu} {isa} {threads} threads {format} {precision} {n} x {k} farthing {version}")
    }
}

/// The nearest power of two by ratio, within [`SIDES`].
fn class(side: usize) -> usize {
    let side = side.clamp(SIDES.0, SIDES.1);
    let above = side.next_power_of_two();
    if side * side * 2 < above * above { above / 2 } else { above }
}

/// The curve in `directory`, else a new one, which is left there.
fn kept<E>(
    directory: Option<&Path>,
    key: &str,
    measure: impl FnOnce() -> Result<CostCurve, E>,
) -> Result<CostCurve, E> {
    let Some(directory) = directory else { return measure() };
    let path = directory.join(file_name(key));
    if let Some(curve) = fs::read_to_string(&path).ok().and_then(|text| CostCurve::read(&text, key)) {
        return Ok(curve);
    }
    let curve = measure()?;
    // Without a cache everything works, only later.
    let _ = fs::create_dir_all(directory);
    let _ = replace(&path, &curve.write(key));
    Ok(curve)
}

/// The key in letters that any file system takes.
fn file_name(key: &str) -> String {
    let word = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
    let words: String = key.chars().map(word).collect();
    let words: Vec<&str> = words.split('-').filter(|word| !word.is_empty()).collect();
    words.join("-")
}

/// Writes a file that other processes see whole or not at all.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_added_extension(format!("{}-{count}", std::process::id()));
    let done = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path));
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done
}

/// Where files lie that may be made anew: `XDG_CACHE_HOME/farthing`, else `~/.cache/farthing`.
pub fn cache_directory() -> Option<PathBuf> {
    let path = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")))?;
    Some(caches.join("farthing"))
}

/// The model of the first CPU, as the system names it.
fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = |line: &str| {
        line.strip_prefix("model name").and_then(|rest| rest.split_once(':')).map(|(_, name)| name.trim().to_owned())
    };
    text.lines().find_map(name).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Bits, FloatType, Offset};

    const INT4: Format =
        Format::Integer { bits: Bits::Four, group: 32, offset: Offset::Symmetric, scale: FloatType::F16 };

    /// A curve like those of real machines.
    fn curve() -> CostCurve {
        CostCurve::from_times(POINTS.map(|m| 3e-4 * (1.0 + (m as f64 - 1.0) / 30.0).max(m as f64 / 9.0)))
    }

    fn directory(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("farthing-cost-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_curve_goes_through_its_points_and_never_falls() {
        let curve = curve();
        assert_eq!((curve.at(0), curve.at(1)), (0.0, 1.0));
        for (m, ratio) in POINTS.iter().zip(curve.ratios) {
            assert_eq!(curve.at(*m), ratio);
        }
        assert_eq!(curve.at(20), f64::midpoint(curve.at(16), curve.at(24)));
        assert_eq!(curve.at(128), 2.0 * curve.at(64));
        for m in 0..200 {
            assert!(curve.at(m) <= curve.at(m + 1), "{m}");
        }
    }

    #[test]
    fn noise_does_not_make_a_curve_fall() {
        let mut times = POINTS.map(|m| m as f64);
        (times[1], times[5]) = (0.5, 1.0);
        let curve = CostCurve::from_times(times);
        assert_eq!(curve.ratios[..7], [1.0, 1.0, 3.0, 4.0, 5.0, 5.0, 8.0]);
    }

    #[test]
    fn a_measurement_is_a_curve() {
        let curve = CostCurve::measure(&Pool::new(2), INT4, Precision::A8, 128, 64).unwrap();
        assert_eq!(CostCurve::read(&curve.write("key"), "key"), Some(curve));
        let group = Format::Integer { bits: Bits::Four, group: 7, offset: Offset::Symmetric, scale: FloatType::F16 };
        let refused = CostCurve::measure(&Pool::new(1), group, Precision::A8, 128, 64);
        assert!(matches!(refused, Err(PackError::Group { got: 7, .. })));
    }

    #[test]
    fn other_work_goes_on_rising_beyond_what_was_run() {
        let mut most = 0;
        let run = |m: usize| {
            most = most.max(m);
            std::thread::sleep(Duration::from_micros(500 * m as u64));
            Ok::<_, Infallible>(())
        };
        let name = format!("sleep of process {}", std::process::id());
        let curve = CostCurve::cached_work(&Pool::new(1), &name, 9, run).unwrap();
        assert_eq!(most, 8);
        assert!(curve.at(8) > 4.0 && curve.at(16) > 1.5 * curve.at(8), "{curve:?}");
        let refused = CostCurve::cached_work(&Pool::new(1), "nothing at all", 9, |_| Err("no"));
        assert_eq!(refused, Err("no"));
        if let Some(directory) = cache_directory() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().contains(&file_name(&name)) {
                    fs::remove_file(entry.path()).unwrap();
                }
            }
        }
    }

    #[test]
    fn only_what_was_written_is_read() {
        let (curve, key) = (curve(), "cost of something");
        let text = curve.write(key);
        assert_eq!(CostCurve::read(&text, key).as_ref(), Some(&curve));
        assert_eq!(CostCurve::read(&text, "cost of something else"), None);
        for end in 0..text.len() {
            assert_eq!(CostCurve::read(&text[..end], key), None, "the first {end} bytes");
        }
        assert_eq!(CostCurve::read(&(text.clone() + "65 90\n"), key), None);
        for (from, to) in [("\n1 1\n", "\n1 1.5\n"), ("\n2 1", "\n2 0"), ("\n2 1", "\n2 NaN1"), ("\n64 ", "\n64 9e999")]
        {
            assert!(text.contains(from), "{from:?} in {text}");
            assert_eq!(CostCurve::read(&text.replacen(from, to, 1), key), None, "{to:?}");
        }
    }

    #[test]
    fn a_file_is_measured_once_and_again_when_damaged() {
        let directory = directory("damage");
        let measured = AtomicUsize::new(0);
        let ask = |key: &str| {
            kept(Some(&directory), key, || {
                measured.fetch_add(1, Ordering::Relaxed);
                Ok::<_, Infallible>(curve())
            })
        };
        let count = || measured.load(Ordering::Relaxed);
        assert_eq!(ask("key"), ask("key"));
        assert_eq!(count(), 1);
        let path = directory.join("key");
        for damage in [&b""[..], b"key\n1 1\n", b"\xff\xfe", b"another key\n"] {
            fs::write(&path, damage).unwrap();
            let before = count();
            assert_eq!(ask("key"), Ok(curve()));
            assert_eq!(ask("key"), Ok(curve()));
            assert_eq!(count(), before + 1);
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "no temporary files are left");
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn where_nothing_can_be_written_every_call_measures() {
        let file = directory("file");
        fs::write(&file, "not a directory").unwrap();
        let count = AtomicUsize::new(0);
        for directory in [None, Some(&*file), Some(&*file)] {
            let curve = kept(directory, "key", || {
                count.fetch_add(1, Ordering::Relaxed);
                Ok::<_, Infallible>(curve())
            });
            assert_eq!(curve, Ok(self::curve()));
        }
        assert_eq!(count.into_inner(), 3);
        fs::remove_file(file).unwrap();
    }

    #[test]
    fn writers_do_not_disturb_each_other_or_readers() {
        let directory = directory("writers");
        fs::create_dir_all(&directory).unwrap();
        let (path, text) = (directory.join("key"), curve().write("key"));
        replace(&path, &text).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        replace(&path, &text).unwrap();
                        assert_eq!(fs::read_to_string(&path).unwrap(), text);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn shapes_fall_into_classes_and_keys_into_names() {
        let classes = [1, 64, 90, 91, 576, 1536, 3000, 4096, 49152].map(class);
        assert_eq!(classes, [64, 64, 64, 128, 512, 2048, 4096, 4096, 8192]);
        let key = Key { cpu: "A/B (R) 9".into(), isa: Isa::Scalar, threads: 2, format: INT4, precision: Precision::A8 };
        let name = file_name(&key.text((64, 128)));
        assert!(
            name.starts_with("cost-a-b-r-9-scalar-2-threads-int4-g32-symmetric-f16-a8-64-x-128-farthing-"),
            "{name}"
        );
        assert!(cpu_model().len() > 1);
    }
}
