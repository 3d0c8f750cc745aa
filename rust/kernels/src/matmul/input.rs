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
pub(crate) const PARALLEL: usize = 1 << 14;

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

/// What a matrix asks of the rows it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    group: usize,
    precision: Precision,
    /// Whether the sums of parts of groups are needed.
    supers: bool,
}

impl Key {
    /// `None` for matrices that meet f32 rows.
    pub(crate) fn of(matrix: &PackedMatrix) -> Option<Key> {
        let group = matrix.format().activation_group(matrix.columns())?;
        let (precision, supers) = (matrix.precision(), matches!(matrix.format(), Format::Super(_)));
        (precision != Precision::F32).then_some(Key { group, precision, supers })
    }
}

/// Quantised rows for one key.
pub(crate) struct Plane {
    key: Key,
    shape: Shape,
    isa: Isa,
    /// Bytes of a token in `codes`.
    stride: usize,
    /// `(m, stride)`; words keep them aligned.
    codes: Vec<u64>,
    /// `[block][group][M]`.
    scales: Vec<Group>,
    /// `[block][group][M]`, or empty.
    subs: Vec<Subs>,
    fresh: bool,
}

/// Rows of a plane that were cut into blocks together.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) shape: Shape,
    pub(crate) tokens: usize,
    /// Bytes of a token in `codes`.
    pub(crate) stride: usize,
    /// `(tokens, stride)`.
    pub(crate) codes: &'a [u8],
    /// `[block][group][M]`.
    pub(crate) scales: &'a [Group],
    /// `[block][group][M]`, or empty.
    pub(crate) subs: &'a [Subs],
}

impl Plane {
    fn new(key: Key) -> Plane {
        Plane {
            key,
            shape: Shape { k: 1, group: key.group, precision: key.precision },
            isa: Isa::Scalar,
            stride: 0,
            codes: Vec::new(),
            scales: Vec::new(),
            subs: Vec::new(),
            fresh: false,
        }
    }

    /// Makes room for `m` rows of `k` inputs.
    fn resize(&mut self, isa: Isa, k: usize, m: usize) {
        (self.isa, self.shape.k, self.fresh) = (isa, k, true);
        self.stride = self.shape.padded() * if isa == Isa::Scalar { 2 } else { self.shape.planes() };
        self.codes.resize(m * self.stride / 8, 0);
        self.scales.resize(m * self.shape.groups(), Group::default());
        self.subs.resize(if self.key.supers { m * self.shape.groups() } else { 0 }, Subs::default());
    }

    /// `tokens` rows from row `first` on, which begins a block.
    pub(crate) fn rows(&self, first: usize, tokens: usize) -> Rows<'_> {
        let (range, groups) = (first..first + tokens, self.shape.groups());
        let parts = range.start * groups..range.end * groups;
        Rows {
            shape: self.shape,
            tokens,
            stride: self.stride,
            codes: &bytemuck::cast_slice(&self.codes)[range.start * self.stride..range.end * self.stride],
            scales: &self.scales[parts.clone()],
            subs: if self.key.supers { &self.subs[parts] } else { &[] },
        }
    }

    /// For threads that fill a block each.
    pub(crate) fn filler(&mut self) -> Filler<'_> {
        Filler {
            shape: self.shape,
            isa: self.isa,
            stride: self.stride,
            supers: self.key.supers,
            codes: Disjoint::new(bytemuck::cast_slice_mut(&mut self.codes)),
            scales: Disjoint::new(&mut self.scales),
            subs: Disjoint::new(&mut self.subs),
        }
    }
}

/// Fills the blocks of a plane.
pub(crate) struct Filler<'a> {
    shape: Shape,
    isa: Isa,
    stride: usize,
    supers: bool,
    codes: Disjoint<'a, u8>,
    scales: Disjoint<'a, Group>,
    subs: Disjoint<'a, Subs>,
}

impl<'a> Filler<'a> {
    /// The codes, groups and parts of groups of `rows`.
    ///
    /// # Safety
    /// No other thread is given any of the rows.
    unsafe fn parts(&self, rows: &Range<usize>) -> (&'a mut [u8], &'a mut [Group], &'a mut [Subs]) {
        let groups = self.shape.groups();
        let sub = |token: usize| if self.supers { token * groups } else { 0 };
        // SAFETY: the caller's promise.
        unsafe {
            (
                self.codes.slice(rows.start * self.stride..rows.end * self.stride),
                self.scales.slice(rows.start * groups..rows.end * groups),
                self.subs.slice(sub(rows.start)..sub(rows.end)),
            )
        }
    }

    /// Quantises `x`, as many rows of `k` inputs as `block` has.
    ///
    /// # Safety
    /// No other thread is given any of the rows.
    pub(crate) unsafe fn quantize(&self, block: Range<usize>, x: &[f32]) {
        // SAFETY: the caller's promise.
        let (codes, scales, subs) = unsafe { self.parts(&block) };
        for (token, x) in x.chunks_exact(self.shape.k).enumerate() {
            let sink = Sink {
                codes: &mut codes[if self.isa == Isa::Scalar { 0 } else { token * QUAD }..],
                scales: &mut scales[token..],
                subs: if self.supers { &mut subs[token..] } else { &mut [] },
                tokens: block.len(),
            };
            quantize_row(self.isa, x, self.shape, sink);
        }
    }

    /// Copies rows of `from`, a plane of the same shape with one row to a block; `rows` are as many as `block` has.
    ///
    /// # Safety
    /// No other thread is given any of the rows of `block`.
    pub(crate) unsafe fn gather(&self, block: Range<usize>, from: &Plane, rows: &[u32]) {
        // SAFETY: the caller's promise.
        let (codes, scales, subs) = unsafe { self.parts(&block) };
        let row = |i: usize| from.rows(rows[i] as usize, 1);
        interleave(
            rows.len(),
            |i| bytemuck::cast_slice::<u8, [u8; QUAD]>(row(i).codes),
            bytemuck::cast_slice_mut(codes),
        );
        interleave(rows.len(), |i| row(i).scales, scales);
        if self.supers {
            interleave(rows.len(), |i| row(i).subs, subs);
        }
    }
}

/// `out: (n, m)` from `m` rows of `n`, at most 6.
fn interleave<'a, T: Copy + 'a>(m: usize, row: impl Fn(usize) -> &'a [T], out: &mut [T]) {
    fn rows<'a, T: Copy + 'a, const M: usize>(row: impl Fn(usize) -> &'a [T], out: &mut [T]) {
        let out = out.as_chunks_mut::<M>().0;
        let rows: [&[T]; M] = std::array::from_fn(|i| &row(i)[..out.len()]);
        for (i, out) in out.iter_mut().enumerate() {
            *out = std::array::from_fn(|m| rows[m][i]);
        }
    }
    match m {
        1 => rows::<T, 1>(row, out),
        2 => rows::<T, 2>(row, out),
        3 => rows::<T, 3>(row, out),
        4 => rows::<T, 4>(row, out),
        5 => rows::<T, 5>(row, out),
        _ => rows::<T, 6>(row, out),
    }
}

/// The planes that the matrices of a region ask for, kept from one region to the next.
#[derive(Default)]
pub(crate) struct Planes(Vec<Plane>);

impl Planes {
    /// Forgets what the planes hold.
    pub(crate) fn clear(&mut self) {
        self.0.iter_mut().for_each(|plane| plane.fresh = false);
    }

    /// A plane for `m` rows of `k` inputs that is to be filled, unless there is one already.
    pub(crate) fn make(&mut self, isa: Isa, key: Key, k: usize, m: usize) -> Option<&mut Plane> {
        if self.0.iter().any(|plane| plane.fresh && (plane.key, plane.shape.k) == (key, k)) {
            return None;
        }
        let stale = self.0.iter().position(|plane| !plane.fresh && plane.key == key);
        let index = stale.unwrap_or_else(|| {
            self.0.push(Plane::new(key));
            self.0.len() - 1
        });
        let plane = &mut self.0[index];
        plane.resize(isa, k, m);
        Some(plane)
    }

    /// The plane that was made for `key` and `k`.
    pub(crate) fn get(&self, key: Key, k: usize) -> &Plane {
        let plane = self.0.iter().find(|plane| plane.fresh && (plane.key, plane.shape.k) == (key, k));
        plane.expect("the input was not prepared for this matrix")
    }
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
    planes: Planes,
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
        self.planes.clear();
        for matrix in matrices {
            assert_eq!(matrix.columns(), k, "inputs of a matrix");
            let Some(key) = Key::of(matrix) else { continue };
            if let Some(plane) = self.planes.make(isa, key, k, m) {
                fill(plane, pool, x, m);
            }
        }
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa.expect("prepare comes before the product")
    }

    /// The rows for `matrix`; panics when they were not prepared for these shapes.
    pub(crate) fn rows(&self, matrix: &PackedMatrix, m: usize) -> Option<Rows<'_>> {
        assert_eq!((self.m, self.k), (m, matrix.columns()), "(m, k) of the prepared input");
        Some(self.planes.get(Key::of(matrix)?, self.k).rows(0, m))
    }
}

fn fill(plane: &mut Plane, pool: &Pool, x: &[f32], m: usize) {
    let (k, blocks) = (plane.shape.k, blocks(plane.isa, m));
    let filler = plane.filler();
    let part = |range: Range<usize>| {
        for block in range {
            let rows = share(m, block, blocks);
            // SAFETY: the threads have different blocks.
            unsafe { filler.quantize(rows.clone(), &x[rows.start * k..rows.end * k]) };
        }
    };
    if x.len() < PARALLEL {
        part(0..blocks);
    } else {
        pool.run(|thread| part(share(blocks, thread, pool.threads())));
    }
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
