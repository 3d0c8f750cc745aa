//! What this machine can do at most, measured: bytes read per second and int8 operations per second.
//!
//! Every speed we print stands beside one of these two limits, taken in the same minute.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::isa::Isa;
use crate::memory::{AlignedBytes, OutOfMemory};
use crate::pool::{Pool, share};

/// Larger than the caches of the CPUs we know, small enough to probe in a blink.
const BUFFER: usize = 256 << 20;

/// Bytes per second that the pool's threads read from memory together, the best of the passes that fit into `time`.
pub fn read_bandwidth(pool: &Pool, time: Duration) -> Result<f64, OutOfMemory> {
    let mut buffer = AlignedBytes::zeroed(BUFFER)?;
    // Pages that were never written all map to one page of zeros, which the caches hold.
    buffer.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    let words: &[u64] = bytemuck::cast_slice(&buffer);
    Ok(best(time, || {
        pool.run(|index| {
            let mut sums = [0u64; 32];
            let chunks = words[share(words.len(), index, pool.threads())].chunks_exact(sums.len());
            for chunk in chunks {
                sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
            }
            black_box(sums);
        });
        BUFFER as f64
    }))
}

/// Int8 operations (a multiplication and an addition count two) per second of the pool's threads together, at the
/// instruction set in force, from registers.
pub fn int8_rate(pool: &Pool, time: Duration) -> f64 {
    best(time, || {
        let rounds = 1 << 14;
        pool.run(|_| {
            match Isa::active() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the level in force is available (`Isa::active`).
                Isa::Avx512Vnni => unsafe { x86_64::dot_avx512vnni(rounds) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { x86_64::dot_avx2(rounds) },
                _ => dot_scalar(rounds),
            }
        });
        (2 * CELL * rounds * pool.threads()) as f64
    })
}

/// The best rate of `work`, which returns how much it did, repeated for `time`.
fn best(time: Duration, mut work: impl FnMut() -> f64) -> f64 {
    work();
    let (start, mut best) = (Instant::now(), 0f64);
    while best == 0.0 || start.elapsed() < time {
        let before = Instant::now();
        let done = work();
        best = best.max(done / before.elapsed().as_secs_f64().max(1e-9));
    }
    best
}

/// Multiplications in one round of each of the loops below.
const CELL: usize = 16 * 64;

fn dot_scalar(rounds: usize) {
    let (a, b) = ([3u8; CELL], [5i8; CELL]);
    for _ in 0..rounds {
        let (a, b) = black_box((&a, &b));
        black_box(a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>());
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::{
        _mm256_add_epi32, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_set1_epi16,
        _mm256_setzero_si256, _mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_setzero_si512,
    };
    use std::hint::black_box;

    /// 16 independent chains hide the instruction's latency.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dot_avx512vnni(rounds: usize) {
        let (a, b) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
        let mut sums = [_mm512_setzero_si512(); 16];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    /// Bytes to pairs to quads to the sum: three instructions for 32 multiplications.
    #[target_feature(enable = "avx2")]
    pub(super) fn dot_avx2(rounds: usize) {
        let (a, b, ones) = black_box((_mm256_set1_epi8(3), _mm256_set1_epi8(5), _mm256_set1_epi16(1)));
        let mut sums = [_mm256_setzero_si256(); 8];
        for _ in 0..4 * rounds {
            let a = black_box(a);
            for sum in &mut sums {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
            }
        }
        black_box(sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_are_positive_and_finite() {
        let pool = Pool::new(2);
        let bandwidth = read_bandwidth(&pool, Duration::from_millis(5)).unwrap();
        let rate = int8_rate(&pool, Duration::from_millis(5));
        assert!(bandwidth.is_finite() && bandwidth > 1e6, "{bandwidth}");
        assert!(rate.is_finite() && rate > 1e6, "{rate}");
    }
}
