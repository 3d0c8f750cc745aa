//! Activations on their way into a product: quantised once by groups for every matrix that reads them.
//!
//! For each group of a row, with `L` = 127 (A8) or 16383 (A16): `absmax` is the integer maximum of the bits of `|x|`,
//! `sx = absmax / L`, `xq = rne(x · (L / absmax))`. Two roundings of at most half a unit each leave `|xq| ≤ L`. A group
//! whose `L / absmax` is not finite (zeros, or numbers so small that nothing is lost) has `sx = 0` and `xq = 0`; one
//! with an Inf or NaN has `sx` = NaN and `xq = 0`, so that exactly this row's outputs are NaN.
//!
//! How rows of quantised activations are laid out depends on the kernels that read them. The scalar ones take
//! `(tokens, inputs)` i16. The others take signed bytes: rows are cut into blocks of `M` nearly equal numbers of tokens,
//! and in a block of `M` tokens lie `[group][plane][quad][M]` × 4 bytes. A8 has one plane; A16 has `xq >> 7`, then
//! `xq & 127`. The last group of a row is followed by zeros, as far as the step of any format may reach.

use std::ops::Range;

use super::{scalar, self_test};
use crate::format::layout::{QUAD, padded_group};
use crate::format::{Format, PackedMatrix, Precision};
use crate::isa::Isa;
use crate::pool::{Disjoint, Pool, share};

/// Below this many activations a parallel region costs more than it saves.
const PARALLEL: usize = 1 << 14;

/// What a kernel needs to know of one quantised group beside its codes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(crate) struct Group {
    /// sx.
    pub(crate) scale: f32,
    /// Σ xq.
    pub(crate) sum: i32,
    /// sx · f32(Σ xq).
    pub(crate) moment: f32,
    /// The correction of symmetric 4-bit codes.
    pub(crate) minus_eight_sums: i32,
}

impl Group {
    pub(crate) fn new(scale: f32, sum: i32) -> Group {
        Group { scale, sum, moment: scale * sum as f32, minus_eight_sums: -8 * sum }
    }
}

/// Sums of the parts of one group of 256, for super-blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Subs {
    /// For each plane, -32 times the sum of each 16 inputs.
    pub(crate) minus_32_sums: [[i32; 16]; 2],
    /// For each plane, the sums `s` of each 32 inputs as bytes: eight times `s >> 7`, eight times `s & 127`.
    pub(crate) quads: [[u8; 16]; 2],
}

impl Subs {
    /// From the sums of each 16 inputs of a plane.
    pub(crate) fn set(&mut self, plane: usize, sums: &[i32; 16]) {
        self.minus_32_sums[plane] = sums.map(|sum| -32 * sum);
        for (i, pair) in sums.as_chunks::<2>().0.iter().enumerate() {
            let sum = pair[0] + pair[1];
            (self.quads[plane][i], self.quads[plane][i + 8]) = ((sum >> 7) as u8, (sum & 127) as u8);
        }
    }
}

/// Where the codes of one token go: quad `q` of a plane of its group lies `4 * M * q` bytes behind the first.
pub(crate) struct Sink<'a> {
    /// The codes of the token's block, from the token's own first quad on.
    codes: &'a mut [u8],
    /// What belongs to groups, of the token's block, from the token's own first group on.
    scales: &'a mut [Group],
    subs: &'a mut [Subs],
    /// M.
    tokens: usize,
}

impl Sink<'_> {
    /// Stores what belongs to group `g`.
    #[inline(always)]
    pub(crate) fn group(&mut self, g: usize, group: Group) {
        self.scales[g * self.tokens] = group;
    }

    /// Sums of the parts of group `g`, if they are asked for.
    #[inline(always)]
    pub(crate) fn sub(&mut self, g: usize) -> Option<&mut Subs> {
        self.subs.get_mut(g * self.tokens)
    }

    /// Stores 16 inputs of a plane that begins at `plane`, from input `first` on; both count inputs of one token.
    #[inline(always)]
    pub(crate) fn store(&mut self, plane: usize, first: usize, codes: &[u8; 16]) {
        let at = (plane + first) * self.tokens;
        if self.tokens == 1 {
            self.codes[at..at + 16].copy_from_slice(codes);
        } else {
            let stride = QUAD * self.tokens;
            let out = &mut self.codes[at..at + 3 * stride + QUAD];
            for (quad, codes) in codes.as_chunks::<QUAD>().0.iter().enumerate() {
                out[quad * stride..quad * stride + QUAD].copy_from_slice(codes);
            }
        }
    }

    /// Where the quads of `inputs` inputs lie, from input `first` on, and the bytes from one quad to the next.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) fn quads(&mut self, first: usize, inputs: usize) -> (*mut u8, usize) {
        let (at, stride) = (first * self.tokens, QUAD * self.tokens);
        (self.codes[at..at + (inputs / QUAD - 1) * stride + QUAD].as_mut_ptr(), stride)
    }
}

/// The lengths of a token's codes.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) k: usize,
    pub(crate) group: usize,
    pub(crate) precision: Precision,
}

impl Shape {
    pub(crate) fn groups(self) -> usize {
        self.k.div_ceil(self.group)
    }

    pub(crate) fn planes(self) -> usize {
        if self.precision == Precision::A16 { 2 } else { 1 }
    }

    fn last(self) -> usize {
        padded_group(self.k - (self.groups() - 1) * self.group, self.groups())
    }

    /// Bytes of one plane of group `g`.
    pub(crate) fn plane(self, g: usize) -> usize {
        if g + 1 == self.groups() { self.last() } else { self.group }
    }

    /// Inputs of a token with the padding of its last group.
    fn padded(self) -> usize {
        (self.groups() - 1) * self.group + self.last()
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
    pub(crate) shape: Shape,
    /// Whether `subs` is filled.
    supers: bool,
    /// Tokens in all.
    pub(crate) tokens: usize,
    /// Bytes of a token in `codes`.
    pub(crate) stride: usize,
    /// `(m, stride)`; words keep them aligned.
    codes: Vec<u64>,
    /// `[block][group][M]`.
    pub(crate) scales: Vec<Group>,
    /// `[block][group][M]`, or empty.
    pub(crate) subs: Vec<Subs>,
    fresh: bool,
}

impl Plane {
    /// The codes of all tokens, `(m, stride)`.
    pub(crate) fn codes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.codes)
    }
}

/// What of a plane a matrix asks for.
fn key(matrix: &PackedMatrix) -> Option<(usize, Precision, bool)> {
    let group = matrix.format().activation_group(matrix.columns())?;
    let supers = matches!(matrix.format(), Format::Super(_));
    (matrix.precision() != Precision::F32).then_some((group, matrix.precision(), supers))
}

/// Most tokens of a block: with 64 or 16 rows their sums fit the registers.
pub(crate) fn most_tokens(isa: Isa) -> usize {
    match isa {
        Isa::Scalar => 1,
        Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni | Isa::Avx512Vbmi => 6,
    }
}

/// Blocks that `m` tokens are cut into.
pub(crate) fn blocks(isa: Isa, m: usize) -> usize {
    m.div_ceil(most_tokens(isa))
}

/// The tokens of some of the blocks of `m` tokens.
pub(crate) fn tokens(isa: Isa, m: usize, range: &Range<usize>) -> Range<usize> {
    let all = blocks(isa, m);
    let first = |block: usize| if block == all { m } else { share(m, block, all).start };
    first(range.start)..first(range.end)
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
            let Some((group, precision, supers)) = key(matrix) else { continue };
            let same =
                |plane: &Plane| (plane.shape.group, plane.shape.precision, plane.supers) == (group, precision, supers);
            let index = self.planes.iter().position(same).unwrap_or_else(|| {
                self.planes.push(Plane {
                    shape: Shape { k, group, precision },
                    supers,
                    tokens: 0,
                    stride: 0,
                    codes: Vec::new(),
                    scales: Vec::new(),
                    subs: Vec::new(),
                    fresh: false,
                });
                self.planes.len() - 1
            });
            if !self.planes[index].fresh {
                self.planes[index].shape.k = k;
                fill(&mut self.planes[index], isa, pool, x, m);
            }
        }
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa.expect("prepare comes before the product")
    }

    /// The plane for `matrix`; panics when it was not prepared for these shapes.
    pub(crate) fn plane(&self, matrix: &PackedMatrix, m: usize) -> Option<&Plane> {
        assert_eq!((self.m, self.k), (m, matrix.columns()), "(m, k) of the prepared input");
        let wanted = key(matrix)?;
        let same = |plane: &&Plane| plane.fresh && (plane.shape.group, plane.shape.precision, plane.supers) == wanted;
        Some(self.planes.iter().find(same).expect("the input was not prepared for this matrix"))
    }
}

fn fill(plane: &mut Plane, isa: Isa, pool: &Pool, x: &[f32], m: usize) {
    let shape = plane.shape;
    let groups = shape.groups();
    plane.tokens = m;
    plane.stride = shape.padded() * if isa == Isa::Scalar { 2 } else { shape.planes() };
    plane.codes.resize(m * plane.stride / 8, 0);
    plane.scales.resize(m * groups, Group::default());
    plane.subs.resize(if plane.supers { m * groups } else { 0 }, Subs::default());
    let codes: &mut [u8] = bytemuck::cast_slice_mut(&mut plane.codes);
    let (stride, blocks, supers) = (plane.stride, blocks(isa, m), plane.supers);
    let part = |range: Range<usize>, mut codes: &mut [u8], mut scales: &mut [Group], mut subs: &mut [Subs]| {
        for block in range {
            let tokens = share(m, block, blocks);
            let (block_codes, rest) = codes.split_at_mut(tokens.len() * stride);
            codes = rest;
            let (block_scales, rest) = scales.split_at_mut(tokens.len() * groups);
            scales = rest;
            let (block_subs, rest) = subs.split_at_mut(if supers { tokens.len() * groups } else { 0 });
            subs = rest;
            for (token, row) in tokens.clone().enumerate() {
                let sink = Sink {
                    codes: &mut block_codes[if isa == Isa::Scalar { 0 } else { token * QUAD }..],
                    scales: &mut block_scales[token..],
                    subs: if supers { &mut block_subs[token..] } else { &mut [] },
                    tokens: tokens.len(),
                };
                quantize_row(isa, &x[row * shape.k..][..shape.k], shape, sink);
            }
        }
    };
    if x.len() < PARALLEL {
        part(0..blocks, codes, &mut plane.scales, &mut plane.subs);
    } else {
        let (codes, scales) = (Disjoint::new(codes), Disjoint::new(&mut plane.scales));
        let subs = Disjoint::new(&mut plane.subs);
        pool.run(|thread| {
            let range = share(blocks, thread, pool.threads());
            let std::ops::Range { start, end } = tokens(isa, m, &range);
            let sub = |token: usize| if supers { token * groups } else { 0 };
            // SAFETY: the shares of different threads do not overlap.
            let (codes, scales, subs) = unsafe {
                (
                    codes.slice(start * stride..end * stride),
                    scales.slice(start * groups..end * groups),
                    subs.slice(sub(start)..sub(end)),
                )
            };
            part(range, codes, scales, subs);
        });
    }
    plane.fresh = true;
}

fn quantize_row(isa: Isa, x: &[f32], shape: Shape, sink: Sink<'_>) {
    match isa {
        Isa::Scalar => scalar::quantize(x, shape, sink.codes, sink.scales, sink.subs),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `prepare` has checked that the CPU has the level.
        Isa::Avx2 | Isa::AvxVnni => unsafe { super::x86_64::avx2::quantize(x, shape, sink) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni | Isa::Avx512Vbmi => unsafe { super::x86_64::quantize::quantize(x, shape, sink) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("an unavailable level"),
    }
}
