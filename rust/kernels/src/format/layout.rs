//! Where each weight of a packed matrix lies.
//!
//! The rows are cut into panels of 64 (the last panel has 1 to 4 tiles of 16 rows); panels follow each other. A cell is
//! 64 bytes: byte `4 * row + j` belongs to one of 16 rows and to input `j` of a quad of 4, so that a cell of byte codes
//! is one 512-bit operand of an 8-bit dot product for 16 outputs. Rows and inputs past the end have code 0, scale 0 and
//! offset 0.
//!
//! An integer panel is one record per group of inputs, in the order the kernels read it. A record begins with its steps:
//!
//! ```text
//! codes   a step                 cells, each [tiles] × 64 B
//! four    2 quads                low nibbles are quad 0, high nibbles quad 1
//! eight   2 quads                quad 0; quad 1
//! two     4 quads                bits 2p and 2p + 1 are quad p
//! base 3  20 quads               4 cells: byte = t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4; in cell c, t0 to t3 are quads 4 c to
//!                                4 c + 3, and t4 is quad 16 + c
//! six     4 quads                nibbles of quads 0 and 1; of quads 2 and 3; bits 2p and 2p + 1: the upper bits of quad p
//! ```
//!
//! Behind the steps of a record, and filled up with zeros to 64 B:
//!
//! ```text
//! groups        tiles × 16 scales in their own type, tiles × 16 zero points (u8) or minima (type of the scales)
//! super-block   Q4_K: 2 cells of sub-minima (byte 4 * row + j of cell c is that of sub-block 4 c + j), tiles × 16 d and
//!               as many dmin (f16); Q6_K: tiles × 16 d (f16)
//! ```
//!
//! In super-blocks, the steps of each sub-block are followed by its tiles × 16 sub-scales (Q4_K u8, Q6_K i8), so that the
//! kernels read everything in the order of its addresses.
//!
//! A short last group has a shorter record: its steps are only those it needs. A float panel is `[k][tiles * 16]` f32,
//! or, for 16-bit floats, `[k / 2][tiles]` cells of 16 rows × 2 inputs.

use super::{Bits, FloatType, Format, Offset, Packing, SuperBlock, Table};

/// Rows of a full panel.
pub(crate) const PANEL: usize = 64;
/// Rows of a tile.
pub(crate) const TILE: usize = 16;
/// Inputs of a quad.
pub(crate) const QUAD: usize = 4;
/// Bytes of a cell.
pub(crate) const CELL: usize = 64;
/// Sub-minima that one cell holds for each row.
pub(crate) const MINIMA: usize = 4;

/// The shape and format of a matrix, and the addresses that follow from them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) format: Format,
}

impl Format {
    /// Bytes of a matrix of `n` rows and `k` columns once packed; `None` when it is empty or beyond all addresses.
    pub fn packed_bytes(self, n: usize, k: usize) -> Option<usize> {
        if n == 0 || k == 0 { None } else { Layout { n, k, format: self }.checked_bytes() }
    }
}

impl Layout {
    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Tiles of the whole matrix.
    pub(crate) fn all_tiles(&self) -> usize {
        self.n.div_ceil(TILE)
    }

    /// Tiles of `panel`: 4, or 1 to 4 in the last.
    pub(crate) fn tiles(&self, panel: usize) -> usize {
        (self.all_tiles() - panel * (PANEL / TILE)).min(PANEL / TILE)
    }

    /// Bytes of a panel of `tiles` tiles; panics on overflow, which `checked_bytes` has excluded.
    pub(crate) fn panel_bytes(&self, tiles: usize) -> usize {
        if let Format::Float(kind) = self.format {
            return self.k.next_multiple_of(if kind == FloatType::F32 { 1 } else { 2 }) * tiles * TILE * kind.bytes();
        }
        let records = self.records(tiles);
        records.start(records.groups - 1) + records.bytes(records.groups - 1)
    }

    /// Bytes of the whole matrix, if that and every product on the way fits.
    pub(crate) fn checked_bytes(&self) -> Option<usize> {
        // A weight takes at most 4 bytes, and a record at most 17 times its weights (one input, f32 scale and minimum).
        self.k.checked_add(256)?.checked_mul(self.n.checked_add(PANEL)?)?.checked_mul(64)?;
        let full = self.panels() - 1;
        Some(full * self.panel_bytes(PANEL / TILE) + self.panel_bytes(self.tiles(full)))
    }

    /// First byte of `panel`.
    pub(crate) fn panel_start(&self, panel: usize) -> usize {
        panel * self.panel_bytes(PANEL / TILE)
    }

    /// The records of an integer panel of `tiles` tiles.
    pub(crate) fn records(&self, tiles: usize) -> Records {
        let k = self.k;
        let (codes, group, trailer) = match self.format {
            Format::Integer { bits, group, offset, scale } => {
                let codes = if bits == Bits::Four { Codes::Four } else { Codes::Eight };
                (codes, group, Trailer::Scales { scale, offset, zero: bits.bias(), table: None })
            }
            Format::Ternary { packing, group, scale } => {
                let codes = if packing == Packing::TwoBits { Codes::Two } else { Codes::BaseThree };
                let trailer = Trailer::Scales { scale, offset: Offset::Symmetric, zero: 1, table: None };
                (codes, group.unwrap_or(k), trailer)
            }
            Format::Lookup { table, group, scale } => {
                let (offset, zero) = (Offset::Symmetric, table.bias());
                (Codes::Four, group, Trailer::Scales { scale, offset, zero, table: Some(table) })
            }
            Format::Super(kind) => {
                let codes = if kind == SuperBlock::Q4K { Codes::Four } else { Codes::Six };
                (codes, SuperBlock::INPUTS, Trailer::Super(kind))
            }
            Format::Float(_) => unreachable!("a float matrix has no groups"),
        };
        let groups = k.div_ceil(group);
        Records { tiles, groups, group, last: k - (groups - 1) * group, codes, trailer }
    }
}

/// How the codes of a step are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codes {
    Four,
    Eight,
    Two,
    BaseThree,
    Six,
}

impl Codes {
    /// Quads of a step.
    pub(crate) const fn quads(self) -> usize {
        match self {
            Codes::Four | Codes::Eight => 2,
            Codes::Two | Codes::Six => 4,
            Codes::BaseThree => 20,
        }
    }

    /// Cells of a step of one tile.
    pub(crate) const fn cells(self) -> usize {
        match self {
            Codes::Four | Codes::Two => 1,
            Codes::Eight => 2,
            Codes::Six => 3,
            Codes::BaseThree => 4,
        }
    }

    /// The greatest code.
    pub(crate) const fn maximum(self) -> u8 {
        match self {
            Codes::Four => 15,
            Codes::Eight => 255,
            Codes::Two | Codes::BaseThree => 2,
            Codes::Six => 63,
        }
    }
}

/// What stands behind the steps of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trailer {
    Scales {
        scale: FloatType,
        offset: Offset,
        /// The code of zero in a symmetric format.
        zero: u8,
        table: Option<Table>,
    },
    Super(SuperBlock),
}

/// Addresses inside one integer panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Records {
    pub(crate) tiles: usize,
    pub(crate) groups: usize,
    /// Inputs of a full group.
    pub(crate) group: usize,
    /// Inputs of the last group.
    pub(crate) last: usize,
    pub(crate) codes: Codes,
    pub(crate) trailer: Trailer,
}

impl Records {
    /// Inputs of group `g`.
    pub(crate) fn inputs(&self, g: usize) -> usize {
        if g + 1 == self.groups { self.last } else { self.group }
    }

    /// Bytes of one plane of a token's quantised activations for group `g`, padded as the last group of a row is.
    pub(crate) fn plane_bytes(&self, g: usize) -> usize {
        if g + 1 == self.groups { padded_group(self.last, self.groups) } else { self.group }
    }

    /// Steps of group `g`.
    pub(crate) fn steps(&self, g: usize) -> usize {
        self.inputs(g).div_ceil(self.codes.quads() * QUAD)
    }

    /// Bytes of one step of all tiles.
    pub(crate) fn step_bytes(&self) -> usize {
        self.codes.cells() * self.tiles * CELL
    }

    /// First byte of the record of group `g`.
    pub(crate) fn start(&self, g: usize) -> usize {
        if g == 0 { 0 } else { g * self.record(self.group.div_ceil(self.codes.quads() * QUAD)) }
    }

    /// Bytes of the record of group `g`.
    pub(crate) fn bytes(&self, g: usize) -> usize {
        self.record(self.steps(g))
    }

    fn record(&self, steps: usize) -> usize {
        (self.offsets(steps) + self.tiles * TILE * self.offset_bytes()).next_multiple_of(CELL)
    }

    /// Type of scales and minima, or of the `d` and `dmin` of super-blocks.
    pub(crate) fn scale(&self) -> FloatType {
        match self.trailer {
            Trailer::Scales { scale, .. } => scale,
            Trailer::Super(_) => FloatType::F16,
        }
    }

    /// Steps of a sub-block.
    fn sub_steps(&self, kind: SuperBlock) -> usize {
        kind.group() / (self.codes.quads() * QUAD)
    }

    /// First byte of a step, counted from the start of its record.
    pub(crate) fn step_start(&self, step: usize) -> usize {
        let sub_scales = match self.trailer {
            Trailer::Scales { .. } => 0,
            Trailer::Super(kind) => step / self.sub_steps(kind) * self.tiles * TILE,
        };
        step * self.step_bytes() + sub_scales
    }

    /// Where the sub-scale of `row` for sub-block `sub` of a super-block lies in its record.
    pub(crate) fn sub_scale(&self, kind: SuperBlock, row: usize, sub: usize) -> usize {
        (sub + 1) * self.sub_steps(kind) * self.step_bytes() + sub * self.tiles * TILE + row
    }

    /// First sub-minimum of a super-block of `steps` steps.
    pub(crate) fn sub_minima(&self, steps: usize) -> usize {
        match self.trailer {
            Trailer::Scales { .. } => steps * self.step_bytes(),
            Trailer::Super(kind) => steps * self.step_bytes() + SuperBlock::INPUTS / kind.group() * self.tiles * TILE,
        }
    }

    /// First scale, counted from the start of a record of `steps` steps.
    pub(crate) fn scales(&self, steps: usize) -> usize {
        let minima = match self.trailer {
            Trailer::Super(SuperBlock::Q4K) => SuperBlock::INPUTS / SuperBlock::Q4K.group() * self.tiles * TILE,
            _ => 0,
        };
        self.sub_minima(steps) + minima
    }

    /// First zero point or minimum, counted from the start of a record of `steps` steps.
    pub(crate) fn offsets(&self, steps: usize) -> usize {
        self.scales(steps) + self.tiles * TILE * self.scale().bytes()
    }

    /// Bytes of one zero point or minimum.
    pub(crate) fn offset_bytes(&self) -> usize {
        match self.trailer {
            Trailer::Scales { offset: Offset::Symmetric, .. } | Trailer::Super(SuperBlock::Q6K) => 0,
            Trailer::Scales { offset: Offset::ZeroPoint, .. } => 1,
            Trailer::Scales { offset: Offset::Minimum, scale, .. } => scale.bytes(),
            Trailer::Super(SuperBlock::Q4K) => FloatType::F16.bytes(),
        }
    }

    /// The codes of quad `quad` of `tile`, in the order of a cell; `record` is that of the quad's group.
    pub(crate) fn cell(&self, record: &[u8], tile: usize, quad: usize) -> [u8; CELL] {
        let (step, p) = (quad / self.codes.quads(), quad % self.codes.quads());
        let cell = |c: usize| {
            let at = self.step_start(step) + (c * self.tiles + tile) * CELL;
            <[u8; CELL]>::try_from(&record[at..at + CELL]).expect("a cell is 64 bytes")
        };
        match self.codes {
            Codes::Four => cell(0).map(|byte| byte >> (4 * p) & 15),
            Codes::Eight => cell(p),
            Codes::Two => cell(0).map(|byte| byte >> (2 * p) & 3),
            Codes::BaseThree => {
                let (c, digit) = base_three(p);
                cell(c).map(|byte| byte / 3u8.pow(digit) % 3)
            }
            Codes::Six => {
                let (low, high) = (cell(p / 2), cell(2));
                std::array::from_fn(|i| low[i] >> (p % 2 * 4) & 15 | (high[i] >> (2 * p) & 3) << 4)
            }
        }
    }

    /// Stores the codes of one row for quad `quad`: adds to bytes that are still zero there.
    pub(crate) fn store(&self, record: &mut [u8], row: usize, quad: usize, codes: [u8; QUAD]) {
        let (step, p) = (quad / self.codes.quads(), quad % self.codes.quads());
        let tile = row / TILE;
        let mut add = |c: usize, value: [u8; QUAD]| {
            let at = self.step_start(step) + (c * self.tiles + tile) * CELL + row % TILE * QUAD;
            for (byte, value) in record[at..at + QUAD].iter_mut().zip(value) {
                *byte += value;
            }
        };
        match self.codes {
            Codes::Four => add(0, codes.map(|code| code << (4 * p))),
            Codes::Eight => add(p, codes),
            Codes::Two => add(0, codes.map(|code| code << (2 * p))),
            Codes::BaseThree => {
                let (c, digit) = base_three(p);
                add(c, codes.map(|code| code * 3u8.pow(digit)));
            }
            Codes::Six => {
                add(p / 2, codes.map(|code| (code & 15) << (p % 2 * 4)));
                add(2, codes.map(|code| (code >> 4) << (2 * p)));
            }
        }
    }

    /// Where the sub-minimum of `row` for sub-block `sub` lies in a record of `steps` steps.
    pub(crate) fn sub_minimum(&self, steps: usize, row: usize, sub: usize) -> usize {
        let cell = sub / MINIMA * self.tiles + row / TILE;
        self.sub_minima(steps) + cell * CELL + row % TILE * MINIMA + sub % MINIMA
    }
}

/// Bytes of one plane of the last of `groups` groups of activations, of `inputs` inputs: whole vectors of 16, and zeros
/// for the longest step that a format may read beyond them.
pub(crate) fn padded_group(inputs: usize, groups: usize) -> usize {
    let step = if groups == 1 { Codes::BaseThree } else { Codes::Two };
    inputs.next_multiple_of(16) + step.quads() * QUAD
}

/// Cell and digit of a quad of a base-3 step.
fn base_three(quad: usize) -> (usize, u32) {
    if quad < 16 { (quad / 4, quad as u32 % 4) } else { (quad - 16, 4) }
}

/// Element `index` of little-endian floats of type `kind`.
pub(crate) fn load_float(bytes: &[u8], kind: FloatType, index: usize) -> f32 {
    let at = index * kind.bytes();
    match kind {
        FloatType::F32 => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
        FloatType::F16 => half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        FloatType::Bf16 => half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
    }
}

/// Stores `value`, rounded to `kind`, as element `index`.
pub(crate) fn store_float(bytes: &mut [u8], kind: FloatType, index: usize, value: f32) {
    let at = index * kind.bytes();
    match kind {
        FloatType::F32 => bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()),
        FloatType::F16 => bytes[at..at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
        FloatType::Bf16 => bytes[at..at + 2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
    }
}
