//! What this machine can do at best: the read bandwidth and the int8 rate that kernels are held against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::isa::Isa;
use crate::memory::AlignedBytes;
use crate::pool::{Pool, share};
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// Well beyond any last-level cache.
const BUFFER: usize = 256 << 20;
/// Time for the passes of a probe, after the memory is touched.
const PATIENCE: Duration = Duration::from_millis(200);

/// Bytes a second that all threads together read from memory: the best of the passes over 256 MiB that fit in 0.2 s.
///
/// 0 when the system refuses the memory.
pub fn read_bandwidth(pool: &Pool) -> f64 {
    let Ok(mut buffer) = AlignedBytes::zeroed(BUFFER) else { return 0.0 };
    let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut buffer);
    // Written, or every page would be the one zero page.
    floats.iter_mut().step_by(1024).for_each(|x| *x = 1.0);
    let (floats, start) = (&*floats, Instant::now());
    let mut best = 0.0f64;
    while start.elapsed() < PATIENCE {
        let pass = Instant::now();
        pool.run(|index| {
            let part = share(floats.len() / LANES, index, pool.threads());
            black_box(dispatch(Isa::active(), Read(&floats.as_chunks().0[part])));
        });
        best = best.max(BUFFER as f64 / pass.elapsed().as_secs_f64());
    }
    best
}

struct Read<'a>(&'a [[f32; LANES]]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.splat(0.0); 8];
        for eight in self.0.as_chunks::<8>().0 {
            for (sum, x) in sums.iter_mut().zip(eight) {
                *sum = simd.add(*sum, simd.load(x));
            }
        }
        sums.into_iter().fold(0.0, |total, sum| total + simd.sum(sum))
    }
}

/// Int8 operations a second (two for each multiplication and addition) of all threads together: VNNI where the level
/// has it, else AVX2's `maddubs` and `paddw`, else plain Rust; the best of several rounds.
pub fn int8_rate(pool: &Pool) -> f64 {
    let start = Instant::now();
    let mut best = 0.0f64;
    while start.elapsed() < PATIENCE {
        let round = Instant::now();
        let mut counts = vec![0.0; pool.threads()];
        let shared = crate::pool::Disjoint::new(&mut counts);
        // SAFETY: each index has a count of its own.
        pool.run(|index| unsafe { shared.slice(index..index + 1) }[0] = multiply_add(Isa::active()));
        best = best.max(counts.iter().sum::<f64>() / round.elapsed().as_secs_f64());
    }
    best
}

/// Steps of a round: about a millisecond.
const STEPS: usize = 1 << 18;
/// Independent sums, enough to hide the latency of any of the instructions.
const SUMS: usize = 12;

/// Does a round of int8 multiplications and additions; returns their number.
fn multiply_add(isa: Isa) -> f64 {
    assert!(isa.available(), "{} is not available on this CPU", isa.name());
    let width = match isa {
        Isa::Scalar => {
            scalar_round();
            1
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: the level is available.
            unsafe { avx2_round() };
            32
        }
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => {
            // SAFETY: the level is available.
            unsafe { avxvnni_round() };
            32
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni | Isa::Avx512Vbmi => {
            // SAFETY: the level is available.
            unsafe { vnni_round() };
            64
        }
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("asserted above"),
    };
    (2 * width * SUMS * STEPS) as f64
}

fn scalar_round() {
    let (a, b) = (black_box(3u8), black_box(-5i8));
    let mut sums = [0i32; SUMS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = black_box(sum.wrapping_add(i32::from(a) * i32::from(b)));
        }
    }
    black_box(sums);
}

/// `x`, as far as the compiler knows some other vector: products of it can be neither shared nor hoisted out of a loop.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn another(mut x: std::arch::x86_64::__m256i) -> std::arch::x86_64::__m256i {
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) x, options(nomem, nostack, preserves_flags)) };
    x
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2_round() {
    use std::arch::x86_64::{_mm256_add_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_setzero_si256};
    let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
    let mut sums = [_mm256_setzero_si256(); SUMS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            // Kernels also widen the sums now and then, as seldom as the codes allow.
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(another(a), b));
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
fn avxvnni_round() {
    use std::arch::x86_64::{_mm256_dpbusd_avx_epi32, _mm256_set1_epi8, _mm256_setzero_si256};
    let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
    let mut sums = [_mm256_setzero_si256(); SUMS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn vnni_round() {
    use std::arch::x86_64::{_mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_setzero_si512};
    let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
    let mut sums = [_mm512_setzero_si512(); SUMS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_counts_its_operations() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            assert!(multiply_add(isa) >= (2 * SUMS * STEPS) as f64);
        }
    }

    #[test]
    fn the_probes_measure_something() {
        let pool = Pool::new(2);
        assert!(read_bandwidth(&pool) > 1e8);
        assert!(int8_rate(&pool) > 1e7);
    }
}
