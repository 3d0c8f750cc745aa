//! Back from panels to rows of codes: what [`PackedMatrix::pack_codes`] took, for whoever stores a matrix.

use super::layout::{PANEL, QUAD, TILE, Trailer, load_float};
use super::{Offset, PackedMatrix, RowCodes, SuperBlock};

impl PackedMatrix {
    /// What [`PackedMatrix::pack_codes`] took for row `n`; empty for float formats, whose rows [`PackedMatrix::row`] gives
    /// exactly.
    ///
    /// # Panics
    /// When `n` is no row.
    pub fn codes(&self, n: usize, out: &mut RowCodes) {
        assert!(n < self.layout.n, "row {n} of {}", self.layout.n);
        *out = RowCodes::default();
        if self.layout.format.activation_group(self.layout.k).is_none() {
            return;
        }
        let (panel, row) = (n / PANEL, n % PANEL);
        let records = self.layout.records(self.layout.tiles(panel));
        for g in 0..records.groups {
            let steps = records.steps(g);
            let record = &self.panel(panel)[records.start(g)..][..records.bytes(g)];
            for quad in 0..records.inputs(g).div_ceil(QUAD) {
                let cell = records.cell(record, row / TILE, quad);
                let inputs = QUAD.min(records.inputs(g) - quad * QUAD);
                out.codes.extend_from_slice(&cell[row % TILE * QUAD..][..inputs]);
            }
            out.scales.push(load_float(&record[records.scales(steps)..], records.scale(), row));
            let stored = &record[records.offsets(steps)..];
            match records.trailer {
                Trailer::Scales { offset: Offset::Symmetric, .. } | Trailer::Super(SuperBlock::Q6K) => {}
                Trailer::Scales { offset: Offset::ZeroPoint, .. } => out.offsets.push(f32::from(stored[row])),
                Trailer::Scales { offset: Offset::Minimum, .. } | Trailer::Super(SuperBlock::Q4K) => {
                    out.offsets.push(load_float(stored, records.scale(), row));
                }
            }
            if let Trailer::Super(kind) = records.trailer {
                for sub in 0..SuperBlock::INPUTS / kind.group() {
                    out.sub_scales.push(record[records.sub_scale(kind, row, sub)].cast_signed());
                    if kind == SuperBlock::Q4K {
                        out.sub_minima.push(record[records.sub_minimum(steps, row, sub)]);
                    }
                }
            }
        }
    }
}
