//! Slices of floats in the types that arrays have, widened to the f32 the kernels compute with and rounded back.

use std::ops::Range;

use farthing_kernels::pool::Pool;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Floats of an array.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

/// Floats of an array that is being made.
pub(crate) enum FloatsMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
}

impl<'a> Floats<'a> {
    pub(crate) fn len(self) -> usize {
        match self {
            Floats::F32(x) => x.len(),
            Floats::F16(x) => x.len(),
            Floats::Bf16(x) => x.len(),
        }
    }

    pub(crate) fn slice(self, range: Range<usize>) -> Floats<'a> {
        match self {
            Floats::F32(x) => Floats::F32(&x[range]),
            Floats::F16(x) => Floats::F16(&x[range]),
            Floats::Bf16(x) => Floats::Bf16(&x[range]),
        }
    }

    /// Exactly, into `out` of the same length.
    pub(crate) fn widen(self, out: &mut [f32]) {
        match self {
            Floats::F32(x) => out.copy_from_slice(x),
            Floats::F16(x) => x.convert_to_f32_slice(out),
            Floats::Bf16(x) => {
                out.iter_mut().zip(x).for_each(|(out, x)| *out = f32::from_bits(u32::from(x.to_bits()) << 16));
            }
        }
    }

    /// The floats themselves, or their rows of `width` widened into `space`.
    pub(crate) fn as_f32<'s>(self, pool: &Pool, width: usize, space: &'s mut Vec<f32>) -> &'s [f32]
    where
        'a: 's,
    {
        if let Floats::F32(x) = self {
            return x;
        }
        let space = room(space, self.len());
        pool.rows(space, width, |first, rows| self.slice(first * width..first * width + rows.len()).widen(rows));
        space
    }
}

impl FloatsMut<'_> {
    /// Rounds rows of `width`, half to even, into the elements from `start` on.
    pub(crate) fn narrow(&mut self, pool: &Pool, width: usize, start: usize, x: &[f32]) {
        let range = start..start + x.len();
        match self {
            FloatsMut::F32(out) => out[range].copy_from_slice(x),
            FloatsMut::F16(out) => pool.rows(&mut out[range], width, |first, rows| {
                rows.convert_from_f32_slice(&x[first * width..first * width + rows.len()]);
            }),
            FloatsMut::Bf16(out) => pool.rows(&mut out[range], width, |first, rows| {
                let x = &x[first * width..first * width + rows.len()];
                rows.iter_mut().zip(x).for_each(|(out, &x)| *out = round_bf16(x));
            }),
        }
    }
}

/// The first `length` elements of a buffer that grows and is kept.
pub(crate) fn room(space: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if space.len() < length {
        space.resize(length, 0.0);
    }
    &mut space[..length]
}

/// Without a branch, so that loops over it become vector code.
fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}
