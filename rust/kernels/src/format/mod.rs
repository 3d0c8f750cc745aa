//! The packed weight formats: what a matrix's codes, scales and offsets mean, and [`PackedMatrix`], which holds them.
//!
//! A weight is `w[n, k] = scale[n, g] * (code[n, k] - bias)` (symmetric), `scale * (code - zero[n, g])` (zero point) or
//! `scale * code + minimum[n, g]` (minimum), with `g = k / group`; codes are always unsigned.

pub(crate) mod layout;
mod names;
mod pack;
mod packed;
mod quantize;
#[cfg(test)]
mod tests;
mod unpack;

pub use pack::PackError;
pub use packed::PackedMatrix;

/// Element type of an unquantised matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::F16 | FloatType::Bf16 => 2,
        }
    }

    /// `value` rounded to the type, half to even.
    pub fn round(self, value: f32) -> f32 {
        match self {
            FloatType::F32 => value,
            FloatType::F16 => half::f16::from_f32(value).to_f32(),
            FloatType::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }
}

/// How the codes of a group are shifted to real weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Offset {
    /// `scale * (code - 2^(bits-1))`.
    Symmetric,
    /// `scale * (code - zero)`, `zero` an integer below `2^bits` for each group.
    ZeroPoint,
    /// `scale * code + minimum`, one float minimum for each group, in the type of the scales.
    Minimum,
}

/// Width of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bits {
    /// Codes 0..=15, two to a byte.
    Four,
    /// Codes 0..=255.
    Eight,
}

/// Precision of the activations that a matrix is multiplied with; fixed when the matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 8-bit integers, one scale for each group of inputs.
    A8,
    /// 15-bit integers, one scale for each group of inputs.
    A16,
    /// The f32 activations themselves.
    F32,
}

impl Bits {
    /// The greatest code: 15 or 255.
    pub fn maximum(self) -> u8 {
        match self {
            Bits::Four => 15,
            Bits::Eight => 255,
        }
    }

    /// The code of zero in a symmetric format: 8 or 128.
    pub fn bias(self) -> u8 {
        match self {
            Bits::Four => 8,
            Bits::Eight => 128,
        }
    }
}

/// Format of a [`PackedMatrix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// One float a weight.
    Float(FloatType),
    /// Integer codes in groups along the inputs.
    Integer {
        /// Code width.
        bits: Bits,
        /// Inputs that share a scale: 16, 32, 64 or 128.
        group: usize,
        /// Meaning of the codes.
        offset: Offset,
        /// Type of scales and minima, as the source stores them.
        scale: FloatType,
    },
}

/// One row of integer codes on its way into a panel; the source fills every field it uses.
#[derive(Clone, Debug, Default)]
pub struct RowCodes {
    /// `(k,)` unsigned codes, one a byte whatever the width.
    pub codes: Vec<u8>,
    /// `(groups,)` scales, exactly representable in the format's scale type.
    pub scales: Vec<f32>,
    /// `(groups,)` zero points (integers) or minima; unused when symmetric.
    pub offsets: Vec<f32>,
}
