//! The packed weight formats: what a matrix's codes, scales and offsets mean, and [`PackedMatrix`], which holds them.
//!
//! A weight is `w[n, k] = scale[n, g] * (code[n, k] - bias)` (symmetric), `scale * (code - zero[n, g])` (zero point) or
//! `scale * code + minimum[n, g]` (minimum), with `g = k / group`; codes are always unsigned. A ternary weight is
//! `scale * (code - 1)`; a weight of a [`Table`] is `scale * table[code]`; super-blocks have scales of scales, see
//! [`SuperBlock`].

pub(crate) mod layout;
mod lookup;
mod names;
mod pack;
mod packed;
mod quantize;
pub(crate) mod random;
mod ternary;
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

/// How ternary codes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Two bits a weight.
    TwoBits,
    /// Five weights a byte, as digits of base 3: 1.6 bits a weight. One scale for each row only.
    BaseThree,
}

impl Packing {
    /// The packing of fewest bytes that the instruction set in force unpacks as fast as memory delivers it.
    pub fn best() -> Packing {
        if crate::isa::Isa::active() >= crate::isa::Isa::Avx512Vbmi { Packing::BaseThree } else { Packing::TwoBits }
    }
}

/// Sixteen values that 4-bit codes choose from, as integers in units of the scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// OCP microscaling FP4 (E2M1), doubled so that all values are integers: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
    Mxfp4,
    /// Quantiles of the normal distribution (QLoRA's NormalFloat4), in 127ths: within 0.4 % of the greatest value.
    Nf4,
    /// GGUF's non-linear 4-bit values.
    Iq4Nl,
}

impl Table {
    /// The value of each code.
    pub const fn values(self) -> [i8; 16] {
        match self {
            Table::Mxfp4 => [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12],
            Table::Nf4 => [-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127],
            Table::Iq4Nl => [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
        }
    }

    /// What is added to the values to make them unsigned.
    pub(crate) const fn bias(self) -> u8 {
        match self {
            Table::Mxfp4 => 12,
            Table::Nf4 | Table::Iq4Nl => 127,
        }
    }

    /// `values() + bias()`.
    pub(crate) const fn unsigned(self) -> [u8; 16] {
        let (values, mut out, mut i) = (self.values(), [0; 16], 0);
        while i < 16 {
            out[i] = (values[i] as i16 + self.bias() as i16) as u8;
            i += 1;
        }
        out
    }
}

/// GGUF's blocks of 256 inputs, whose groups have small integer scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SuperBlock {
    /// 4-bit codes, groups of 32: `d * sub_scale * code - dmin * sub_minimum`, both sub-values in 0..=63.
    Q4K,
    /// 6-bit codes, groups of 16: `d * sub_scale * (code - 32)`, sub-scales in -128..=127.
    Q6K,
}

impl SuperBlock {
    /// Inputs of a block.
    pub const INPUTS: usize = 256;

    /// Inputs that share a sub-scale.
    pub fn group(self) -> usize {
        match self {
            SuperBlock::Q4K => 32,
            SuperBlock::Q6K => 16,
        }
    }

    /// The greatest code.
    pub fn maximum(self) -> u8 {
        match self {
            SuperBlock::Q4K => 15,
            SuperBlock::Q6K => 63,
        }
    }
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
    /// -1, 0 and 1, with scales.
    Ternary {
        /// How codes are stored.
        packing: Packing,
        /// Inputs that share a scale: 32, 64, 128 or 256; `None` is the whole row.
        group: Option<usize>,
        /// Type of the scales.
        scale: FloatType,
    },
    /// 4-bit codes that choose from a table.
    Lookup {
        /// The values.
        table: Table,
        /// Inputs that share a scale: 16, 32, 64 or 128.
        group: usize,
        /// Type of the scales.
        scale: FloatType,
    },
    /// GGUF's K-quants, exactly as the integers they are; `k` is a multiple of 256.
    Super(SuperBlock),
}

impl Format {
    /// Inputs whose activations share a scale in products with a matrix of `k` inputs; `None` for floats.
    pub fn activation_group(self, k: usize) -> Option<usize> {
        match self {
            Format::Float(_) => None,
            Format::Integer { group, .. } | Format::Lookup { group, .. } => Some(group),
            Format::Ternary { group, .. } => Some(group.unwrap_or(k)),
            Format::Super(_) => Some(SuperBlock::INPUTS),
        }
    }
}

/// One row of integer codes on its way into a panel; the source fills every field it uses.
#[derive(Clone, Debug, Default)]
pub struct RowCodes {
    /// `(k,)` unsigned codes, one a byte whatever the width.
    pub codes: Vec<u8>,
    /// `(groups,)` scales, exactly representable in the format's scale type; of super-blocks their `d`, in binary16.
    pub scales: Vec<f32>,
    /// `(groups,)` zero points (integers) or minima, unused when symmetric; of super-blocks their `dmin`, in binary16.
    pub offsets: Vec<f32>,
    /// `(k / group,)` sub-scales of super-blocks.
    pub sub_scales: Vec<i8>,
    /// `(k / group,)` sub-minima of super-blocks.
    pub sub_minima: Vec<u8>,
}
