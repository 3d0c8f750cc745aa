//! The packed weight formats: what a matrix's codes, scales and offsets mean, and [`PackedMatrix`], which holds them.
//!
//! A weight is `w[n, k] = scale[n, g] * (code[n, k] - bias)` (symmetric), `scale * (code - zero[n, g])` (zero point) or
//! `scale * code + minimum[n, g]` (minimum), with `g = k / group`; codes are always unsigned.

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
