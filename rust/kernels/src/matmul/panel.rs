//! One panel times some tokens: cut into blocks whose sums fit the registers, and into spans of groups that stay in the
//! first-level cache while all blocks pass them.

use std::cell::RefCell;
use std::ops::Range;

use super::block::{Extent, Operands, Place};
use super::input::Rows;
use crate::format::layout::{CELL, Codes, Records, TILE, Trailer};
use crate::pool::share;

/// How far ahead of the only block its codes are fetched: one page.
const PAGE: usize = 4096;
/// Up to this many tokens memory is the limit: all blocks pass a span of groups while the next one is on its way. More
/// tokens read the panel from the second-level cache, so that sums can stay in registers from end to end.
pub(super) const STREAM: usize = 16;
/// Bytes of codes in a span.
const SPAN: usize = 12 << 10;
/// The same for codes unpacked to bytes.
const WIDE_SPAN: usize = 16 << 10;

/// The blocks of one instruction set.
pub(super) trait Level {
    /// Rows of a vector.
    const ROWS: usize;
    /// See `input::most_tokens`.
    const MOST_TOKENS: usize;
    /// Most vectors of a block of so many tokens, ascending from one token. Half tiles come in powers of two.
    const VECTORS: &[usize];
    /// The same for blocks that also keep their outputs in registers.
    const HELD: &[usize];
    /// From so many blocks on, codes are unpacked once for all of them.
    const UNPACK_FROM: usize;
    /// Most tokens for which base-3 codes are unpacked anew for each block.
    const MOST_DIRECT: usize = 2;

    /// A block of `vectors` × `tokens`.
    ///
    /// # Safety
    /// The CPU has the level, and the operands have everything at the place.
    unsafe fn block(o: &Operands<'_>, place: &Place, vectors: usize, tokens: usize);

    /// Unpacks the codes of `groups` of the stored panel to bytes, see `block::unpack`.
    ///
    /// # Safety
    /// The CPU has the level; `out` has room for the bytes.
    unsafe fn unpack(o: &Operands<'_>, groups: Range<usize>, out: *mut u8, ahead: usize);

    /// `block::unpack_base_three`.
    ///
    /// # Safety
    /// The CPU has the level; `out` has room for 5 cells for each 4 of the panel.
    unsafe fn unpack_base_three(records: &Records, panel: *const u8, out: *mut u8, ahead: usize);
}

thread_local! {
    /// Codes of a panel or a span, unpacked.
    static UNPACKED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// `y += x · Wᵀ` for `tiles` of one panel and the tokens of `blocks` of `x`; `y: (tokens, tiles * 16)`.
///
/// # Safety
/// The CPU has the level.
pub(super) unsafe fn integer<L: Level>(
    records: &Records,
    panel: &[u8],
    tiles: Range<usize>,
    x: Rows<'_>,
    blocks: Range<usize>,
    y: &mut [f32],
) {
    let (all, groups) = (x.tokens.div_ceil(L::MOST_TOKENS), records.groups);
    let token = |block: usize| if block == all { x.tokens } else { share(x.tokens, block, all).start };
    let (first_token, last_token) = (token(blocks.start), token(blocks.end));
    assert!(tiles.end <= records.tiles && x.shape.groups() == groups, "tiles and groups of a panel");
    assert!(panel.len() >= records.start(groups - 1) + records.bytes(groups - 1), "bytes of a panel");
    assert!(last_token * x.stride <= x.codes.len() && last_token * groups <= x.scales.len());
    assert_eq!(y.len(), (last_token - first_token) * tiles.len() * TILE, "outputs of a panel");
    let mut operands = Operands {
        records,
        panel: panel.as_ptr(),
        record_bytes: records.start(1),
        stored: records,
        trailers: panel.as_ptr(),
        stored_bytes: records.start(1),
        codes_bytes: records.sub_minima(records.steps(0)),
        full: extent(records, 0),
        last: extent(records, groups - 1),
        tile: tiles.start,
        codes: x.codes.as_ptr(),
        stride: x.stride,
        planes: x.shape.planes(),
        groups: x.scales.as_ptr(),
        subs: x.subs.as_ptr(),
        y: y.as_mut_ptr(),
        width: tiles.len() * TILE,
        first_token,
    };
    let only = blocks.len() == 1;
    if records.codes == Codes::BaseThree && !(only && last_token - first_token <= L::MOST_DIRECT) {
        let unpacked = Records { codes: Codes::Two, ..*records };
        return UNPACKED.with_borrow_mut(|out| {
            out.resize(records.steps(0) * 5 * records.tiles * CELL, 0);
            operands.records = &unpacked;
            operands.last.steps = unpacked.steps(0);
            operands.panel = out.as_ptr();
            // SAFETY: `out` has the room; the caller vouches for the CPU.
            unsafe {
                L::unpack_base_three(records, panel.as_ptr(), out.as_mut_ptr(), PAGE);
                run::<L>(&operands, x.tokens, tiles.len(), blocks, false);
            }
        });
    }
    let quads = records.steps(0) * records.codes.quads();
    let bytes = quads * records.tiles * CELL;
    if blocks.len() >= L::UNPACK_FROM && records.codes != Codes::Eight && bytes <= WIDE_SPAN {
        let unpacked = Records { codes: Codes::Eight, ..*records };
        operands.records = &unpacked;
        operands.record_bytes = bytes;
        (operands.full.steps, operands.last.steps) = (unpacked.steps(0), unpacked.steps(groups - 1));
        let span = WIDE_SPAN / bytes;
        return UNPACKED.with_borrow_mut(|out| {
            out.resize(WIDE_SPAN + CELL, 0);
            let start = out.as_ptr().align_offset(CELL);
            for first in (0..groups).step_by(span) {
                let groups = first..(first + span).min(groups);
                let out = out[start..].as_mut_ptr();
                // The block counts groups from the first of the panel.
                operands.panel = out.wrapping_sub(first * bytes);
                // SAFETY: as below; `out` has room for a span.
                unsafe {
                    L::unpack(&operands, groups.clone(), out, span * records.start(1));
                    span_of_groups::<L>(&operands, x.tokens, tiles.len(), blocks.clone(), groups, 0);
                }
            }
        });
    }
    // SAFETY: the asserts above cover every address that a panel, its tiles and the tokens give.
    unsafe { run::<L>(&operands, x.tokens, tiles.len(), blocks, true) }
}

fn extent(records: &Records, g: usize) -> Extent {
    let steps = records.steps(g);
    Extent { steps, scales: records.scales(steps), offsets: records.offsets(steps), plane: records.plane_bytes(g) }
}

/// All blocks of `tiles` × `blocks`, one span of groups after the other; codes come from memory if `cold`.
unsafe fn run<L: Level>(o: &Operands<'_>, tokens: usize, tiles: usize, blocks: Range<usize>, cold: bool) {
    let (groups, record) = (o.records.groups, o.record_bytes.max(o.records.bytes(0)));
    let once = blocks.len() == 1 && tiles * TILE <= L::ROWS * L::VECTORS[tokens.min(L::MOST_TOKENS) - 1];
    let spans = tokens <= STREAM && !once && record <= SPAN;
    let span = if spans { SPAN / record } else { groups };
    let ahead = match (cold, spans) {
        (false, _) => 0,
        (true, false) => PAGE,
        (true, true) => span * record,
    };
    for first in (0..groups).step_by(span) {
        let groups = first..(first + span).min(groups);
        // SAFETY: the caller's promise.
        unsafe { span_of_groups::<L>(o, tokens, tiles, blocks.clone(), groups, ahead) };
    }
}

/// All blocks over `groups`; the first one fetches codes `ahead`.
unsafe fn span_of_groups<L: Level>(
    o: &Operands<'_>,
    tokens: usize,
    tiles: usize,
    blocks: Range<usize>,
    groups: Range<usize>,
    ahead: usize,
) {
    let (all, vectors) = (tokens.div_ceil(L::MOST_TOKENS), tiles * TILE / L::ROWS);
    for block in blocks.clone() {
        let rows = share(tokens, block, all);
        // Outputs stay in registers where groups are so short that they would cost more than the weights' second half.
        let short = o.stored.group <= 32 || matches!(o.stored.trailer, Trailer::Super(_));
        let held = tokens > STREAM && short;
        let most = if held { L::HELD[rows.len() - 1] } else { L::VECTORS[rows.len() - 1] };
        let ahead = if block == blocks.start { ahead } else { 0 };
        let mut vector = 0;
        while vector < vectors {
            let left = (vectors - vector).min(most);
            let count = if L::ROWS == TILE { left } else { 1 << left.ilog2() };
            let place = Place { groups: groups.clone(), vector, token: rows.start, ahead };
            // SAFETY: the block lies inside the operands that the caller vouches for.
            unsafe { L::block(o, &place, count, rows.len()) };
            vector += count;
        }
    }
}
