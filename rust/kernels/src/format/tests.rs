//! What packs and what is refused, and the error of plain rounding on Gaussian weights.

use std::convert::Infallible;

use super::*;

const INT4: Format = Format::Integer { bits: Bits::Four, group: 32, offset: Offset::Symmetric, scale: FloatType::F16 };

fn with_offset(offset: Offset) -> Format {
    Format::Integer { bits: Bits::Four, group: 32, offset, scale: FloatType::F16 }
}

/// Packs 3 × 40 with one change to row 1.
fn pack(format: Format, change: impl Fn(&mut RowCodes) + Sync) -> Result<PackedMatrix, PackError<&'static str>> {
    PackedMatrix::pack_codes(3, 40, format, Precision::A16, |n, row| {
        row.scales.fill(0.5);
        if n == 1 {
            change(row);
        }
        Ok(())
    })
}

#[test]
fn each_fault_has_its_error() {
    type Change = fn(&mut RowCodes);
    let cases: [(Offset, Change, &str); 10] = [
        (Offset::Symmetric, |row| row.codes[39] = 16, "row 1, input 39: got code 16, expected at most 15"),
        (Offset::Symmetric, |row| row.scales[1] = f32::NAN, "row 1, group 1: got scale NaN, expected a finite F16"),
        (
            Offset::Symmetric,
            |row| row.scales[0] = f32::INFINITY,
            "row 1, group 0: got scale inf, expected a finite F16",
        ),
        (Offset::Symmetric, |row| row.scales[0] = 0.1, "row 1, group 0: got scale 0.1, expected a finite F16"),
        (Offset::Symmetric, |row| row.codes.truncate(39), "row 1: got 39 codes, expected 40"),
        (Offset::Symmetric, |row| row.offsets.push(1.0), "row 1: got 1 offsets, expected 0"),
        (
            Offset::ZeroPoint,
            |row| row.offsets[1] = 16.0,
            "row 1, group 1: got zero point 16, expected an integer in 0..=15",
        ),
        (
            Offset::ZeroPoint,
            |row| row.offsets[1] = 1.5,
            "row 1, group 1: got zero point 1.5, expected an integer in 0..=15",
        ),
        (Offset::Minimum, |row| row.offsets[1] = f32::NAN, "row 1, group 1: got minimum NaN, expected a finite F16"),
        (Offset::Minimum, |row| row.scales.push(1.0), "row 1: got 3 scales, expected 2"),
    ];
    for (offset, change, message) in cases {
        assert_eq!(pack(with_offset(offset), change).unwrap_err().to_string(), message);
    }
    assert!(pack(INT4, |_| ()).is_ok());
}

#[test]
fn impossible_matrices_are_errors() {
    let fill = |_: usize, _: &mut RowCodes| Ok::<(), Infallible>(());
    let pack = |n, k, format| PackedMatrix::pack_codes(n, k, format, Precision::A8, fill).unwrap_err();
    assert_eq!(pack(0, 32, INT4), PackError::Shape { n: 0, k: 32 });
    assert_eq!(pack(32, 0, INT4), PackError::Shape { n: 32, k: 0 });
    assert_eq!(pack(usize::MAX, 32, INT4), PackError::Shape { n: usize::MAX, k: 32 });
    assert_eq!(pack(1 << 40, 1 << 30, INT4), PackError::Shape { n: 1 << 40, k: 1 << 30 });
    assert!(matches!(pack(1 << 30, 1 << 26, INT4), PackError::OutOfMemory(_)));
    let float = Format::Float(FloatType::F32);
    assert_eq!(pack(1, 1, float), PackError::NotInteger { got: float });
    let group = Format::Integer { bits: Bits::Four, group: 48, offset: Offset::Symmetric, scale: FloatType::F16 };
    assert_eq!(pack(1, 1, group), PackError::Group { got: 48, expected: "16, 32, 64 or 128" });
}

#[test]
fn the_error_of_a_source_comes_through() {
    let packed =
        PackedMatrix::pack_codes(100, 8, INT4, Precision::A8, |n, _| if n == 70 { Err("row 70") } else { Ok(()) });
    assert_eq!(packed.unwrap_err(), PackError::Source("row 70"));
    let packed = PackedMatrix::quantize(4, 8, INT4, Precision::A8, |_, row| {
        row[5] = f32::NAN;
        Ok::<(), Infallible>(())
    });
    assert!(matches!(packed.unwrap_err(), PackError::Weight { column: 5, .. }));
}

#[test]
fn a_range_beyond_the_scale_type_is_an_error() {
    let packed = PackedMatrix::quantize(1, 8, INT4, Precision::A8, |_, row| {
        row[0] = 1e9;
        Ok::<(), Infallible>(())
    });
    assert!(matches!(packed.unwrap_err(), PackError::Scale { row: 0, group: 0, .. }));
}

#[test]
fn floats_round_trip_in_their_type() {
    for kind in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
        let value = |n: usize, k: usize| (n as f32 - 40.0) * 0.37 + k as f32 * 1.13;
        let packed = PackedMatrix::pack_float(70, 33, kind, |n, row| {
            row.iter_mut().enumerate().for_each(|(k, w)| *w = value(n, k));
            Ok::<(), Infallible>(())
        });
        for (i, w) in packed.unwrap().dequantize().into_iter().enumerate() {
            assert_eq!(w, kind.round(value(i / 33, i % 33)));
        }
    }
}

/// Relative RMS error of `format` on N(0, 1), in percent.
fn gaussian_error(format: Format) -> f64 {
    let (n, k) = (256, 4096);
    let fill = |n: usize, row: &mut [f32]| {
        let mut state = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f64 + 0.5) / (1u64 << 31) as f64
        };
        for w in row {
            *w = ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
        }
        Ok::<(), Infallible>(())
    };
    let packed = PackedMatrix::quantize(n, k, format, Precision::A16, fill).unwrap();
    let (mut error, mut norm) = (0.0, 0.0);
    let (mut exact, mut got) = (vec![0.0; k], vec![0.0; k]);
    for n in 0..n {
        let _ = fill(n, &mut exact);
        packed.row(n, &mut got);
        for (&got, &exact) in got.iter().zip(&exact) {
            error += f64::from(got - exact).powi(2);
            norm += f64::from(exact).powi(2);
        }
    }
    100.0 * (error / norm).sqrt()
}

/// Published for symmetric int4 with a search: 8.6, 9.5, 10.1 %; for plain rounding with a zero point 8.1, 9.1, 10.1 %.
/// The search here also uses the extra negative code and moves each end of a range with a minimum alone.
#[test]
fn rounding_errors_are_at_most_those_of_the_literature() {
    let symmetric = [(32, 8.10), (64, 8.99), (128, 9.67)].map(|case| (Offset::Symmetric, Bits::Four, case));
    let zero_point = [(32, 7.79), (64, 8.72), (128, 9.50)].map(|case| (Offset::ZeroPoint, Bits::Four, case));
    let minimum = [(32, 7.20), (64, 8.31), (128, 9.26)].map(|case| (Offset::Minimum, Bits::Four, case));
    let eight = [(Offset::Symmetric, Bits::Eight, (32, 0.535)), (Offset::Minimum, Bits::Eight, (32, 0.46))];
    for (offset, bits, (group, expected)) in [symmetric, zero_point, minimum].into_iter().flatten().chain(eight) {
        let percent = gaussian_error(Format::Integer { bits, group, offset, scale: FloatType::F16 });
        assert!(
            (percent / expected - 1.0).abs() < 0.01,
            "{offset:?} {bits:?} g{group}: {percent:.3} %, expected {expected} %"
        );
    }
}

/// Weights that already lie on a grid of the format are its own dequantised values, bit for bit.
#[test]
fn weights_on_a_grid_come_back() {
    for offset in [Offset::Symmetric, Offset::Minimum] {
        for k in [96, 77] {
            let value = |n: usize, i: usize| {
                // Every group has its extreme code in its first weights.
                let code = [0, 15, 3, 8, 12, 9, 1][(i % 32 % 7 + i / 7 * usize::from(i % 32 > 6)) % 7];
                let scale = FloatType::F16.round(0.013 * (n + 1) as f32);
                match offset {
                    Offset::Minimum => scale.mul_add(code as f32, FloatType::F16.round(-0.02 * n as f32)),
                    _ => scale * (code as f32 - 8.0) * if n.is_multiple_of(2) { 1.0 } else { -1.0 },
                }
            };
            let format = Format::Integer { bits: Bits::Four, group: 32, offset, scale: FloatType::F16 };
            let packed = PackedMatrix::quantize(9, k, format, Precision::A16, |n, row| {
                row.iter_mut().enumerate().for_each(|(i, w)| *w = value(n, i));
                Ok::<(), Infallible>(())
            });
            for (i, w) in packed.unwrap().dequantize().into_iter().enumerate() {
                assert_eq!(w, value(i / k, i % k), "{offset:?} row {} input {}", i / k, i % k);
            }
        }
    }
}

/// Packing what `codes` gives makes the same matrix.
#[test]
fn codes_come_back_as_they_were_packed() {
    for offset in [Offset::Symmetric, Offset::ZeroPoint, Offset::Minimum] {
        for (bits, group) in [(Bits::Four, 16), (Bits::Eight, 32), (Bits::Four, 128)] {
            let format = Format::Integer { bits, group, offset, scale: FloatType::F16 };
            let packed = PackedMatrix::quantize(83, 150, format, Precision::A16, |n, row| {
                row.iter_mut().enumerate().for_each(|(k, w)| *w = ((n * 151 + k * k) % 97) as f32 - 40.0);
                Ok::<(), Infallible>(())
            })
            .unwrap();
            let again = PackedMatrix::pack_codes(83, 150, format, Precision::A16, |n, row| {
                packed.codes(n, row);
                Ok::<(), Infallible>(())
            });
            assert_eq!(&again.unwrap().bytes[..], &packed.bytes[..], "{format}");
        }
    }
}

/// `(n, k)` reproducible normal weights.
fn normal(n: usize, row: &mut [f32]) {
    let mut state = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as f64 + 0.5) / (1u64 << 31) as f64
    };
    for w in row {
        *w = ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    }
}

#[test]
fn ternary_and_tables_round_as_well_as_the_literature() {
    let ternary = |packing| Format::Ternary { packing, group: None, scale: FloatType::F32 };
    let lookup = |table, group, scale| Format::Lookup { table, group, scale };
    // Percent of N(0, 1), relative RMS.
    let cases = [
        (ternary(Packing::TwoBits), 46.1),
        (ternary(Packing::BaseThree), 46.1),
        (lookup(Table::Mxfp4, 32, FloatType::Bf16), 11.5),
        (lookup(Table::Iq4Nl, 32, FloatType::F16), 7.5),
    ];
    for (format, expected) in cases {
        let (n, k) = (128, 4096);
        let fill = |n: usize, row: &mut [f32]| {
            normal(n, row);
            Ok::<(), Infallible>(())
        };
        let packed = PackedMatrix::quantize(n, k, format, Precision::A8, fill).unwrap();
        let (mut error, mut norm, mut exact, mut got) = (0.0, 0.0, vec![0.0; k], vec![0.0; k]);
        for n in 0..n {
            normal(n, &mut exact);
            packed.row(n, &mut got);
            for (&got, &exact) in got.iter().zip(&exact) {
                error += f64::from(got - exact).powi(2);
                norm += f64::from(exact).powi(2);
            }
        }
        let percent: f64 = 100.0 * (error / norm).sqrt();
        assert!(percent < expected * 1.02, "{format}: {percent:.2} %, expected {expected} %");
    }
}

#[test]
fn ternary_weights_come_back_exactly() {
    for packing in [Packing::TwoBits, Packing::BaseThree] {
        for group in [None, Some(64)] {
            if packing == Packing::BaseThree && group.is_some() {
                continue;
            }
            let format = Format::Ternary { packing, group, scale: FloatType::F16 };
            let weight = |n: usize, k: usize| ((n * 7 + k * 5) % 3) as f32 * 0.125 - 0.125;
            let packed = PackedMatrix::quantize(67, 200, format, Precision::A8, |n, row| {
                row.iter_mut().enumerate().for_each(|(k, w)| *w = weight(n, k));
                Ok::<(), Infallible>(())
            });
            for (i, w) in packed.unwrap().dequantize().into_iter().enumerate() {
                assert_eq!(w, weight(i / 200, i % 200), "{format}");
            }
        }
    }
}

#[test]
fn formats_without_a_kernel_are_errors() {
    let fill = |_: usize, _: &mut RowCodes| Ok::<(), Infallible>(());
    let error = |k, format, precision| PackedMatrix::pack_codes(1, k, format, precision, fill).unwrap_err().to_string();
    let ternary = |packing, group| Format::Ternary { packing, group, scale: FloatType::F16 };
    let q4_k = Format::Super(SuperBlock::Q4K);
    assert_eq!(error(300, q4_k, Precision::A8), "inputs: got 300, expected a multiple of 256");
    assert_eq!(error(256, q4_k, Precision::F32), "activations: got f32, expected a8 or a16 for q4_k");
    assert_eq!(
        error(70_000, ternary(Packing::TwoBits, None), Precision::A8),
        "inputs: got 70000, expected at most 65536 for one scale a row"
    );
    assert_eq!(
        error(64, ternary(Packing::BaseThree, Some(64)), Precision::A8),
        "group size: got 64, expected the whole row for base 3"
    );
    let sub = |change: fn(&mut RowCodes)| {
        let packed = PackedMatrix::pack_codes(1, 256, q4_k, Precision::A8, |_, row| {
            change(row);
            Ok::<(), Infallible>(())
        });
        packed.unwrap_err().to_string()
    };
    assert_eq!(sub(|row| row.sub_scales[3] = -1), "row 0, sub-block 3: got sub-scale -1, expected 0 to 63");
    assert_eq!(sub(|row| row.sub_minima[7] = 64), "row 0, sub-block 7: got sub-minimum 64, expected 0 to 63");
    assert_eq!(sub(|row| row.codes[255] = 16), "row 0, input 255: got code 16, expected at most 15");
}
