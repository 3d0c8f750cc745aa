//! Who computes which part of a region's outputs. The partition never changes a bit of them.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::input::{Input, Rows, blocks, most_tokens, tokens};
#[cfg(target_arch = "x86_64")]
use super::panel::STREAM;
use super::{float, scalar};
use super::{
    panel::integer,
    x86_64::{
        avx2::{Avx2, AvxVnni},
        avx512::{Avx512Vbmi, Avx512Vnni},
    },
};
use crate::activation::{Activation, activate_multiply_with};
use crate::format::PackedMatrix;
use crate::format::layout::{CELL, PANEL, TILE};
use crate::isa::Isa;
use crate::pool::{Disjoint, Pool, share};

/// Rows of x whose outputs for a panel stay in the first-level cache together.
pub(crate) const CHUNK: usize = 96;
/// Panels for each thread, at least, where rows can be cut: the last ones are then soon done.
const TURNS: usize = 8;
pub(crate) const TILES: usize = PANEL / TILE;

/// The second matrix of a gated product.
pub(super) struct Gated<'a> {
    pub(super) up: &'a PackedMatrix,
    pub(super) activation: Activation,
}

/// One output of a region.
pub(super) struct Target<'a> {
    pub(super) matrix: &'a PackedMatrix,
    pub(super) gated: Option<Gated<'a>>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) add: bool,
    pub(super) out: Disjoint<'a, f32>,
}

impl Target<'_> {
    fn matrices(&self) -> impl Iterator<Item = &PackedMatrix> {
        std::iter::once(self.matrix).chain(self.gated.as_ref().map(|gated| gated.up))
    }

    /// Bytes behind one tile of outputs.
    fn cost(&self) -> usize {
        self.matrices().map(PackedMatrix::nbytes).sum::<usize>() / self.matrix.layout().all_tiles()
    }
}

#[repr(align(64))]
pub(crate) struct Block(pub(crate) [f32; CHUNK * PANEL]);

/// The outputs of one chunk and panel before they are stored.
pub(crate) struct Scratch {
    pub(crate) y: Block,
    pub(crate) up: Block,
    pub(crate) widened: float::Widened,
}

thread_local! {
    pub(crate) static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Box::new(Scratch {
        y: Block([0.0; CHUNK * PANEL]),
        up: Block([0.0; CHUNK * PANEL]),
        widened: float::Widened::default(),
    }));
}

/// Runs all `targets` in one parallel region.
pub(super) fn drive(pool: &Pool, x: &[f32], m: usize, input: &Input, targets: &[Target<'_>]) {
    for target in targets {
        check(target, x, m, input);
    }
    let region = Region { x, m, input, isa: input.isa() };
    let blocks = blocks(region.isa, m);
    if m <= STREAM {
        // Threads stream contiguous, equally large parts of the weights.
        let total: usize = targets.iter().map(|target| target.cost() * target.matrix.layout().all_tiles()).sum();
        pool.run(|thread| {
            let (from, to) = (total * thread / pool.threads(), total * (thread + 1) / pool.threads());
            let mut base = 0;
            for target in targets {
                let (tiles, cost) = (target.matrix.layout().all_tiles(), target.cost());
                let bound = |position: usize| ((position.saturating_sub(base) + cost / 2) / cost).min(tiles);
                region.stream(target, bound(from)..bound(to), 0..blocks);
                base += tiles * cost;
            }
        });
    } else {
        // They take panels in turn, so that a busy neighbour leaves no thread idle.
        let panels: usize = targets.iter().map(|target| target.matrix.layout().panels()).sum();
        let most = CHUNK / most_tokens(region.isa);
        let wanted = (TURNS * pool.threads()).div_ceil(panels).min(blocks.div_ceil(2));
        let chunks = blocks.div_ceil(most).max(wanted);
        let next = AtomicUsize::new(0);
        pool.run(|_| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= panels * chunks {
                    return;
                }
                let (chunk, mut panel) = (share(blocks, index / panels, chunks), index % panels);
                for target in targets {
                    let layout = target.matrix.layout();
                    if panel < layout.panels() {
                        let first = panel * TILES;
                        region.stream(target, first..first + layout.tiles(panel), chunk);
                        break;
                    }
                    panel -= layout.panels();
                }
            }
        });
    }
}

fn check(target: &Target<'_>, x: &[f32], m: usize, input: &Input) {
    let (n, k) = (target.matrix.rows(), target.matrix.columns());
    assert_eq!(x.len(), m * k, "length of x: ({m}, {k})");
    assert_eq!(target.out.len(), m * n, "length of out: ({m}, {n})");
    assert!(target.bias.is_none_or(|bias| bias.len() == n), "length of a bias: {n}");
    for matrix in target.matrices() {
        assert_eq!((matrix.rows(), matrix.columns()), (n, k), "shapes of gate and up");
        // Panics when the input was not prepared for this matrix.
        let _ = input.rows(matrix, m);
    }
}

struct Region<'a> {
    x: &'a [f32],
    m: usize,
    input: &'a Input,
    isa: Isa,
}

impl Region<'_> {
    /// The outputs of `tiles` (of the whole matrix) for the rows of `blocks`.
    fn stream(&self, target: &Target<'_>, tiles: Range<usize>, blocks: Range<usize>) {
        if tiles.is_empty() {
            return;
        }
        SCRATCH.with_borrow_mut(|scratch| {
            for panel in tiles.start / TILES..tiles.end.div_ceil(TILES) {
                let first = panel * TILES;
                let inside = tiles.start.saturating_sub(first)..(tiles.end - first).min(TILES);
                self.panel(target, panel, inside, blocks.clone(), scratch);
            }
        });
    }

    /// The outputs of `tiles` of one panel for the rows of `blocks`, at most `CHUNK` rows.
    fn panel(
        &self,
        target: &Target<'_>,
        panel: usize,
        tiles: Range<usize>,
        blocks: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let width = tiles.len() * TILE;
        let n = target.matrix.rows();
        let first = panel * PANEL + tiles.start * TILE;
        let rows = first..(first + width).min(n);
        let tokens = tokens(self.isa, self.m, &blocks);
        for token in tokens.clone() {
            // Rows of `out` lie far apart: fetched now, they arrive while the product runs.
            // SAFETY: the partition gives each (token, tile) to one thread.
            prefetch(unsafe { target.out.slice(token * n + rows.start..token * n + rows.end) });
        }
        let y = &mut scratch.y.0[..tokens.len() * width];
        let x = self.operand(target.matrix);
        product(self.isa, target.matrix, panel, tiles.clone(), x, blocks.clone(), y, &mut scratch.widened);
        if let Some(gated) = &target.gated {
            let up = &mut scratch.up.0[..tokens.len() * width];
            let x = self.operand(gated.up);
            product(self.isa, gated.up, panel, tiles.clone(), x, blocks, up, &mut scratch.widened);
            activate_multiply_with(self.isa, gated.activation, y, up);
        }
        for (token, y) in tokens.zip(y.chunks_exact(width)) {
            // SAFETY: the partition gives each (token, tile) to one thread.
            let out = unsafe { target.out.slice(token * n + rows.start..token * n + rows.end) };
            store(out, y, target.bias.map(|bias| &bias[rows.clone()]), target.add);
        }
    }

    /// The rows of x as `matrix` asks for them.
    fn operand(&self, matrix: &PackedMatrix) -> Operand<'_> {
        self.input.rows(matrix, self.m).map_or(Operand::Float(self.x), Operand::Quantised)
    }
}

/// Rows of activations for a product.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// `(m, k)`.
    Float(&'a [f32]),
    Quantised(Rows<'a>),
}

/// `y = x · Wᵀ` for `tiles` of `panel` and the rows of `blocks` of `x`; `y: (tokens, tiles * 16)`. The CPU has `isa`.
pub(crate) fn product(
    isa: Isa,
    matrix: &PackedMatrix,
    panel: usize,
    tiles: Range<usize>,
    x: Operand<'_>,
    blocks: Range<usize>,
    y: &mut [f32],
    widened: &mut float::Widened,
) {
    y.fill(0.0);
    let layout = matrix.layout();
    let bytes = matrix.panel(panel);
    let rows = match x {
        Operand::Quantised(rows) => rows,
        Operand::Float(x) => {
            let tokens = tokens(isa, x.len() / layout.k, &blocks);
            let x = &x[tokens.start * layout.k..tokens.end * layout.k];
            return float::product(isa, layout, bytes, layout.tiles(panel), tiles, x, y, widened);
        }
    };
    let records = layout.records(layout.tiles(panel));
    match isa {
        Isa::Scalar => scalar::integer(&records, bytes, tiles, rows, blocks, y),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller has checked that the CPU has the level.
        Isa::Avx2 => unsafe { integer::<Avx2>(&records, bytes, tiles, rows, blocks, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::AvxVnni => unsafe { integer::<AvxVnni>(&records, bytes, tiles, rows, blocks, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni => unsafe { integer::<Avx512Vnni>(&records, bytes, tiles, rows, blocks, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vbmi => unsafe { integer::<Avx512Vbmi>(&records, bytes, tiles, rows, blocks, y) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("an unavailable level"),
    }
}

/// Asks for the cache lines of `x`.
pub(crate) fn prefetch<T>(x: &[T]) {
    for line in x.chunks(CELL / size_of::<T>()) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is a hint and reads nothing.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(line.as_ptr().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

/// `out = y + bias`, or `out += y + bias`.
fn store(out: &mut [f32], y: &[f32], bias: Option<&[f32]>, add: bool) {
    match (bias, add) {
        (None, false) => {
            // Whole tiles are copied in place; a call for so few bytes would cost more than the copy.
            let (whole, rest) = out.as_chunks_mut::<TILE>();
            whole.iter_mut().zip(y.as_chunks::<TILE>().0).for_each(|(out, y)| *out = *y);
            rest.iter_mut().zip(&y[whole.len() * TILE..]).for_each(|(out, y)| *out = *y);
        }
        (None, true) => out.iter_mut().zip(y).for_each(|(out, y)| *out += y),
        (Some(bias), false) => out.iter_mut().zip(y).zip(bias).for_each(|((out, y), bias)| *out = y + bias),
        (Some(bias), true) => out.iter_mut().zip(y).zip(bias).for_each(|((out, y), bias)| *out += y + bias),
    }
}
