//! Formats and precisions in words, the same in reports, tables and errors.

use super::{Bits, FloatType, Format, Offset, Packing, Precision, SuperBlock, Table};
use std::fmt;

impl FloatType {
    /// `f32`, `f16` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "f32",
            FloatType::F16 => "f16",
            FloatType::Bf16 => "bf16",
        }
    }
}

impl Precision {
    /// `a8`, `a16` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::A8 => "a8",
            Precision::A16 => "a16",
            Precision::F32 => "f32",
        }
    }
}

/// Code width, group, meaning of the codes, type of the scales: `int4 g32 minimum f16`.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Format::Float(kind) => f.write_str(kind.name()),
            Format::Integer { bits, group, offset, scale } => {
                let bits = match bits {
                    Bits::Four => "int4",
                    Bits::Eight => "int8",
                };
                let offset = match offset {
                    Offset::Symmetric => "symmetric",
                    Offset::ZeroPoint => "zero point",
                    Offset::Minimum => "minimum",
                };
                write!(f, "{bits} g{group} {offset} {}", scale.name())
            }
            Format::Ternary { packing, group, scale } => {
                let bits = match packing {
                    Packing::TwoBits => "2-bit",
                    Packing::BaseThree => "1.6-bit",
                };
                match group {
                    Some(group) => write!(f, "ternary {bits} g{group} {}", scale.name()),
                    None => write!(f, "ternary {bits} per row {}", scale.name()),
                }
            }
            Format::Lookup { table, group, scale } => {
                let table = match table {
                    Table::Mxfp4 => "mxfp4",
                    Table::Nf4 => "nf4",
                    Table::Iq4Nl => "iq4_nl",
                };
                write!(f, "{table} g{group} {}", scale.name())
            }
            Format::Super(SuperBlock::Q4K) => f.write_str("q4_k"),
            Format::Super(SuperBlock::Q6K) => f.write_str("q6_k"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_read_well() {
        let format =
            Format::Integer { bits: Bits::Four, group: 128, offset: Offset::ZeroPoint, scale: FloatType::Bf16 };
        assert_eq!(format.to_string(), "int4 g128 zero point bf16");
        assert_eq!(Format::Float(FloatType::F16).to_string(), "f16");
    }
}
