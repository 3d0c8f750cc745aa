//! The formats that the benches of products go through, by the names that select them.

use farthing_kernels::format::{Bits, FloatType, Format, Offset, Packing, SuperBlock, Table};

const fn integer(bits: Bits, group: usize, offset: Offset) -> Format {
    Format::Integer { bits, group, offset, scale: FloatType::F16 }
}

const fn ternary(packing: Packing) -> Format {
    Format::Ternary { packing, group: None, scale: FloatType::F16 }
}

pub(crate) const FORMATS: [(&str, Format); 10] = [
    ("int4 g128", integer(Bits::Four, 128, Offset::Symmetric)),
    ("int4 g32", integer(Bits::Four, 32, Offset::Symmetric)),
    ("int4 g32 minimum", integer(Bits::Four, 32, Offset::Minimum)),
    ("int8 g128", integer(Bits::Eight, 128, Offset::Symmetric)),
    ("int8 g32", integer(Bits::Eight, 32, Offset::Symmetric)),
    ("q4_k", Format::Super(SuperBlock::Q4K)),
    ("q6_k", Format::Super(SuperBlock::Q6K)),
    ("ternary 2", ternary(Packing::TwoBits)),
    ("ternary 1.6", ternary(Packing::BaseThree)),
    ("mxfp4", Format::Lookup { table: Table::Mxfp4, group: 32, scale: FloatType::Bf16 }),
];

/// Activations that look like any others.
pub(crate) fn activations(m: usize, k: usize) -> Vec<f32> {
    (0..m * k).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
}
