//! Back from panels to rows of codes: what [`PackedMatrix::pack_codes`] took, for whoever stores a matrix.

use super::layout::{PANEL, load_float};
use super::{Format, Offset, PackedMatrix, RowCodes};

impl PackedMatrix {
    /// Codes, scales and offsets of row `n`, as [`PackedMatrix::pack_codes`] took them; empty for float formats, whose rows
    /// [`PackedMatrix::row`] gives exactly.
    ///
    /// # Panics
    /// When `n` is no row.
    pub fn codes(&self, n: usize, out: &mut RowCodes) {
        assert!(n < self.layout.n, "row {n} of {}", self.layout.n);
        out.codes.clear();
        out.scales.clear();
        out.offsets.clear();
        let Format::Integer { group, .. } = self.layout.format else { return };
        let (panel, row) = (n / PANEL, n % PANEL);
        let records = self.layout.records(self.layout.tiles(panel));
        for g in 0..records.groups {
            let steps = records.steps(g);
            let record = &self.panel(panel)[records.start(g)..][..records.bytes(g)];
            for i in 0..group.min(self.layout.k - g * group) {
                let (at, shift) = records.code(row, i);
                out.codes.push(record[at] >> shift & records.bits.maximum());
            }
            out.scales.push(load_float(&record[records.scales(steps)..], records.scale, row));
            let stored = &record[records.offsets(steps)..];
            match records.offset {
                Offset::Symmetric => {}
                Offset::ZeroPoint => out.offsets.push(f32::from(stored[row])),
                Offset::Minimum => out.offsets.push(load_float(stored, records.scale, row)),
            }
        }
    }
}
