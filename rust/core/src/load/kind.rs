//! Element types of stored tensors and the sizes of their blocks.

/// Types that can be read, for error messages.
pub(super) const SUPPORTED: &str =
    "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4, TQ1_0, TQ2_0";

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    Bf16,
    /// 4 bits, blocks of 32 with an f16 scale.
    Q4_0,
    /// 4 bits, blocks of 32 with an f16 scale and minimum.
    Q4_1,
    /// 5 bits, blocks of 32 with an f16 scale.
    Q5_0,
    /// 5 bits, blocks of 32 with an f16 scale and minimum.
    Q5_1,
    /// 8 bits, blocks of 32 with an f16 scale.
    Q8_0,
    /// 4 bits, blocks of 256 with 8 six-bit scales and minima.
    Q4K,
    /// 5 bits, blocks of 256 with 8 six-bit scales and minima.
    Q5K,
    /// 6 bits, blocks of 256 with 16 eight-bit scales.
    Q6K,
    /// 4 bits that choose from a table, blocks of 32 with an f16 scale.
    Iq4Nl,
    /// 4-bit floats (E2M1), blocks of 32 with a power of two as scale.
    Mxfp4,
    /// -1, 0 and 1, five to a byte, blocks of 256 with an f16 scale.
    Tq1_0,
    /// -1, 0 and 1, four to a byte, blocks of 256 with an f16 scale.
    Tq2_0,
    /// A type that is known by name and size but cannot be read.
    Other(&'static OtherKind),
}

/// A known type that cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub struct OtherKind {
    name: &'static str,
    elements: u64,
    bytes: u64,
}

macro_rules! other {
    ($name:literal, $elements:literal, $bytes:literal) => {
        TensorKind::Other(&OtherKind { name: $name, elements: $elements, bytes: $bytes })
    };
}

impl TensorKind {
    /// The type's name as its format spells it.
    pub fn name(self) -> &'static str {
        match self {
            TensorKind::F32 => "F32",
            TensorKind::F16 => "F16",
            TensorKind::Bf16 => "BF16",
            TensorKind::Q4_0 => "Q4_0",
            TensorKind::Q4_1 => "Q4_1",
            TensorKind::Q5_0 => "Q5_0",
            TensorKind::Q5_1 => "Q5_1",
            TensorKind::Q8_0 => "Q8_0",
            TensorKind::Q4K => "Q4_K",
            TensorKind::Q5K => "Q5_K",
            TensorKind::Q6K => "Q6_K",
            TensorKind::Iq4Nl => "IQ4_NL",
            TensorKind::Mxfp4 => "MXFP4",
            TensorKind::Tq1_0 => "TQ1_0",
            TensorKind::Tq2_0 => "TQ2_0",
            TensorKind::Other(other) => other.name,
        }
    }

    /// Elements of one block.
    pub fn block_elements(self) -> u64 {
        match self {
            TensorKind::F32 | TensorKind::F16 | TensorKind::Bf16 => 1,
            TensorKind::Q4_0
            | TensorKind::Q4_1
            | TensorKind::Q5_0
            | TensorKind::Q5_1
            | TensorKind::Q8_0
            | TensorKind::Iq4Nl
            | TensorKind::Mxfp4 => 32,
            TensorKind::Q4K | TensorKind::Q5K | TensorKind::Q6K | TensorKind::Tq1_0 | TensorKind::Tq2_0 => 256,
            TensorKind::Other(other) => other.elements,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> u64 {
        match self {
            TensorKind::F32 => 4,
            TensorKind::F16 | TensorKind::Bf16 => 2,
            TensorKind::Q4_0 | TensorKind::Iq4Nl => 18,
            TensorKind::Q4_1 => 20,
            TensorKind::Q5_0 => 22,
            TensorKind::Q5_1 => 24,
            TensorKind::Q8_0 => 34,
            TensorKind::Q4K => 144,
            TensorKind::Q5K => 176,
            TensorKind::Q6K => 210,
            TensorKind::Mxfp4 => 17,
            TensorKind::Tq1_0 => 54,
            TensorKind::Tq2_0 => 66,
            TensorKind::Other(other) => other.bytes,
        }
    }

    /// The type with this id in a GGUF file; ids of removed and of unknown types give nothing.
    pub(super) fn from_gguf(id: u32) -> Option<TensorKind> {
        Some(match id {
            0 => TensorKind::F32,
            1 => TensorKind::F16,
            2 => TensorKind::Q4_0,
            3 => TensorKind::Q4_1,
            6 => TensorKind::Q5_0,
            7 => TensorKind::Q5_1,
            8 => TensorKind::Q8_0,
            9 => other!("Q8_1", 32, 36),
            10 => other!("Q2_K", 256, 84),
            11 => other!("Q3_K", 256, 110),
            12 => TensorKind::Q4K,
            13 => TensorKind::Q5K,
            14 => TensorKind::Q6K,
            15 => other!("Q8_K", 256, 292),
            16 => other!("IQ2_XXS", 256, 66),
            17 => other!("IQ2_XS", 256, 74),
            18 => other!("IQ3_XXS", 256, 98),
            19 => other!("IQ1_S", 256, 50),
            20 => TensorKind::Iq4Nl,
            21 => other!("IQ3_S", 256, 110),
            22 => other!("IQ2_S", 256, 82),
            23 => other!("IQ4_XS", 256, 136),
            24 => other!("I8", 1, 1),
            25 => other!("I16", 1, 2),
            26 => other!("I32", 1, 4),
            27 => other!("I64", 1, 8),
            28 => other!("F64", 1, 8),
            29 => other!("IQ1_M", 256, 56),
            30 => TensorKind::Bf16,
            34 => TensorKind::Tq1_0,
            35 => TensorKind::Tq2_0,
            39 => TensorKind::Mxfp4,
            40 => other!("NVFP4", 64, 36),
            41 => other!("Q1_0", 128, 18),
            42 => other!("Q2_0", 64, 18),
            _ => return None,
        })
    }

    /// The type with this name in a safetensors header.
    pub(super) fn from_safetensors(dtype: &str) -> Option<TensorKind> {
        Some(match dtype {
            "F32" => TensorKind::F32,
            "F16" => TensorKind::F16,
            "BF16" => TensorKind::Bf16,
            "BOOL" => other!("BOOL", 1, 1),
            "F4" => other!("F4", 2, 1),
            "F6_E2M3" => other!("F6_E2M3", 4, 3),
            "F6_E3M2" => other!("F6_E3M2", 4, 3),
            "U8" => other!("U8", 1, 1),
            "I8" => other!("I8", 1, 1),
            "F8_E5M2" => other!("F8_E5M2", 1, 1),
            "F8_E4M3" => other!("F8_E4M3", 1, 1),
            "F8_E8M0" => other!("F8_E8M0", 1, 1),
            "F8_E4M3FNUZ" => other!("F8_E4M3FNUZ", 1, 1),
            "F8_E5M2FNUZ" => other!("F8_E5M2FNUZ", 1, 1),
            "I16" => other!("I16", 1, 2),
            "U16" => other!("U16", 1, 2),
            "I32" => other!("I32", 1, 4),
            "U32" => other!("U32", 1, 4),
            "C64" => other!("C64", 1, 8),
            "F64" => other!("F64", 1, 8),
            "I64" => other!("I64", 1, 8),
            "U64" => other!("U64", 1, 8),
            _ => return None,
        })
    }
}

impl std::fmt::Display for TensorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
