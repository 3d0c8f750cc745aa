//! One row: its logits widened into scratch, sums over them, and the gradient.

use super::vectors::{Number, Task, Vectors, Wide};
use super::{CHUNK, Divergence, Gradient, Job, Row, Transform};
use crate::isa::Isa;
use crate::vector::LANES;

/// What a logarithm of no probability counts as where the other side has some.
const CLAMP: f64 = -1e4;

/// Space of one thread, kept from row to row; whole vectors, filled up with logits of minus infinity.
pub(super) struct Scratch<W> {
    /// The student's logits, then one factor of the gradient's terms.
    student: Vec<W>,
    /// The teacher's logits, then the other factor.
    teacher: Vec<W>,
    greatest_of_teacher: f64,
    /// A bit for each column that some row keeps.
    pub(super) kept: Vec<u16>,
}

impl<W: Wide> Scratch<W> {
    pub(super) fn new(v: usize) -> Scratch<W> {
        let vectors = v.div_ceil(LANES);
        let space = || vec![W::NEG_INFINITY; vectors * LANES];
        Scratch { student: space(), teacher: space(), greatest_of_teacher: 0.0, kept: vec![0; vectors] }
    }

    pub(super) fn teacher<B: Number<Wide = W>>(&mut self, isa: Isa, z: &[B], transform: &Transform<'_>) {
        self.greatest_of_teacher = W::perform(isa, Logits { z, transform, out: &mut self.teacher });
    }

    /// A teacher that is sure of `label`.
    pub(super) fn label(&mut self, label: usize) {
        self.teacher.fill(W::NEG_INFINITY);
        self.teacher[label] = W::of(0.0);
        self.greatest_of_teacher = 0.0;
    }
}

/// The divergence of one row from the teacher in `scratch`; its gradient goes over `z`: (v,).
pub(super) fn divergence_of_row<A: Number>(
    job: &Job<'_>,
    z: &mut [A],
    weight: f64,
    scratch: &mut Scratch<A::Wide>,
) -> Row {
    if weight == 0.0 {
        if matches!(job.gradient, Gradient::Filtered(_)) {
            z.fill(A::ZERO);
        }
        return Row::default();
    }
    let transform = &job.of_student;
    let student = A::Wide::perform(job.isa, Logits { z: &*z, transform, out: &mut scratch.student });
    let greatest = [student, scratch.greatest_of_teacher];
    let (x, y) = (&mut *scratch.student, &mut *scratch.teacher);
    let sums = A::Wide::perform(job.isa, Sums { kind: job.kind, x, y, greatest });
    let (s, t) = (sums.student, sums.teacher);
    let mut row = Row { entropy: s.ln() - sums.entropy / s, clamped: sums.clamped, ..Row::default() };
    let terms;
    (row.divergence, terms) = match job.kind {
        Divergence::ReverseKl => {
            let mean = sums.mixed / s;
            (mean - s.ln() + t.ln(), Terms::Products { factor: 1.0 / s, mean })
        }
        Divergence::ForwardKl => (sums.mixed / t - t.ln() + s.ln(), Terms::Differences([1.0 / s, 1.0 / t])),
        Divergence::CrossEntropy => (s.ln() - sums.mixed / t, Terms::Differences([1.0 / s, 1.0 / t])),
        Divergence::JensenShannon(beta) => {
            let task = Mixture { beta, x, y, logs: [s.ln(), t.ln()] };
            let [of_student, of_teacher] = A::Wide::perform(job.isa, task);
            let divergence = beta * of_teacher + (1.0 - beta) * of_student;
            (divergence, Terms::Products { factor: 1.0 - beta, mean: of_student })
        }
    };
    if row.divergence < 0.0 {
        // Rounding alone makes it negative.
        row.divergence = 0.0;
    }
    if let Gradient::Filtered(filter) = job.gradient {
        let weight_of_products = weight * transform.scale / transform.temperature;
        let threshold = filter * weight.abs();
        let (terms, kept) = (terms.times(weight_of_products), &mut *scratch.kept);
        let slopes = Slopes { terms, transform, threshold, x, y, z, kept };
        row.dropped = A::Wide::perform(job.isa, slopes);
    }
    row
}

/// Products of a head to logits; returns the greatest.
struct Logits<'a, A: Number> {
    z: &'a [A],
    transform: &'a Transform<'a>,
    out: &'a mut [A::Wide],
}

impl<A: Number> Task<A::Wide> for Logits<'_, A> {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vectors<Wide = A::Wide>>(self, v: V) -> f64 {
        let to = To::new(v, self.transform);
        let (whole, tail) = self.z.as_chunks::<LANES>();
        let (out, _) = self.out.as_chunks_mut::<LANES>();
        let mut greatest = v.splat(f64::NEG_INFINITY);
        for (i, (z, out)) in whole.iter().zip(&mut *out).enumerate() {
            let x = to.logits(v, v.load(&A::widen(z)), i);
            greatest = v.max(greatest, x);
            v.store(x, out);
        }
        if !tail.is_empty() {
            let mut padded = [A::ZERO; LANES];
            padded[..tail.len()].copy_from_slice(tail);
            let out = &mut out[whole.len()];
            v.store(to.logits(v, v.load(&A::widen(&padded)), whole.len()), out);
            out[tail.len()..].fill(A::Wide::NEG_INFINITY);
            greatest = v.max(greatest, v.load(out));
        }
        v.maximum(greatest)
    }
}

/// A [`Transform`] in vectors.
struct To<'a, V: Vectors> {
    bias: Option<&'a [f64]>,
    /// `scale / cap` and `cap / temperature`, or `scale / temperature` alone.
    inner: V::F,
    outer: V::F,
    capped: bool,
}

impl<'a, V: Vectors> To<'a, V> {
    #[inline(always)]
    fn new(v: V, transform: &Transform<'a>) -> To<'a, V> {
        let Transform { bias, scale, cap, temperature } = *transform;
        let inner = v.splat(scale / cap.unwrap_or(temperature));
        To { bias, inner, outer: v.splat(cap.unwrap_or(1.0) / temperature), capped: cap.is_some() }
    }

    /// `(z + bias) · inner` for vector `i` of the row.
    #[inline(always)]
    fn scaled(&self, v: V, z: V::F, i: usize) -> V::F {
        let Some(bias) = self.bias else { return v.mul(z, self.inner) };
        let bias = &bias[i * LANES..];
        let bias = std::array::from_fn(|lane| V::Wide::of(bias.get(lane).copied().unwrap_or(0.0)));
        v.mul(v.add(z, v.load(&bias)), self.inner)
    }

    #[inline(always)]
    fn logits(&self, v: V, z: V::F, i: usize) -> V::F {
        let x = self.scaled(v, z, i);
        if self.capped { v.mul(v.tanh(x), self.outer) } else { x }
    }

    /// What the cap makes of a slope.
    #[inline(always)]
    fn slope(&self, v: V, z: V::F, i: usize, slope: V::F) -> V::F {
        if !self.capped {
            return slope;
        }
        let tanh = v.tanh(self.scaled(v, z, i));
        v.mul(slope, v.sub(v.splat(1.0), v.mul(tanh, tanh)))
    }
}

/// Sums over a row, exponentials relative to the greatest logit of each side.
#[derive(Clone, Copy, Default)]
struct Totals {
    /// `Σ e^x` and `Σ e^y`.
    student: f64,
    teacher: f64,
    /// `Σ x·e^x`.
    entropy: f64,
    /// Reverse: `Σ e^x·(x - y)`; forward: `Σ e^y·(y - x)`; cross-entropy: `Σ e^y·x`.
    mixed: f64,
    clamped: u32,
}

/// Makes the sums; leaves `e^x` and, in `y`, `x - y` (reverse), `e^y` (forward, cross-entropy) or the logits (else).
struct Sums<'a, W> {
    kind: Divergence,
    x: &'a mut [W],
    y: &'a mut [W],
    greatest: [f64; 2],
}

impl<W: Wide> Task<W> for Sums<'_, W> {
    type Output = Totals;

    #[inline(always)]
    fn run<V: Vectors<Wide = W>>(self, v: V) -> Totals {
        match self.kind {
            Divergence::ReverseKl => self.run_as::<V, REVERSE>(v),
            Divergence::ForwardKl => self.run_as::<V, FORWARD>(v),
            Divergence::CrossEntropy => self.run_as::<V, CROSS_ENTROPY>(v),
            Divergence::JensenShannon(_) => self.run_as::<V, JENSEN_SHANNON>(v),
        }
    }
}

const REVERSE: u8 = 0;
const FORWARD: u8 = 1;
const CROSS_ENTROPY: u8 = 2;
const JENSEN_SHANNON: u8 = 3;

impl<W: Wide> Sums<'_, W> {
    #[inline(always)]
    fn run_as<V: Vectors<Wide = W>, const KIND: u8>(self, v: V) -> Totals {
        let lowest = v.splat(V::LOWEST);
        let (zero, clamp) = (v.splat(0.0), v.splat(CLAMP));
        let greatest = [v.splat(self.greatest[0]), v.splat(self.greatest[1])];
        let mut totals = Totals::default();
        for (x, y) in self.x.chunks_mut(CHUNK).zip(self.y.chunks_mut(CHUNK)) {
            let (mut student, mut teacher, mut entropy, mut mixed) = (zero, zero, zero, zero);
            for (x, y) in x.as_chunks_mut::<LANES>().0.iter_mut().zip(y.as_chunks_mut::<LANES>().0) {
                // The order of the arguments lets NaN through.
                let a = v.max(lowest, v.sub(v.load(x), greatest[0]));
                let b = v.max(lowest, v.sub(v.load(y), greatest[1]));
                let (e, f) = (v.exp(a), v.exp(b));
                student = v.add(student, e);
                teacher = v.add(teacher, f);
                entropy = v.mul_add(e, a, entropy);
                // Only minus infinity comes out that low.
                let empty = v.splat(0.1 * V::LOWEST);
                match KIND {
                    REVERSE => {
                        let missing = v.less(b, empty);
                        let gap = v.sub(a, v.select(missing, clamp, b));
                        mixed = v.mul_add(e, gap, mixed);
                        totals.clamped += (v.bits(missing) & v.bits(v.less(zero, e))).count_ones();
                        v.store(gap, y);
                    }
                    FORWARD | CROSS_ENTROPY => {
                        let missing = v.less(a, empty);
                        let a = v.select(missing, clamp, a);
                        mixed = v.mul_add(f, if KIND == FORWARD { v.sub(b, a) } else { a }, mixed);
                        totals.clamped += (v.bits(missing) & v.bits(v.less(zero, f))).count_ones();
                        v.store(f, y);
                    }
                    _ => v.store(b, y),
                }
                v.store(if KIND == JENSEN_SHANNON { a } else { e }, x);
            }
            totals.student += v.sum(student);
            totals.teacher += v.sum(teacher);
            totals.entropy += v.sum(entropy);
            totals.mixed += v.sum(mixed);
        }
        totals
    }
}

/// `KL(p‖m)` and `KL(q‖m)`; leaves `p` and `log p - log m`.
struct Mixture<'a, W> {
    beta: f64,
    x: &'a mut [W],
    y: &'a mut [W],
    /// `log Σ e^x` and `log Σ e^y`.
    logs: [f64; 2],
}

impl<W: Wide> Task<W> for Mixture<'_, W> {
    type Output = [f64; 2];

    #[inline(always)]
    fn run<V: Vectors<Wide = W>>(self, v: V) -> [f64; 2] {
        let logs = [v.splat(self.logs[0]), v.splat(self.logs[1])];
        let (beta, rest, tiny) = (v.splat(self.beta), v.splat(1.0 - self.beta), v.splat(V::TINY));
        let mut totals = [0.0; 2];
        for (x, y) in self.x.chunks_mut(CHUNK).zip(self.y.chunks_mut(CHUNK)) {
            let (mut student, mut teacher) = (v.splat(0.0), v.splat(0.0));
            for (x, y) in x.as_chunks_mut::<LANES>().0.iter_mut().zip(y.as_chunks_mut::<LANES>().0) {
                let (a, b) = (v.sub(v.load(x), logs[0]), v.sub(v.load(y), logs[1]));
                let (p, q) = (v.exp(a), v.exp(b));
                let log = v.log(v.max(tiny, v.mul_add(beta, q, v.mul(rest, p))));
                let gap = v.sub(a, log);
                student = v.mul_add(p, gap, student);
                teacher = v.mul_add(q, v.sub(b, log), teacher);
                v.store(p, x);
                v.store(gap, y);
            }
            totals[0] += v.sum(student);
            totals[1] += v.sum(teacher);
        }
        totals
    }
}

/// How a gradient comes from the two factors that the sums have left.
#[derive(Clone, Copy)]
enum Terms {
    /// `factor·x·(y - mean)`
    Products { factor: f64, mean: f64 },
    /// `factors[0]·x - factors[1]·y`
    Differences([f64; 2]),
}

impl Terms {
    fn times(self, weight: f64) -> Terms {
        match self {
            Terms::Products { factor, mean } => Terms::Products { factor: weight * factor, mean },
            Terms::Differences(factors) => Terms::Differences(factors.map(|factor| weight * factor)),
        }
    }
}

/// The gradient, written over the products `z`; returns `Σ|g|` below the threshold and marks columns at or above it.
struct Slopes<'a, A: Number> {
    terms: Terms,
    transform: &'a Transform<'a>,
    threshold: f64,
    x: &'a [A::Wide],
    y: &'a [A::Wide],
    z: &'a mut [A],
    kept: &'a mut [u16],
}

impl<A: Number> Task<A::Wide> for Slopes<'_, A> {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vectors<Wide = A::Wide>>(self, v: V) -> f64 {
        let slope = Slope::new(v, self.terms, self.transform);
        let threshold = v.splat(self.threshold);
        let filtered = self.threshold > 0.0;
        let mut total = 0.0;
        let (x, y) = (self.x.as_chunks::<LANES>().0, self.y.as_chunks::<LANES>().0);
        for (chunk, z) in self.z.chunks_mut(CHUNK).enumerate() {
            let mut dropped = v.splat(0.0);
            let (whole, tail) = z.as_chunks_mut::<LANES>();
            let mut padded = [A::ZERO; LANES];
            padded[..tail.len()].copy_from_slice(tail);
            for j in 0..whole.len() + usize::from(!tail.is_empty()) {
                let i = chunk * (CHUNK / LANES) + j;
                let z = whole.get_mut(j).unwrap_or(&mut padded);
                let g = slope.at(v, v.load(&x[i]), v.load(&y[i]), v.load(&A::widen(z)), i);
                if filtered {
                    let magnitude = v.abs(g);
                    let small = v.less(magnitude, threshold);
                    dropped = v.add(dropped, v.select(small, magnitude, v.splat(0.0)));
                    self.kept[i] |= !v.bits(small);
                }
                let mut out = [A::Wide::ZERO; LANES];
                v.store(g, &mut out);
                *z = A::narrow(out);
            }
            tail.copy_from_slice(&padded[..tail.len()]);
            total += v.sum(dropped);
        }
        total
    }
}

/// [`Terms`] in vectors.
struct Slope<'a, V: Vectors> {
    to: To<'a, V>,
    products: bool,
    first: V::F,
    second: V::F,
}

impl<'a, V: Vectors> Slope<'a, V> {
    #[inline(always)]
    fn new(v: V, terms: Terms, transform: &Transform<'a>) -> Slope<'a, V> {
        let (products, first, second) = match terms {
            Terms::Products { factor, mean } => (true, factor, mean),
            Terms::Differences([first, second]) => (false, first, second),
        };
        Slope { to: To::new(v, transform), products, first: v.splat(first), second: v.splat(second) }
    }

    #[inline(always)]
    fn at(&self, v: V, x: V::F, y: V::F, z: V::F, i: usize) -> V::F {
        let x = v.mul(x, self.first);
        let slope = if self.products { v.mul(x, v.sub(y, self.second)) } else { v.sub(x, v.mul(y, self.second)) };
        self.to.slope(v, z, i, slope)
    }
}
