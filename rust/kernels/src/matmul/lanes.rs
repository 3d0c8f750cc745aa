//! Lanes of i32 that each gather the dot product of four bytes: what the blocks of `block` are written over.
//!
//! A token of a level proves that the CPU has it. Methods are `unsafe` where they touch memory.

use crate::format::FloatType;

/// One level's vectors. Every method is `#[inline(always)]`, so that it compiles with the features of its caller.
pub(super) trait Lanes: Copy {
    /// Rows of a vector: lanes of i32.
    const ROWS: usize;
    /// Vector registers.
    const REGISTERS: usize;
    /// The greatest sum that `pairs` holds, if it is not as good as `dot`.
    const PAIRS: Option<usize> = None;
    /// Four bytes a lane, or one i32.
    type I: Copy;
    /// One f32 a lane.
    type F: Copy;

    fn zero(self) -> Self::I;
    fn splat(self, x: i32) -> Self::I;
    /// The same byte everywhere.
    fn bytes(self, x: u8) -> Self::I;
    /// `ROWS * 4` bytes.
    unsafe fn load(self, at: *const u8) -> Self::I;
    unsafe fn store(self, x: Self::I, at: *mut u8);
    /// Four bytes, the same in every lane.
    unsafe fn quad(self, at: *const u8) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// 16-bit lanes, `by` 0, 2, 4 or 6.
    fn shift_right(self, x: Self::I, by: usize) -> Self::I;
    /// 16-bit lanes, `by` 0, 2, 4 or 6.
    fn shift_left(self, x: Self::I, by: usize) -> Self::I;
    /// Entry `code` of a table of 16 bytes, for bytes below 16.
    fn lookup(self, table: Self::I, codes: Self::I) -> Self::I;
    /// 16 bytes, repeated.
    fn table(self, table: &[u8; 16]) -> Self::I;
    /// The digits 0 to 3 of base-3 bytes as 2-bit codes of one byte, and digit 4.
    fn base_three(self, x: Self::I) -> (Self::I, Self::I);
    /// `acc` plus the dot products of unsigned `codes`, at most 127 where `PAIRS` has a limit, with signed `x`.
    fn dot(self, acc: Self::I, codes: Self::I, x: Self::I) -> Self::I;
    /// `partial` plus the products of unsigned `codes` with signed `x`, two to a sum; none may pass `PAIRS`.
    fn pairs(self, partial: Self::I, codes: Self::I, x: Self::I) -> Self::I {
        self.dot(partial, codes, x)
    }
    /// `acc` plus `weight` times the dot products behind the sums of `pairs`.
    fn add_pairs(self, acc: Self::I, partial: Self::I, weight: i16) -> Self::I {
        self.add(acc, self.mul(partial, self.splat(i32::from(weight))))
    }
    fn add(self, a: Self::I, b: Self::I) -> Self::I;
    fn mul(self, a: Self::I, b: Self::I) -> Self::I;
    /// `x · 128`.
    fn times_128(self, x: Self::I) -> Self::I;
    /// `ROWS` unsigned bytes, widened.
    unsafe fn widen_unsigned(self, at: *const u8) -> Self::I;
    /// `ROWS` signed bytes, widened.
    unsafe fn widen_signed(self, at: *const u8) -> Self::I;
    fn float(self, x: Self::I) -> Self::F;
    fn splat_float(self, x: f32) -> Self::F;
    fn mul_float(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a·b + c`, fused.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a·b`, fused.
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn load_float(self, at: *const f32) -> Self::F;
    unsafe fn store_float(self, x: Self::F, at: *mut f32);
    /// `ROWS` floats of type `kind`.
    unsafe fn load_scales(self, at: *const u8, kind: FloatType) -> Self::F;
    /// Asks for a cache line; any address will do.
    fn prefetch(self, at: *const u8);
}
