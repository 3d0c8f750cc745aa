//! Kernels with the vector instructions of x86-64.

// Loops over registers read best by index, and the intrinsics are a vocabulary of their own.
#![allow(clippy::needless_range_loop, clippy::wildcard_imports)]

pub(super) mod avx2;
pub(super) mod avx512;
pub(super) mod quantize;

/// Methods of `Lanes` that are one expression of intrinsics.
macro_rules! intrinsics {
    ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty { $body:expr })*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $type),*) -> $out {
            // SAFETY: the token proves the features.
            unsafe { $body }
        }
    )*};
}

/// The same for methods that touch memory.
macro_rules! memory {
    ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty { $body:expr })*) => {$(
        #[inline(always)]
        unsafe fn $name(self, $($arg: $type),*) -> $out {
            // SAFETY: the token proves the features; the caller has the memory.
            unsafe { $body }
        }
    )*};
}

/// Compiles the blocks with the features of a level, for each number of vectors and tokens.
macro_rules! shells {
    (
        $(#[$doc:meta])*
        $name:ident, $lanes:ty, $features:literal, $most:literal, $vectors:expr, $held:expr, unpack from $unpack:expr,
        $(($v:literal, $m:literal))*, base three $(($bv:literal, $bm:literal))*
    ) => {
        $(#[$doc])*
        pub(in crate::matmul) struct $name;

        impl $name {
            #[target_feature(enable = $features)]
            unsafe fn grouped<S: Source, const V: usize, const M: usize>(o: &Operands<'_>, place: &Place) {
                // SAFETY: this function's own features; the rest is the caller's promise.
                unsafe { block::grouped::<$lanes, S, V, M>(<$lanes>::new(), o, place) }
            }

            #[target_feature(enable = $features)]
            unsafe fn super_blocks<S: Source, const V: usize, const M: usize>(o: &Operands<'_>, place: &Place) {
                // SAFETY: as above.
                unsafe { block::super_blocks::<$lanes, S, V, M>(<$lanes>::new(), o, place) }
            }

            #[target_feature(enable = $features)]
            unsafe fn base_three<const V: usize, const M: usize>(o: &Operands<'_>, place: &Place) {
                // SAFETY: as above.
                unsafe { block::base_three::<$lanes, V, M>(<$lanes>::new(), o, place) }
            }

            #[target_feature(enable = $features)]
            unsafe fn to_bytes<S: Source>(o: &Operands<'_>, groups: Range<usize>, out: *mut u8, ahead: usize) {
                // SAFETY: as above.
                unsafe { block::unpack::<$lanes, S>(<$lanes>::new(), o.stored, o.trailers, groups, out, ahead) }
            }

            #[target_feature(enable = $features)]
            unsafe fn base_three_to_two(records: &Records, panel: *const u8, out: *mut u8, ahead: usize) {
                // SAFETY: as above.
                unsafe { block::unpack_base_three(<$lanes>::new(), records, panel, out, ahead) }
            }

            unsafe fn any_grouped<S: Source>(o: &Operands<'_>, place: &Place, vectors: usize, tokens: usize) {
                // SAFETY: the caller's promise.
                unsafe {
                    match (vectors, tokens) {
                        $(($v, $m) => Self::grouped::<S, $v, $m>(o, place),)*
                        _ => unreachable!("a block of {vectors} vectors and {tokens} tokens"),
                    }
                }
            }

            unsafe fn any_super<S: Source>(o: &Operands<'_>, place: &Place, vectors: usize, tokens: usize) {
                // SAFETY: the caller's promise.
                unsafe {
                    match (vectors, tokens) {
                        $(($v, $m) => Self::super_blocks::<S, $v, $m>(o, place),)*
                        _ => unreachable!("a block of {vectors} vectors and {tokens} tokens"),
                    }
                }
            }
        }

        impl Level for $name {
            const ROWS: usize = <$lanes as Lanes>::ROWS;
            const MOST_TOKENS: usize = $most;
            const VECTORS: &[usize] = &$vectors;
            const HELD: &[usize] = &$held;
            const UNPACK_FROM: usize = $unpack;

            unsafe fn block(o: &Operands<'_>, place: &Place, vectors: usize, tokens: usize) {
                // SAFETY: the caller's promise.
                unsafe {
                    match (o.records.codes, o.stored.trailer) {
                        (Codes::Eight, Trailer::Super(SuperBlock::Q4K)) => Self::any_super::<Bytes<15>>(o, place, vectors, tokens),
                        (Codes::Eight, Trailer::Super(SuperBlock::Q6K)) => Self::any_super::<Bytes<63>>(o, place, vectors, tokens),
                        (Codes::Four, Trailer::Super(_)) => Self::any_super::<Four>(o, place, vectors, tokens),
                        (_, Trailer::Super(_)) => Self::any_super::<Six>(o, place, vectors, tokens),
                        (Codes::Four, Trailer::Scales { table: Some(_), .. }) => {
                            Self::any_grouped::<Lookup>(o, place, vectors, tokens);
                        }
                        (Codes::Four, _) => Self::any_grouped::<Four>(o, place, vectors, tokens),
                        (Codes::Eight, Trailer::Scales { table: None, .. }) if o.stored.codes != Codes::Eight => {
                            Self::any_grouped::<Bytes<15>>(o, place, vectors, tokens);
                        }
                        (Codes::Eight, _) => Self::any_grouped::<Bytes<255>>(o, place, vectors, tokens),
                        (Codes::Two, _) => Self::any_grouped::<Two>(o, place, vectors, tokens),
                        (Codes::BaseThree, _) => match (vectors, tokens) {
                            $(($bv, $bm) => Self::base_three::<$bv, $bm>(o, place),)*
                            _ => unreachable!("a block of {vectors} vectors and {tokens} tokens"),
                        },
                        (Codes::Six, _) => unreachable!("six bits come in super-blocks"),
                    }
                }
            }

            unsafe fn unpack(o: &Operands<'_>, groups: Range<usize>, out: *mut u8, ahead: usize) {
                // SAFETY: the caller's promise.
                unsafe {
                    match (o.stored.codes, o.stored.trailer) {
                        (Codes::Four, Trailer::Scales { table: Some(_), .. }) => Self::to_bytes::<Lookup>(o, groups, out, ahead),
                        (Codes::Four, _) => Self::to_bytes::<Four>(o, groups, out, ahead),
                        (Codes::Two, _) => Self::to_bytes::<Two>(o, groups, out, ahead),
                        (Codes::Six, _) => Self::to_bytes::<Six>(o, groups, out, ahead),
                        (Codes::Eight | Codes::BaseThree, _) => unreachable!("bytes, or codes that become two bits"),
                    }
                }
            }

            unsafe fn unpack_base_three(records: &Records, panel: *const u8, out: *mut u8, ahead: usize) {
                // SAFETY: the caller's promise.
                unsafe { Self::base_three_to_two(records, panel, out, ahead) }
            }
        }
    };
}
pub(crate) use {intrinsics, memory, shells};
