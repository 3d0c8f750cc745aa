//! Block decoders of GGUF's integer types, after ggml's `ggml-common.h`.
//!
//! All fields are little-endian; `d`, `m`, `dmin` are binary16. Element e of a block has an unsigned code and belongs to
//! group e / group:
//!
//! ```text
//! type  block  bytes  fields in order                        weight                   group  code given
//! Q4_0     32     18  d; qs[16]                              d (q - 8)                   32  q
//! Q4_1     32     20  d; m; qs[16]                           d q + m                     32  q
//! Q5_0     32     22  d; qh[4]; qs[16]                       d (q - 16)                  32  q - 16 + 128
//! Q5_1     32     24  d; m; qh[4]; qs[16]                    d q + m                     32  q
//! Q8_0     32     34  d; qs[32] signed                       d q                         32  q + 128
//! Q4_K    256    144  d; dmin; scales[12]; qs[128]           (d sc) q - (dmin mn)        32  q
//! Q5_K    256    176  d; dmin; scales[12]; qh[32]; qs[128]   (d sc) q - (dmin mn)        32  q
//! Q6_K    256    210  ql[128]; qh[64]; scales[16] signed; d  (d sc) (q - 32)             16  q - 32 + 128
//! IQ4_NL   32     18  d; qs[16]                              d table[q]                  32  table[q] + 128
//! MXFP4    32     17  e; qs[16]                              2^(e - 128) table[q]        32  table[q] + 128
//! TQ1_0   256     54  qs[48]; qh[4]; d                       d (q - 1)                  128  q - 1 + 8
//! TQ2_0   256     66  qs[64]; d                              d (q - 1)                  128  q - 1 + 8
//! ```
//!
//! "Code given" is that of the exact integer format, which any activations can meet. For quantised activations K-quants
//! keep their sub-scales, and tables and ternary types their own codes, in fewer bytes.
//!
//! In blocks of 32, byte j of `qs` holds elements j (low nibble) and j + 16 (high), and bit e of `qh` is the fifth bit of
//! element e. `d sc` has 11 + 7 significant bits and a code at most 8 more, so every product is exact in binary32 and a
//! weight has at most one rounding, whether or not the multiplication and addition are fused.

use farthing_kernels::format::{Bits, FloatType, Format, Offset, Packing, RowCodes, SuperBlock, Table};
use half::f16;

use super::kind::TensorKind;

/// Decodes one block: `(bytes, codes: (elements,), scales: (groups,), minima: (groups,))`; `minima` is empty for
/// symmetric types.
type Decode = fn(&[u8], &mut [u8], &mut [f32], &mut [f32]);

/// An integer type: its block and the packed formats that hold it exactly.
pub(super) struct Blocks {
    elements: usize,
    bytes: usize,
    group: usize,
    bits: Bits,
    offset: Offset,
    scale: FloatType,
    decode: Decode,
    compact: Compact,
}

/// How a type is packed for quantised activations.
#[derive(Clone, Copy, PartialEq)]
enum Compact {
    /// As the exact integer format.
    Integer,
    /// `decode` gives the codes of the table.
    Lookup(Table),
    /// `decode` gives 0, 1 and 2.
    Ternary,
    /// `decode` gives the codes of the exact format, which are these plus a constant.
    Super(SuperBlock),
}

/// The integer type of `kind`, or nothing for floats and unsupported types.
pub(super) fn blocks(kind: TensorKind) -> Option<Blocks> {
    use Compact::{Integer, Lookup, Super, Ternary};
    let (group, bits, offset, scale, decode, compact): (usize, Bits, Offset, FloatType, Decode, Compact) = match kind {
        TensorKind::Q4_0 => (32, Bits::Four, Offset::Symmetric, FloatType::F16, q4_0, Integer),
        TensorKind::Q4_1 => (32, Bits::Four, Offset::Minimum, FloatType::F16, q4_1, Integer),
        TensorKind::Q5_0 => (32, Bits::Eight, Offset::Symmetric, FloatType::F16, q5_0, Integer),
        TensorKind::Q5_1 => (32, Bits::Eight, Offset::Minimum, FloatType::F16, q5_1, Integer),
        TensorKind::Q8_0 => (32, Bits::Eight, Offset::Symmetric, FloatType::F16, q8_0, Integer),
        TensorKind::Q4K => (32, Bits::Four, Offset::Minimum, FloatType::F32, q4_k, Super(SuperBlock::Q4K)),
        TensorKind::Q5K => (32, Bits::Eight, Offset::Minimum, FloatType::F32, q5_k, Integer),
        TensorKind::Q6K => (16, Bits::Eight, Offset::Symmetric, FloatType::F32, q6_k, Super(SuperBlock::Q6K)),
        TensorKind::Iq4Nl => (32, Bits::Eight, Offset::Symmetric, FloatType::F16, q4_0, Lookup(Table::Iq4Nl)),
        TensorKind::Mxfp4 => (32, Bits::Eight, Offset::Symmetric, FloatType::F32, mxfp4, Lookup(Table::Mxfp4)),
        TensorKind::Tq1_0 => (128, Bits::Four, Offset::Symmetric, FloatType::F16, tq1_0, Ternary),
        TensorKind::Tq2_0 => (128, Bits::Four, Offset::Symmetric, FloatType::F16, tq2_0, Ternary),
        TensorKind::F32 | TensorKind::F16 | TensorKind::Bf16 | TensorKind::Other(_) => return None,
    };
    let (elements, bytes) = (kind.block_elements() as usize, kind.block_bytes() as usize);
    Some(Blocks { elements, bytes, group, bits, offset, scale, decode, compact })
}

impl Blocks {
    pub(super) fn format(&self) -> Format {
        match self.compact {
            Compact::Integer => self.exact_format(),
            // Powers of two fit bf16.
            Compact::Lookup(Table::Mxfp4) => {
                Format::Lookup { table: Table::Mxfp4, group: self.group, scale: FloatType::Bf16 }
            }
            Compact::Lookup(table) => Format::Lookup { table, group: self.group, scale: self.scale },
            Compact::Ternary => {
                Format::Ternary { packing: Packing::TwoBits, group: Some(self.elements), scale: self.scale }
            }
            Compact::Super(kind) => Format::Super(kind),
        }
    }

    pub(super) fn exact_format(&self) -> Format {
        Format::Integer { bits: self.bits, group: self.group, offset: self.offset, scale: self.scale }
    }

    /// The format of ternary rows with one scale.
    pub(super) fn ternary_rows(&self) -> Option<Format> {
        let format = Format::Ternary { packing: Packing::best(), group: None, scale: self.scale };
        (self.compact == Compact::Ternary).then_some(format)
    }

    /// Whether all blocks of a ternary row have the same scale.
    pub(super) fn has_one_scale(&self, row: &[u8]) -> bool {
        let scale = |block: &[u8]| [block[self.bytes - 2], block[self.bytes - 1]];
        row.chunks_exact(self.bytes).all(|block| scale(block) == scale(row))
    }

    /// Codes, scales and minima of a row of whole blocks in `format`, one of those above.
    pub(super) fn codes(&self, row: &[u8], format: Format, out: &mut RowCodes) {
        let columns = row.len() / self.bytes * self.elements;
        let groups = columns / self.group;
        out.codes.resize(columns, 0);
        out.scales.resize(groups, 0.0);
        let minima = if self.offset == Offset::Minimum { groups } else { 0 };
        if minima > 0 {
            out.offsets.resize(minima, 0.0);
        }
        let (block_groups, mut at) = (self.elements / self.group, 0);
        for (block, codes) in row.chunks_exact(self.bytes).zip(out.codes.chunks_exact_mut(self.elements)) {
            let span = at..at + block_groups;
            let minima = if minima > 0 { &mut out.offsets[span.clone()] } else { &mut [][..] };
            (self.decode)(block, codes, &mut out.scales[span], minima);
            at += block_groups;
        }
        match (format, self.compact) {
            (Format::Integer { .. }, Compact::Lookup(table)) => {
                let values = table.values();
                out.codes.iter_mut().for_each(|code| *code = values[usize::from(*code)].cast_unsigned() ^ 0x80);
            }
            (Format::Integer { .. }, Compact::Ternary) => out.codes.iter_mut().for_each(|code| *code += 7),
            (Format::Ternary { group: Some(group), .. }, _) => {
                let stride = group / self.group;
                out.scales = out.scales.iter().copied().step_by(stride).collect();
            }
            (Format::Ternary { group: None, .. }, _) => out.scales.truncate(1),
            (Format::Super(kind), _) => super_blocks(kind, row.chunks_exact(self.bytes), out),
            _ => {}
        }
    }

    /// Weights of a row of whole blocks.
    pub(super) fn dequantize(&self, row: &[u8], out: &mut [f32]) {
        let (mut codes, mut scales, mut minima) = ([0_u8; 256], [0.0_f32; 16], [0.0_f32; 16]);
        let codes = &mut codes[..self.elements];
        let groups = self.elements / self.group;
        let bias = match self.bits {
            Bits::Four => 8,
            Bits::Eight => 128,
        };
        for (block, out) in row.chunks_exact(self.bytes).zip(out.chunks_exact_mut(self.elements)) {
            (self.decode)(block, codes, &mut scales[..groups], &mut minima[..groups]);
            match self.compact {
                Compact::Lookup(table) => {
                    let values = table.values();
                    for code in codes.iter_mut() {
                        *code = values[usize::from(*code)].cast_unsigned() ^ 0x80;
                    }
                }
                Compact::Ternary => codes.iter_mut().for_each(|code| *code += 7),
                Compact::Integer | Compact::Super(_) => {}
            }
            let rows = out.chunks_exact_mut(self.group).zip(codes.chunks_exact(self.group));
            for ((out, codes), (&scale, &minimum)) in rows.zip(scales.iter().zip(&minima)) {
                if self.offset == Offset::Minimum {
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = scale * f32::from(code) + minimum;
                    }
                } else {
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = scale * f32::from(i16::from(code) - bias);
                    }
                }
            }
        }
    }
}

/// Widens a row of floats.
pub(super) fn widen(kind: FloatType, row: &[u8], out: &mut [f32]) {
    match kind {
        FloatType::F32 => {
            for (out, bytes) in out.iter_mut().zip(row.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        FloatType::F16 => {
            use half::slice::HalfFloatSliceExt;
            // The row may be unaligned; a small aligned copy lets the conversion use vector instructions.
            let mut aligned = [f16::ZERO; 64];
            for (out, bytes) in out.chunks_mut(64).zip(row.chunks(128)) {
                for (value, bytes) in aligned.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*bytes);
                }
                aligned[..out.len()].convert_to_f32_slice(out);
            }
        }
        FloatType::Bf16 => {
            for (out, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
    }
}

/// The binary16 at byte `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Splits bytes into their low and high nibbles.
fn nibbles(packed: &[u8], low: &mut [u8], high: &mut [u8]) {
    for ((&byte, low), high) in packed.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

fn q4_0(block: &[u8], codes: &mut [u8], scales: &mut [f32], _: &mut [f32]) {
    scales[0] = half_at(block, 0);
    let (low, high) = codes.split_at_mut(16);
    nibbles(&block[2..18], low, high);
}

fn q4_1(block: &[u8], codes: &mut [u8], scales: &mut [f32], minima: &mut [f32]) {
    scales[0] = half_at(block, 0);
    minima[0] = half_at(block, 2);
    let (low, high) = codes.split_at_mut(16);
    nibbles(&block[4..20], low, high);
}

/// Codes of five bits, `fifth: (4,)` bytes of high bits and `qs: (16,)` bytes of nibbles, plus `bias`.
fn five_bits(fifth: &[u8], qs: &[u8], codes: &mut [u8], bias: u8) {
    let (low, high) = codes.split_at_mut(16);
    nibbles(qs, low, high);
    for (e, code) in codes.iter_mut().enumerate() {
        *code += ((fifth[e / 8] >> (e % 8)) & 1) * 16 + bias;
    }
}

fn q5_0(block: &[u8], codes: &mut [u8], scales: &mut [f32], _: &mut [f32]) {
    scales[0] = half_at(block, 0);
    five_bits(&block[2..6], &block[6..22], codes, 128 - 16);
}

fn q5_1(block: &[u8], codes: &mut [u8], scales: &mut [f32], minima: &mut [f32]) {
    scales[0] = half_at(block, 0);
    minima[0] = half_at(block, 2);
    five_bits(&block[4..8], &block[8..24], codes, 0);
}

fn q8_0(block: &[u8], codes: &mut [u8], scales: &mut [f32], _: &mut [f32]) {
    scales[0] = half_at(block, 0);
    for (code, &byte) in codes.iter_mut().zip(&block[2..34]) {
        // Two's complement q plus 128.
        *code = byte ^ 0x80;
    }
}

/// `d`, `dmin`, sub-scales and sub-minima of K-quants in place of scales and minima. Codes lose what the exact format adds.
fn super_blocks<'a>(kind: SuperBlock, blocks: impl Iterator<Item = &'a [u8]>, out: &mut RowCodes) {
    let (mut scales, mut minima) = (Vec::new(), Vec::new());
    let RowCodes { codes, sub_scales, sub_minima, .. } = out;
    sub_scales.clear();
    sub_minima.clear();
    for block in blocks {
        match kind {
            SuperBlock::Q4K => {
                scales.push(half_at(block, 0));
                minima.push(half_at(block, 2));
                for s in 0..8 {
                    let (scale, minimum) = six_bits(&block[4..16], s);
                    sub_scales.push(scale.cast_signed());
                    sub_minima.push(minimum);
                }
            }
            SuperBlock::Q6K => {
                scales.push(half_at(block, 208));
                sub_scales.extend(block[192..208].iter().map(|byte| byte.cast_signed()));
            }
        }
    }
    if kind == SuperBlock::Q6K {
        for code in codes {
            *code -= 128 - 32;
        }
    }
    out.scales = scales;
    out.offsets = minima;
}

/// Scale and minimum `s` of the eight six-bit pairs in twelve bytes.
fn six_bits(b: &[u8], s: usize) -> (u8, u8) {
    if s < 4 {
        (b[s] & 63, b[4 + s] & 63)
    } else {
        ((b[4 + s] & 15) | ((b[s - 4] >> 6) << 4), (b[4 + s] >> 4) | ((b[s] >> 6) << 4))
    }
}

/// Scales and minima of the eight groups of a `Q4_K` or `Q5_K` block: twelve bytes of six-bit numbers behind d and dmin.
fn six_bit_scales(block: &[u8], scales: &mut [f32], minima: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for s in 0..8 {
        let (scale, minimum) = six_bits(&block[4..16], s);
        scales[s] = d * f32::from(scale);
        minima[s] = -(dmin * f32::from(minimum));
    }
}

fn q4_k(block: &[u8], codes: &mut [u8], scales: &mut [f32], minima: &mut [f32]) {
    six_bit_scales(block, scales, minima);
    for (qs, codes) in block[16..144].chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
        let (low, high) = codes.split_at_mut(32);
        nibbles(qs, low, high);
    }
}

fn q5_k(block: &[u8], codes: &mut [u8], scales: &mut [f32], minima: &mut [f32]) {
    six_bit_scales(block, scales, minima);
    for (qs, codes) in block[48..176].chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
        let (low, high) = codes.split_at_mut(32);
        nibbles(qs, low, high);
    }
    for (s, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, &fifth) in codes.iter_mut().zip(&block[16..48]) {
            *code |= ((fifth >> s) & 1) << 4;
        }
    }
}

fn q6_k(block: &[u8], codes: &mut [u8], scales: &mut [f32], _: &mut [f32]) {
    let d = half_at(block, 208);
    for (scale, &byte) in scales.iter_mut().zip(&block[192..208]) {
        *scale = d * f32::from(byte.cast_signed());
    }
    let halves = block[..128].chunks_exact(64).zip(block[128..192].chunks_exact(32));
    for ((ql, qh), codes) in halves.zip(codes.chunks_exact_mut(128)) {
        for (quarter, codes) in codes.chunks_exact_mut(32).enumerate() {
            let ql = &ql[quarter % 2 * 32..][..32];
            let (low_shift, high_shift) = (quarter / 2 * 4, quarter * 2);
            for ((code, &low), &high) in codes.iter_mut().zip(ql).zip(qh) {
                *code = ((low >> low_shift) & 15 | ((high >> high_shift) & 3) << 4) + (128 - 32);
            }
        }
    }
}

fn mxfp4(block: &[u8], codes: &mut [u8], scales: &mut [f32], _: &mut [f32]) {
    // The table is doubled, so the scale is 2^(e - 128); the lowest two are subnormal.
    let e = u32::from(block[0]);
    scales[0] = f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 });
    let (low, high) = codes.split_at_mut(16);
    nibbles(&block[1..17], low, high);
}

fn tq1_0(block: &[u8], codes: &mut [u8], scales: &mut [f32], _: &mut [f32]) {
    scales.fill(half_at(block, 52));
    // Element i of a byte is the i-th digit of the fraction b / 256 in base 3.
    let digit = |byte: u8, i: u32| ((u16::from(byte.wrapping_mul(3u8.pow(i))) * 3) >> 8) as u8;
    let (first, rest) = codes.split_at_mut(160);
    let (second, third) = rest.split_at_mut(80);
    let parts = [(&block[..32], first), (&block[32..48], second), (&block[48..52], third)];
    for (bytes, codes) in parts {
        for (i, codes) in codes.chunks_exact_mut(bytes.len()).enumerate() {
            codes.iter_mut().zip(bytes).for_each(|(code, &byte)| *code = digit(byte, i as u32));
        }
    }
}

fn tq2_0(block: &[u8], codes: &mut [u8], scales: &mut [f32], _: &mut [f32]) {
    scales.fill(half_at(block, 64));
    for (bytes, codes) in block[..64].chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (i, codes) in codes.chunks_exact_mut(32).enumerate() {
            codes.iter_mut().zip(bytes).for_each(|(code, &byte)| *code = byte >> (2 * i) & 3);
        }
    }
}
