//! The products of a step: gates and ups of all experts in one region, downs in another.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::activation::{Activate, AddWeighted, Columns};
use super::route::{Block, ExpertScratch, Segment};
use super::{Expert, PackedExperts};
use crate::format::PackedMatrix;
use crate::format::layout::TILE;
use crate::isa::Isa;
use crate::matmul::{
    CHUNK, Key, Operand, PARALLEL, Planes, SCRATCH, Scratch, TILES, blocks, most_tokens, prefetch, product, tokens,
};
use crate::pool::{Disjoint, Pool, share};
use crate::vector::dispatch;

/// Tokens of a step that are computed together, at most: they bound the scratch.
pub(super) const TOKENS: usize = 512;
/// Up to this many tokens of each expert memory is the limit, and threads stream equally large parts of the weights.
const STREAM: usize = 4;
/// Items for each thread, at least, where they are taken in turn.
const TURNS: usize = 8;

/// Runs the experts that `scratch` has routed tokens to: `x: (t, hidden)`, adds to `out: (t, hidden)`.
pub(super) fn run(
    experts: &PackedExperts,
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    scratch: &mut ExpertScratch,
    out: &mut [f32],
) {
    let ExpertScratch { segments, blocks, tokens, weights, single, gathered, gathered_floats, .. } = scratch;
    if segments.is_empty() {
        return;
    }
    let step = Step { experts, isa, pool, x, segments, blocks, tokens, weights };
    step.prepare(single, gathered, gathered_floats);
    step.ups(&Inputs { single, gathered, floats: gathered_floats }, Disjoint::new(&mut scratch.inner));
    step.prepare_inner(&scratch.inner, &mut scratch.inner_planes);
    step.downs(&scratch.inner, &scratch.inner_planes, Disjoint::new(out));
}

/// The rows that gates and ups read.
struct Inputs<'a> {
    single: &'a Planes,
    gathered: &'a Planes,
    floats: &'a [f32],
}

#[derive(Clone, Copy)]
struct Step<'a> {
    experts: &'a PackedExperts,
    isa: Isa,
    pool: &'a Pool,
    /// `(t, hidden)`.
    x: &'a [f32],
    segments: &'a [Segment],
    blocks: &'a [Block],
    tokens: &'a [u32],
    weights: &'a [f32],
}

impl<'a> Step<'a> {
    fn expert(&self, segment: &Segment) -> &'a Expert {
        &self.experts.experts[segment.expert]
    }

    /// Whether weights are read as fast as memory delivers them.
    fn streams(&self) -> bool {
        self.segments.iter().all(|segment| segment.tokens <= STREAM)
    }

    /// Calls `body` for blocks of rows, in parallel if they are of `size` numbers that make it worthwhile.
    fn for_blocks(&self, size: usize, body: impl Fn(&Block) + Sync) {
        if size < PARALLEL {
            return self.blocks.iter().for_each(body);
        }
        self.pool.run(|thread| {
            let rows = share(self.tokens.len(), thread, self.pool.threads());
            let bound = |row: usize| self.blocks.partition_point(|block| block.rows.start < row);
            self.blocks[bound(rows.start)..bound(rows.end)].iter().for_each(&body);
        });
    }

    /// Quantises the tokens, and gathers the rows of experts that have several.
    fn prepare(&self, single: &mut Planes, gathered: &mut Planes, floats: &mut Vec<f32>) {
        let (h, s) = (self.experts.hidden, self.tokens.len());
        let t = self.x.len() / h;
        single.clear();
        gathered.clear();
        let mut need_floats = false;
        for segment in self.segments {
            for matrix in self.expert(segment).inputs() {
                let Some(key) = Key::of(matrix) else {
                    need_floats |= segment.tokens > 1;
                    continue;
                };
                if let Some(plane) = single.make(self.isa, key, h, t) {
                    let filler = plane.filler();
                    let part = |tokens: Range<usize>| {
                        for token in tokens {
                            // SAFETY: each token comes once.
                            unsafe { filler.quantize(token..token + 1, &self.x[token * h..][..h]) };
                        }
                    };
                    if self.x.len() < PARALLEL {
                        part(0..t);
                    } else {
                        self.pool.run(|thread| part(share(t, thread, self.pool.threads())));
                    }
                }
                if segment.tokens > 1
                    && let Some(plane) = gathered.make(self.isa, key, h, s)
                {
                    let (filler, from) = (plane.filler(), single.get(key, h));
                    self.for_blocks(s * h, |block| {
                        if self.segments[block.segment].tokens > 1 {
                            // SAFETY: each block comes once.
                            unsafe { filler.gather(block.rows.clone(), from, &self.tokens[block.rows.clone()]) };
                        }
                    });
                }
            }
        }
        if need_floats {
            floats.resize(s * h, 0.0);
            let floats = Disjoint::new(floats);
            self.for_blocks(s * h, |block| {
                for row in block.rows.clone() {
                    // SAFETY: each block comes once.
                    let out = unsafe { floats.slice(row * h..(row + 1) * h) };
                    out.copy_from_slice(&self.x[self.tokens[row] as usize * h..][..h]);
                }
            });
        }
    }

    /// The rows of `segment` as `matrix` asks for them.
    fn input<'i>(&self, inputs: &Inputs<'i>, segment: &Segment, matrix: &PackedMatrix) -> Operand<'i>
    where
        'a: 'i,
    {
        let h = self.experts.hidden;
        let (token, rows) = (self.tokens[segment.first] as usize, segment.rows());
        match Key::of(matrix) {
            None if segment.tokens == 1 => Operand::Float(&self.x[token * h..][..h]),
            None => Operand::Float(&inputs.floats[rows.start * h..rows.end * h]),
            Some(key) if segment.tokens == 1 => Operand::Quantised(inputs.single.get(key, h).rows(token, 1)),
            Some(key) => Operand::Quantised(inputs.gathered.get(key, h).rows(rows.start, rows.len())),
        }
    }

    /// All gates and ups, with the activation.
    fn ups(&self, inputs: &Inputs<'_>, inner: Disjoint<'_, f32>) {
        let all_tiles = |segment: &Segment| self.expert(segment).up.layout().all_tiles();
        if self.streams() {
            let cost = |segment: &Segment| {
                self.expert(segment).inputs().map(PackedMatrix::nbytes).sum::<usize>() / all_tiles(segment)
            };
            let total: usize = self.segments.iter().map(|segment| cost(segment) * all_tiles(segment)).sum();
            self.pool.run(|thread| {
                let threads = self.pool.threads();
                let (from, to) = (total * thread / threads, total * (thread + 1) / threads);
                let mut base = 0;
                for segment in self.segments {
                    let (cost, tiles) = (cost(segment), all_tiles(segment));
                    let bound = |position: usize| ((position.saturating_sub(base) + cost / 2) / cost).min(tiles);
                    for (panel, tiles) in panels(bound(from)..bound(to)) {
                        let blocks = 0..blocks(self.isa, segment.tokens);
                        self.up(inputs, segment, panel, tiles, blocks, inner);
                    }
                    base += tiles * cost;
                }
            });
        } else {
            let all_panels = |segment: &Segment| self.expert(segment).up.layout().panels();
            let panels: usize = self.segments.iter().map(all_panels).sum();
            let wanted = (TURNS * self.pool.threads()).div_ceil(panels);
            let chunks = |segment: &Segment| {
                let blocks = blocks(self.isa, segment.tokens);
                blocks.div_ceil(CHUNK / most_tokens(self.isa)).max(wanted.min(blocks.div_ceil(2)))
            };
            let ends: Vec<usize> = self
                .segments
                .iter()
                .scan(0, |end, segment| {
                    *end += all_panels(segment) * chunks(segment);
                    Some(*end)
                })
                .collect();
            self.in_turn(ends[ends.len() - 1], |item| {
                let index = ends.partition_point(|&end| end <= item);
                let segment = &self.segments[index];
                let item = item - if index == 0 { 0 } else { ends[index - 1] };
                let (panels, chunks) = (all_panels(segment), chunks(segment));
                let (panel, chunk) = (item % panels, share(blocks(self.isa, segment.tokens), item / panels, chunks));
                let tiles = 0..self.expert(segment).up.layout().tiles(panel);
                self.up(inputs, segment, panel, tiles, chunk, inner);
            });
        }
    }

    /// Calls `body` for each of `items`, whichever thread is free.
    fn in_turn(&self, items: usize, body: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        self.pool.run(|_| {
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    return;
                }
                body(item);
            }
        });
    }

    /// Some tiles of a panel of one expert's gate and up for the rows of `blocks`, at most `CHUNK`.
    fn up(
        &self,
        inputs: &Inputs<'_>,
        segment: &Segment,
        panel: usize,
        tiles: Range<usize>,
        blocks: Range<usize>,
        inner: Disjoint<'_, f32>,
    ) {
        let (expert, width) = (self.expert(segment), self.expert(segment).width());
        let tokens = tokens(self.isa, segment.tokens, &blocks);
        let first = (panel * TILES + tiles.start) * TILE;
        let range = first..(first + tiles.len() * TILE).min(width);
        let size = tokens.len() * tiles.len() * TILE;
        let out = Columns { out: inner, offset: segment.inner + tokens.start * width, stride: width, range };
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { y, up, widened } = &mut **scratch;
            if let Some(gate) = &expert.gate {
                let (x, y) = (self.input(inputs, segment, gate), &mut y.0[..size]);
                product(self.isa, gate, panel, tiles.clone(), x, blocks.clone(), y, widened);
            }
            let x = self.input(inputs, segment, &expert.up);
            product(self.isa, &expert.up, panel, tiles, x, blocks, &mut up.0[..size], widened);
            let biases = expert.biases.as_ref().map_or([&[][..]; 2], |biases| [&biases.gate, &biases.up]);
            let (gate, up) = (y.0[..size].as_chunks().0, up.0[..size].as_chunks().0);
            dispatch(self.isa, Activate { activation: self.experts.activation, gate, up, biases, out });
        });
    }

    /// Quantises what the downs read.
    fn prepare_inner(&self, inner: &[f32], planes: &mut Planes) {
        planes.clear();
        for segment in self.segments {
            let down = &self.expert(segment).down;
            let wanted = (Key::of(down), down.columns());
            let (Some(key), width) = wanted else { continue };
            if let Some(plane) = planes.make(self.isa, key, width, self.tokens.len()) {
                let filler = plane.filler();
                self.for_blocks(inner.len(), |block| {
                    let segment = &self.segments[block.segment];
                    let down = &self.expert(segment).down;
                    if (Key::of(down), down.columns()) == wanted {
                        let start = segment.inner + (block.rows.start - segment.first) * width;
                        // SAFETY: each block comes once.
                        unsafe { filler.quantize(block.rows.clone(), &inner[start..][..block.rows.len() * width]) };
                    }
                });
            }
        }
    }

    /// All downs, weighted and added to `out` with the experts ascending; threads own columns.
    fn downs(&self, inner: &[f32], planes: &Planes, out: Disjoint<'_, f32>) {
        // All experts have as many outputs.
        let layout = self.expert(&self.segments[0]).down.layout();
        let tiles = layout.all_tiles();
        if self.streams() {
            self.pool.run(|thread| {
                let tiles = share(tiles, thread, self.pool.threads());
                for segment in self.segments {
                    for (panel, tiles) in panels(tiles.clone()) {
                        self.down(segment, panel, tiles, inner, planes, out);
                    }
                }
            });
        } else {
            // Whole panels, or parts of them where there would be too few.
            let mut part = TILES;
            while part > 1 && tiles / part < TURNS * self.pool.threads() {
                part /= 2;
            }
            self.in_turn(tiles.div_ceil(part), |item| {
                let (panel, first) = (item * part / TILES, item * part % TILES);
                let tiles = first..(first + part).min(layout.tiles(panel));
                for segment in self.segments {
                    self.down(segment, panel, tiles.clone(), inner, planes, out);
                }
            });
        }
    }

    /// Some tiles of a panel of one expert's down for all its rows.
    fn down(
        &self,
        segment: &Segment,
        panel: usize,
        tiles: Range<usize>,
        inner: &[f32],
        planes: &Planes,
        out: Disjoint<'_, f32>,
    ) {
        let (expert, hidden) = (self.expert(segment), self.experts.hidden);
        let (down, width) = (&expert.down, expert.width());
        let x = match Key::of(down) {
            None => Operand::Float(&inner[segment.inner..][..segment.tokens * width]),
            Some(key) => Operand::Quantised(planes.get(key, width).rows(segment.first, segment.tokens)),
        };
        let first = (panel * TILES + tiles.start) * TILE;
        let range = first..(first + tiles.len() * TILE).min(hidden);
        let bias = expert.biases.as_ref().map_or(&[][..], |biases| &biases.down);
        let all = blocks(self.isa, segment.tokens);
        let chunks = all.div_ceil(CHUNK / most_tokens(self.isa));
        SCRATCH.with_borrow_mut(|scratch| {
            for chunk in 0..chunks {
                let blocks = share(all, chunk, chunks);
                let rows = tokens(self.isa, segment.tokens, &blocks);
                let (first, last) = (segment.first + rows.start, segment.first + rows.end);
                let out = Columns { out, offset: 0, stride: hidden, range: range.clone() };
                let tokens = &self.tokens[first..last];
                for &token in tokens {
                    // Rows of `out` lie far apart: fetched now, they arrive while the product runs.
                    // SAFETY: this thread owns the columns.
                    prefetch(unsafe { out.row(token as usize) });
                }
                let y = &mut scratch.y.0[..rows.len() * tiles.len() * TILE];
                product(self.isa, down, panel, tiles.clone(), x, blocks, y, &mut scratch.widened);
                let (y, weights) = (y.as_chunks().0, &self.weights[first..last]);
                dispatch(self.isa, AddWeighted { y, tokens, weights, bias, out });
            }
        });
    }
}

/// The panels of a range of a matrix's tiles, each with the tiles of it that are in the range.
fn panels(tiles: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let all = if tiles.is_empty() { 0..0 } else { tiles.start / TILES..tiles.end.div_ceil(TILES) };
    all.map(move |panel| {
        let first = panel * TILES;
        (panel, tiles.start.saturating_sub(first)..(tiles.end - first).min(TILES))
    })
}
