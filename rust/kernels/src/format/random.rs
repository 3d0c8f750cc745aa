//! Matrices of random codes, for measurements and tests: no kernel is faster or slower for the values it meets.

use std::convert::Infallible;

use super::packed::Bytes;
use super::{Bits, FloatType, Format, Offset, PackError, PackedMatrix, Precision, SuperBlock};
use crate::memory::{AlignedBytes, OutOfMemory};

/// splitmix64: reproducible numbers.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An integer below `end`.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// Uniform in -1..1.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

impl Format {
    /// The greatest code; 0 for floats, which have none.
    pub fn maximum_code(self) -> u8 {
        match self {
            Format::Float(_) => 0,
            Format::Integer { bits: Bits::Four, .. } | Format::Lookup { .. } => 15,
            Format::Integer { bits: Bits::Eight, .. } => 255,
            Format::Ternary { .. } => 2,
            Format::Super(kind) => kind.maximum(),
        }
    }

    /// Type of the scales, or of the weights themselves.
    pub fn float_type(self) -> FloatType {
        match self {
            Format::Float(scale)
            | Format::Integer { scale, .. }
            | Format::Ternary { scale, .. }
            | Format::Lookup { scale, .. } => scale,
            Format::Super(_) => FloatType::F16,
        }
    }
}

impl PackedMatrix {
    /// A matrix of random codes and offsets over their whole ranges and scales up to 0.01, the same for the same `seed`;
    /// float weights lie in -1..1.
    ///
    /// ```
    /// use farthing_kernels::format::{Format, PackedMatrix, Precision, SuperBlock};
    /// let matrix = PackedMatrix::random(3, 256, Format::Super(SuperBlock::Q6K), Precision::A8, 1)?;
    /// assert_eq!((matrix.rows(), matrix.columns()), (3, 256));
    /// # Ok::<(), farthing_kernels::format::PackError<std::convert::Infallible>>(())
    /// ```
    pub fn random(
        n: usize,
        k: usize,
        format: Format,
        precision: Precision,
        seed: u64,
    ) -> Result<PackedMatrix, PackError<Infallible>> {
        let noise = |n: usize| Noise(seed ^ ((n as u64) << 32));
        if let Format::Float(kind) = format {
            return PackedMatrix::pack_float(n, k, kind, |n, row| {
                let mut noise = noise(n);
                row.fill_with(|| noise.float());
                Ok(())
            });
        }
        PackedMatrix::pack_codes(n, k, format, precision, |n, row| {
            let (mut noise, end, kind) = (noise(n), u64::from(format.maximum_code()) + 1, format.float_type());
            row.codes.fill_with(|| noise.below(end) as u8);
            row.scales.fill_with(|| kind.round(noise.float() * 0.01));
            row.offsets.fill_with(|| match format {
                Format::Integer { offset: Offset::ZeroPoint, .. } => noise.below(end) as f32,
                _ => kind.round(noise.float()),
            });
            let mask = if format == Format::Super(SuperBlock::Q4K) { 63 } else { -1 };
            row.sub_scales.fill_with(|| noise.next() as i8 & mask);
            row.sub_minima.fill_with(|| noise.next() as u8 & 63);
            Ok(())
        })
    }

    /// A copy in memory of its own.
    pub fn try_clone(&self) -> Result<PackedMatrix, OutOfMemory> {
        let mut bytes = AlignedBytes::zeroed(self.bytes.len())?;
        bytes.copy_from_slice(&self.bytes);
        Ok(PackedMatrix { layout: self.layout, precision: self.precision, bytes: Bytes::Own(bytes) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_matrices_repeat_and_copies_are_equal() {
        let format = Format::Super(SuperBlock::Q4K);
        let new = |seed| PackedMatrix::random(3, 256, format, Precision::A8, seed).unwrap();
        let matrix = new(1);
        assert_eq!(matrix.dequantize(), new(1).dequantize());
        assert_eq!(matrix.dequantize(), matrix.try_clone().unwrap().dequantize());
        assert_ne!(matrix.dequantize(), new(2).dequantize());
    }
}
