//! Activations on their way into a product: quantised once by groups for every matrix that reads them.
//!
//! For each group of a row, with `L` = 127 (A8) or 16383 (A16): `absmax` is the integer maximum of the bits of `|x|`,
//! `sx = absmax / L`, `xq = rne(x · (L / absmax))`. Two roundings of at most half a unit each leave `|xq| ≤ L`. A group
//! whose `L / absmax` is not finite (zeros, or numbers so small that nothing is lost) has `sx = 0` and `xq = 0`; one
//! with an Inf or NaN has `sx` = NaN and `xq = 0`, so that exactly this row's outputs are NaN.
//!
//! How a row of quantised activations is laid out depends on the kernels that read it, 4 inputs at a time:
//!
//! ```text
//! scalar      i16 x0 x1 x2 x3
//! avx2        i16 x0 x2 x1 x3                          pairs for 16-bit multiply-add with even and odd bytes
//! avx512vnni  A8: i8 x0 x1 x2 x3;  A16: i8 h0 h1 h2 h3 l0 l1 l2 l3, with h = xq >> 7 and l = xq & 127
//! ```

use super::{scalar, self_test};
use crate::format::{Format, PackedMatrix, Precision};
use crate::isa::Isa;
use crate::pool::{Disjoint, Pool, share};

/// Below this many activations a parallel region costs more than it saves.
const PARALLEL: usize = 1 << 14;

/// What a kernel needs to know of one quantised group beside its codes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Group {
    /// sx.
    pub(crate) scale: f32,
    /// Σ xq.
    pub(crate) sum: i32,
    /// sx · f32(Σ xq).
    pub(crate) moment: f32,
    /// -8 · Σ xq: the correction of symmetric codes, before the shift that the width of the codes adds.
    pub(crate) minus_eight_sums: i32,
}

impl Group {
    pub(crate) fn new(scale: f32, sum: i32) -> Group {
        Group { scale, sum, moment: scale * sum as f32, minus_eight_sums: -8 * sum }
    }
}

/// The factors of one group: `(L / absmax, absmax / L)`, or the special cases of the head comment.
pub(crate) fn factors(absmax_bits: u32, precision: Precision) -> (f32, f32) {
    let levels = levels(precision);
    let absmax = f32::from_bits(absmax_bits);
    let inverse = levels / absmax;
    if !absmax.is_finite() {
        (0.0, f32::NAN)
    } else if inverse.is_finite() {
        (inverse, absmax / levels)
    } else {
        (0.0, 0.0)
    }
}

pub(crate) fn levels(precision: Precision) -> f32 {
    match precision {
        Precision::A8 => 127.0,
        Precision::A16 => 16383.0,
        Precision::F32 => unreachable!("f32 activations are not quantised"),
    }
}

/// Quantised rows for one group size and precision.
pub(crate) struct Plane {
    pub(crate) group: usize,
    pub(crate) precision: Precision,
    /// Groups of a row.
    pub(crate) groups: usize,
    /// Bytes of a row in `codes`.
    pub(crate) stride: usize,
    /// `(m, stride)`; words keep them aligned.
    codes: Vec<u64>,
    /// `(m, groups)`.
    pub(crate) scales: Vec<Group>,
    fresh: bool,
}

impl Plane {
    /// The codes of all rows, `(m, stride)`.
    pub(crate) fn codes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.codes)
    }
}

/// Reusable buffers that hold the rows of one activation matrix, quantised as the matrices that read it ask for.
#[derive(Default)]
pub struct Input {
    isa: Option<Isa>,
    m: usize,
    k: usize,
    planes: Vec<Plane>,
}

impl Input {
    /// Empty buffers; they grow on demand and are kept.
    pub fn new() -> Self {
        Input::default()
    }

    /// Quantises `x: (m, k)` once for each group size and precision among `matrices`.
    ///
    /// # Panics
    /// When `x` or a matrix has another shape.
    pub fn prepare(&mut self, pool: &Pool, x: &[f32], m: usize, k: usize, matrices: &[&PackedMatrix]) {
        self.prepare_with(self_test::best(), pool, x, m, k, matrices);
    }

    /// [`Input::prepare`] for the kernels of `isa`; products with this input use them.
    #[doc(hidden)]
    pub fn prepare_with(&mut self, isa: Isa, pool: &Pool, x: &[f32], m: usize, k: usize, matrices: &[&PackedMatrix]) {
        assert!(isa.available(), "{isa:?} on this CPU");
        assert_eq!(x.len(), m * k, "length of x: ({m}, {k})");
        (self.isa, self.m, self.k) = (Some(isa), m, k);
        self.planes.iter_mut().for_each(|plane| plane.fresh = false);
        for matrix in matrices {
            assert_eq!(matrix.columns(), k, "inputs of a matrix");
            let Format::Integer { group, .. } = matrix.format() else { continue };
            if matrix.precision() == Precision::F32 {
                continue;
            }
            let index =
                self.planes.iter().position(|plane| (plane.group, plane.precision) == (group, matrix.precision()));
            let index = index.unwrap_or_else(|| {
                self.planes.push(Plane {
                    group,
                    precision: matrix.precision(),
                    groups: 0,
                    stride: 0,
                    codes: Vec::new(),
                    scales: Vec::new(),
                    fresh: false,
                });
                self.planes.len() - 1
            });
            if !self.planes[index].fresh {
                fill(&mut self.planes[index], isa, pool, x, m, k);
            }
        }
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa.expect("prepare comes before the product")
    }

    /// The plane for `matrix`; panics when it was not prepared for these shapes.
    pub(crate) fn plane(&self, matrix: &PackedMatrix, m: usize) -> Option<&Plane> {
        assert_eq!((self.m, self.k), (m, matrix.columns()), "(m, k) of the prepared input");
        let Format::Integer { group, .. } = matrix.format() else { return None };
        if matrix.precision() == Precision::F32 {
            return None;
        }
        let same = |plane: &&Plane| plane.fresh && (plane.group, plane.precision) == (group, matrix.precision());
        Some(self.planes.iter().find(same).expect("the input was not prepared for this matrix"))
    }
}

fn bytes_per_input(isa: Isa, precision: Precision) -> usize {
    if isa == Isa::Avx512Vnni && precision == Precision::A8 { 1 } else { 2 }
}

fn fill(plane: &mut Plane, isa: Isa, pool: &Pool, x: &[f32], m: usize, k: usize) {
    plane.groups = k.div_ceil(plane.group);
    // Vector code stores the codes of 16 inputs at a time.
    plane.stride = k.next_multiple_of(16) * bytes_per_input(isa, plane.precision);
    plane.codes.resize(m * plane.stride / 8, 0);
    plane.scales.resize(m * plane.groups, Group::default());
    let codes: &mut [u8] = bytemuck::cast_slice_mut(&mut plane.codes);
    let (stride, groups, group, precision) = (plane.stride, plane.groups, plane.group, plane.precision);
    let rows = |range: std::ops::Range<usize>, codes: &mut [u8], scales: &mut [Group]| {
        let rows = codes.chunks_exact_mut(stride).zip(scales.chunks_exact_mut(groups));
        for (row, (codes, scales)) in range.zip(rows) {
            quantize_row(isa, &x[row * k..][..k], group, precision, codes, scales);
        }
    };
    if x.len() < PARALLEL {
        rows(0..m, codes, &mut plane.scales);
    } else {
        let (codes, scales) = (Disjoint::new(codes), Disjoint::new(&mut plane.scales));
        pool.run(|thread| {
            let range = share(m, thread, pool.threads());
            // SAFETY: the shares of different threads do not overlap.
            let (codes, scales) = unsafe {
                (
                    codes.slice(range.start * stride..range.end * stride),
                    scales.slice(range.start * groups..range.end * groups),
                )
            };
            rows(range, codes, scales);
        });
    }
    plane.fresh = true;
}

fn quantize_row(isa: Isa, x: &[f32], group: usize, precision: Precision, codes: &mut [u8], scales: &mut [Group]) {
    match isa {
        Isa::Scalar => scalar::quantize(x, group, precision, codes, scales),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `prepare` has checked that the CPU has the level.
        Isa::Avx2 => unsafe { super::x86_64::avx2::quantize(x, group, precision, codes, scales) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni => unsafe { super::x86_64::avx512::quantize(x, group, precision, codes, scales) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512Vnni => unreachable!("an unavailable level"),
    }
}
