//! Philox4x32-10 (Salmon et al. 2011) and the Gumbel noise drawn from it.
//!
//! Noise is a pure function of (seed, position, token), so a draw depends on neither batch nor speculation.

use crate::math::{log_lanes, log_of_parts};
use crate::vector::{Arithmetic, LANES, Scalar, Simd};

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Upper half of the product.
#[inline(always)]
fn high(a: u32, b: u32) -> u32 {
    ((u64::from(a) * u64::from(b)) >> 32) as u32
}

/// Ten rounds on `N` counters at once; `counter[i]` is the i-th word of each.
#[inline(always)]
fn rounds<const N: usize>(mut counter: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    for _ in 0..10 {
        let mut next = [[0; N]; 4];
        for i in 0..N {
            next[0][i] = high(MULTIPLIERS[1], counter[2][i]) ^ counter[1][i] ^ key[0];
            next[1][i] = MULTIPLIERS[1].wrapping_mul(counter[2][i]);
            next[2][i] = high(MULTIPLIERS[0], counter[0][i]) ^ counter[3][i] ^ key[1];
            next[3][i] = MULTIPLIERS[0].wrapping_mul(counter[0][i]);
        }
        counter = next;
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Philox4x32-10 of one counter.
///
/// ```
/// use farthing_kernels::philox::philox4x32;
/// assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
/// ```
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    rounds(counter.map(|word| [word]), key).map(|word| word[0])
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// No Gumbel noise is above it: `-ln(2^-33) = 22.87`.
pub(crate) const GUMBEL_BOUND: f32 = 23.0;

/// Standard Gumbel noise `-ln(-ln(1 - u))`, `u = (w + ½)/2^32`, w the first word of Philox with key = seed and
/// counter = (position, token, 0).
///
/// Adding it to log-probabilities and taking the greatest draws from them.
pub fn gumbel(seed: u64, position: u64, token: u32) -> f32 {
    let [low, high] = halves(position);
    let word = philox4x32([low, high, token, 0], halves(seed))[0];
    gumbel_of_words(Scalar::<1>, [word as f32], [!word as f32])[0]
}

/// Vectors of words made at once: one alone would wait for each multiplication.
pub(crate) const VECTORS: usize = 4;
const TOKENS: usize = VECTORS * LANES;
/// 0, 1, 2 ...
const OFFSETS: [u32; TOKENS] = {
    let mut offsets = [0; TOKENS];
    let mut i = 0;
    while i < TOKENS {
        offsets[i] = i as u32;
        i += 1;
    }
    offsets
};

/// The words behind the noise of the tokens from `first` on.
#[inline(always)]
pub(crate) fn words(seed: u64, position: u64, first: u32) -> [[u32; LANES]; VECTORS] {
    let [low, high] = halves(position);
    let mut tokens = OFFSETS;
    for token in &mut tokens {
        *token = token.wrapping_add(first);
    }
    let words = rounds([[low; TOKENS], [high; TOKENS], tokens, [0; TOKENS]], halves(seed))[0];
    std::array::from_fn(|i| words.as_chunks().0[i])
}

/// [`gumbel`] of some words.
#[inline(always)]
pub(crate) fn gumbel_lanes<S: Simd>(simd: S, words: &[u32; LANES]) -> S::F {
    let mut inverted = *words;
    for word in &mut inverted {
        *word = !*word;
    }
    gumbel_of_words(simd, simd.of_u32(words), simd.of_u32(&inverted))
}

/// Whether [`gumbel`] of some words may exceed `-ln(bound)`: never false when it does, rarely true when it doesn't.
#[inline(always)]
pub(crate) fn may_exceed<S: Simd>(simd: S, words: &[u32; LANES], bound: S::F) -> S::M {
    // -ln(1 - u) is at least u.
    let u = simd.mul(simd.of_u32(words), simd.splat(1.0 / 4_294_967_296.0));
    simd.less(u, simd.mul(bound, simd.splat(1.001)))
}

/// `words` and their complements as floats.
#[inline(always)]
fn gumbel_of_words<A: Arithmetic>(a: A, words: A::F, inverted: A::F) -> A::F {
    // u and 1 - u, each with the relative accuracy of a float.
    let (unit, half) = (a.splat(1.0 / 4_294_967_296.0), a.splat(0.5 / 4_294_967_296.0));
    let u = a.mul_add(words, unit, half);
    let (m, n) = a.split_exponent(a.mul_add(inverted, unit, half));
    // Where 1 - u is near 1 its f is -u, and n is 0 already.
    let f = a.select(a.less(u, a.splat(0.25)), a.sub(a.splat(0.0), u), a.sub(m, a.splat(1.0)));
    let exponential = a.sub(a.splat(0.0), log_of_parts(a, f, n));
    a.sub(a.splat(0.0), log_lanes(a, exponential))
}

/// Reproducible numbers in [-1, 1) for tests.
#[cfg(test)]
pub(crate) fn uniforms(seed: u64, count: usize) -> Vec<f32> {
    (0..count).map(|i| (philox4x32([i as u32, 0, 0, 1], halves(seed))[0] >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::vector::{Kernel, dispatch};

    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        assert_eq!(philox4x32([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn gumbel_matches_its_formula_in_the_tails_too() {
        for word in [0, 1, 2, 77, 1 << 29, (1 << 30) - 1, 1 << 30, 1 << 31, u32::MAX - 1, u32::MAX] {
            let got = gumbel_of_words(Scalar::<1>, [word as f32], [!word as f32])[0];
            let u = (f64::from(word) + 0.5) / 4_294_967_296.0;
            let exact = -(-(-u).ln_1p()).ln();
            assert!((f64::from(got) - exact).abs() < 2e-6, "{word}: {got} {exact}");
            assert!(got < GUMBEL_BOUND);
        }
    }

    struct Block(u64, u64, u32);
    impl Kernel for Block {
        type Output = [f32; TOKENS];
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [f32; TOKENS] {
            let mut out = [0.0; TOKENS];
            for (out, words) in out.as_chunks_mut().0.iter_mut().zip(&words(self.0, self.1, self.2)) {
                let noise = gumbel_lanes(simd, words);
                simd.store(noise, out);
                for (lane, noise) in out.iter().enumerate() {
                    let bound = |x: f32| simd.splat(crate::math::exp(-x));
                    let may = |x: f32| simd.bits(may_exceed(simd, words, bound(x))) >> lane & 1 == 1;
                    assert!(may(*noise) && may(noise - 1e-4));
                }
            }
            out
        }
    }

    #[test]
    fn lanes_on_every_level_are_the_single_numbers() {
        let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
        for (seed, position) in [(0, 0), (7, 1 << 40), (u64::MAX, 12), (1 << 33, 99)] {
            for first in (0..20_000).step_by(TOKENS) {
                let singles: [f32; TOKENS] = std::array::from_fn(|i| gumbel(seed, position, first + i as u32));
                for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                    assert_eq!(dispatch(isa, Block(seed, position, first)), singles, "{}", isa.name());
                }
                for x in singles.map(f64::from) {
                    (sum, squares, count) = (sum + x, squares + x * x, count + 1.0);
                }
            }
        }
        // Mean Euler's constant, variance π²/6.
        let (mean, variance) = (sum / count, squares / count - (sum / count).powi(2));
        assert!((mean - 0.577_216).abs() < 0.02 && (variance - 1.644_934).abs() < 0.05, "{mean} {variance}");
    }
}
