//! Where each weight of a packed matrix lies.
//!
//! The rows are cut into panels of 64 (the last panel has 1 to 4 tiles of 16 rows); panels follow each other. A cell is
//! 16 rows × 4 inputs of byte codes: byte `4 * row + j` holds input `base + j`, so a cell is one 512-bit operand of an
//! 8-bit dot product for 16 outputs. Rows and inputs past the end have code 0, scale 0 and offset 0.
//!
//! An integer panel is one record per group, in the order the kernels read it:
//!
//! ```text
//! int4  steps × [tiles] × 64 B    a step is 8 inputs: low nibbles are the cell of inputs 0..4, high nibbles of 4..8
//! int8  steps × 2 × [tiles] × 64 B
//! then  tiles × 16 scales in their own type, tiles × 16 zero points (u8) or minima (type of the scales), zeros to 64 B
//! ```
//!
//! A short last group has a shorter record: its steps are only those it needs. A float panel is `[k][tiles * 16]` f32,
//! or, for 16-bit floats, `[k / 2][tiles]` cells of 16 rows × 2 inputs.

use super::{Bits, FloatType, Format, Offset};

/// Rows of a full panel.
pub(crate) const PANEL: usize = 64;
/// Rows of a tile.
pub(crate) const TILE: usize = 16;
/// Inputs of a step.
pub(crate) const STEP: usize = 8;
/// Bytes of a cell.
pub(crate) const CELL: usize = 64;

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
        match self.format {
            Format::Float(kind) => {
                self.k.next_multiple_of(if kind == FloatType::F32 { 1 } else { 2 }) * tiles * TILE * kind.bytes()
            }
            Format::Integer { .. } => {
                let records = self.records(tiles);
                (records.groups - 1) * records.bytes(0) + records.bytes(records.groups - 1)
            }
        }
    }

    /// Bytes of the whole matrix, if that and every product on the way fits.
    pub(crate) fn checked_bytes(&self) -> Option<usize> {
        // A weight takes at most 4 bytes, and a record at most 17 times its weights (one input, f32 scale and minimum).
        self.k.checked_add(128)?.checked_mul(self.n.checked_add(PANEL)?)?.checked_mul(64)?;
        let full = self.panels() - 1;
        Some(full * self.panel_bytes(PANEL / TILE) + self.panel_bytes(self.tiles(full)))
    }

    /// First byte of `panel`.
    pub(crate) fn panel_start(&self, panel: usize) -> usize {
        panel * self.panel_bytes(PANEL / TILE)
    }

    /// The records of an integer panel of `tiles` tiles.
    pub(crate) fn records(&self, tiles: usize) -> Records {
        match self.format {
            Format::Integer { bits, group, offset, scale } => {
                let groups = self.k.div_ceil(group);
                let last = self.k - (groups - 1) * group;
                Records { tiles, groups, steps: group / STEP, last_steps: last.div_ceil(STEP), bits, offset, scale }
            }
            Format::Float(_) => unreachable!("a float matrix has no groups"),
        }
    }
}

/// Addresses inside one integer panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Records {
    pub(crate) tiles: usize,
    pub(crate) groups: usize,
    /// Steps of a full group.
    pub(crate) steps: usize,
    /// Steps of the last group.
    pub(crate) last_steps: usize,
    pub(crate) bits: Bits,
    pub(crate) offset: Offset,
    pub(crate) scale: FloatType,
}

impl Records {
    /// Steps of group `g`.
    pub(crate) fn steps(&self, g: usize) -> usize {
        if g + 1 == self.groups { self.last_steps } else { self.steps }
    }

    /// Bytes of one step of one tile.
    pub(crate) fn step_bytes(&self) -> usize {
        match self.bits {
            Bits::Four => CELL,
            Bits::Eight => 2 * CELL,
        }
    }

    /// First byte of the record of group `g`.
    pub(crate) fn start(&self, g: usize) -> usize {
        g * self.record(self.steps)
    }

    /// Bytes of the record of group `g`.
    pub(crate) fn bytes(&self, g: usize) -> usize {
        self.record(self.steps(g))
    }

    fn record(&self, steps: usize) -> usize {
        (self.offsets(steps) + self.tiles * TILE * self.offset_bytes()).next_multiple_of(CELL)
    }

    /// First scale, counted from the start of a record of `steps` steps.
    pub(crate) fn scales(&self, steps: usize) -> usize {
        steps * self.tiles * self.step_bytes()
    }

    /// First zero point or minimum, counted from the start of a record of `steps` steps.
    pub(crate) fn offsets(&self, steps: usize) -> usize {
        self.scales(steps) + self.tiles * TILE * self.scale.bytes()
    }

    /// Bytes of one zero point or minimum.
    pub(crate) fn offset_bytes(&self) -> usize {
        match self.offset {
            Offset::Symmetric => 0,
            Offset::ZeroPoint => 1,
            Offset::Minimum => self.scale.bytes(),
        }
    }

    /// Where the code of `row` (in the panel) and input `i` of a group lies in its record, and the shift of its bits.
    pub(crate) fn code(&self, row: usize, i: usize) -> (usize, u32) {
        let (tile, lane) = (row / TILE, row % TILE * 4 + i % 4);
        match self.bits {
            Bits::Four => ((i / STEP * self.tiles + tile) * CELL + lane, if i % STEP < 4 { 0 } else { 4 }),
            Bits::Eight => ((i / 4 * self.tiles + tile) * CELL + lane, 0),
        }
    }
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
