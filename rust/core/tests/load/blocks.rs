//! Block decoders against the `gguf` package, whose results `fixtures/blocks.py` has written beside random blocks.

use farthing::load::{Checkpoint, FormatError, Metadata, Rows, TensorKind};
use farthing_kernels::format::{
    Bits, FloatType, Format, Offset, PackedMatrix, Packing, Precision, RowCodes, SuperBlock, Table,
};

fn fixture() -> Checkpoint {
    Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/blocks.gguf").as_ref()).unwrap()
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn rows_equal_the_reference_bit_for_bit() {
    let checkpoint = fixture();
    let mut kinds = Vec::new();
    for tensor in checkpoint.tensors().filter(|tensor| !tensor.name().ends_with(".expected")) {
        kinds.push(tensor.name());
        assert_eq!(tensor.name(), tensor.kind().name());
        let expected = checkpoint.require(&format!("{}.expected", tensor.name()), tensor.shape()).unwrap();
        let (mut got, mut want) = (vec![0.0; tensor.columns()], vec![0.0; tensor.columns()]);
        assert!(tensor.rows() > 1);
        for i in 0..tensor.rows() {
            tensor.row(i, &mut got).unwrap();
            expected.row(i, &mut want).unwrap();
            assert_eq!(bits(&got), bits(&want), "{} row {i}", tensor.name());
        }
    }
    kinds.sort_unstable();
    assert_eq!(
        kinds,
        [
            "BF16", "F16", "F32", "IQ4_NL", "MXFP4", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0",
            "TQ1_0", "TQ2_0"
        ]
    );
}

#[test]
fn codes_and_scales_give_the_same_bits_fused_or_not() {
    let checkpoint = fixture();
    let mut codes = RowCodes::default();
    for tensor in checkpoint.tensors() {
        let Format::Integer { bits: width, group, offset, .. } = tensor.exact_format().unwrap() else { continue };
        let mut row = vec![0.0; tensor.columns()];
        for i in 0..tensor.rows() {
            tensor.row(i, &mut row).unwrap();
            tensor.codes(i, tensor.exact_format().unwrap(), &mut codes).unwrap();
            assert_eq!((codes.codes.len(), codes.scales.len()), (row.len(), row.len() / group));
            let (limit, bias) = if width == Bits::Four { (15, 8.0) } else { (255, 128.0) };
            for (k, &want) in row.iter().enumerate() {
                assert!(codes.codes[k] <= limit);
                let (code, scale) = (f32::from(codes.codes[k]), codes.scales[k / group]);
                let fused = match offset {
                    Offset::Minimum => scale.mul_add(code, codes.offsets[k / group]),
                    _ => scale * (code - bias),
                };
                assert_eq!(fused.to_bits(), want.to_bits(), "{} [{i}, {k}]", tensor.name());
            }
        }
    }
}

#[test]
fn natural_formats_are_those_of_the_design() {
    let checkpoint = fixture();
    let integer = |bits, group, offset, scale| Format::Integer { bits, group, offset, scale };
    let expected = [
        ("F32", Format::Float(FloatType::F32)),
        ("F16", Format::Float(FloatType::F16)),
        ("BF16", Format::Float(FloatType::Bf16)),
        ("Q4_0", integer(Bits::Four, 32, Offset::Symmetric, FloatType::F16)),
        ("Q4_1", integer(Bits::Four, 32, Offset::Minimum, FloatType::F16)),
        ("Q5_0", integer(Bits::Eight, 32, Offset::Symmetric, FloatType::F16)),
        ("Q5_1", integer(Bits::Eight, 32, Offset::Minimum, FloatType::F16)),
        ("Q8_0", integer(Bits::Eight, 32, Offset::Symmetric, FloatType::F16)),
        ("Q4_K", Format::Super(SuperBlock::Q4K)),
        ("Q5_K", integer(Bits::Eight, 32, Offset::Minimum, FloatType::F32)),
        ("Q6_K", Format::Super(SuperBlock::Q6K)),
        ("IQ4_NL", Format::Lookup { table: Table::Iq4Nl, group: 32, scale: FloatType::F16 }),
        ("MXFP4", Format::Lookup { table: Table::Mxfp4, group: 32, scale: FloatType::Bf16 }),
        ("TQ1_0", Format::Ternary { packing: Packing::TwoBits, group: Some(256), scale: FloatType::F16 }),
        ("TQ2_0", Format::Ternary { packing: Packing::TwoBits, group: Some(256), scale: FloatType::F16 }),
    ];
    for (name, format) in expected {
        assert_eq!(checkpoint.tensor(name).unwrap().natural_format(), Ok(format), "{name}");
    }
}

#[test]
fn packed_rows_equal_the_reference_bit_for_bit() {
    let checkpoint = fixture();
    for tensor in checkpoint.tensors() {
        let (natural, exact) = (tensor.natural_format().unwrap(), tensor.exact_format().unwrap());
        for (format, precision) in [(natural, Precision::A8), (exact, Precision::F32)] {
            if matches!(format, Format::Float(_)) {
                continue;
            }
            let (n, k) = (tensor.rows(), tensor.columns());
            let packed =
                PackedMatrix::pack_codes(n, k, format, precision, |n, row| tensor.codes(n, format, row)).unwrap();
            let (mut got, mut want) = (vec![0.0; k], vec![0.0; k]);
            for i in 0..n {
                packed.row(i, &mut got);
                tensor.row(i, &mut want).unwrap();
                assert_eq!(bits(&got), bits(&want), "{} row {i} as {format}", tensor.name());
            }
        }
    }
}

#[test]
fn ternary_rows_of_one_scale_are_stored_once() {
    let block = |scale: u16| [&[0b10_01_00_10_u8; 64][..], &scale.to_le_bytes()].concat();
    let file = |scales: [u16; 4]| {
        let bytes: Vec<u8> = scales.into_iter().flat_map(block).collect();
        let kind = crate::support::TQ2_0;
        Checkpoint::from_bytes(crate::support::Gguf::new().tensor("t", &[512, 2], kind, &bytes).bytes()).unwrap()
    };
    assert_eq!(file([0x3c00, 0x3c00, 0x3c00, 0x3800]).tensor("t").unwrap().ternary_rows(), None);
    let checkpoint = file([0x3c00, 0x3c00, 0x3800, 0x3800]);
    let tensor = checkpoint.tensor("t").unwrap();
    let format = tensor.ternary_rows().unwrap();
    assert!(matches!(format, Format::Ternary { group: None, .. }), "{format}");
    let packed =
        PackedMatrix::pack_codes(2, 512, format, Precision::A8, |n, row| tensor.codes(n, format, row)).unwrap();
    let mut want = vec![0.0; 512];
    for i in 0..2 {
        tensor.row(i, &mut want).unwrap();
        assert_eq!(packed.dequantize()[i * 512..][..512], want);
    }
}

#[test]
fn released_pages_come_back() {
    let checkpoint = fixture();
    let tensor = checkpoint.tensor("Q8_0").unwrap();
    let (mut before, mut after) = (vec![0.0; tensor.columns()], vec![0.0; tensor.columns()]);
    tensor.row(1, &mut before).unwrap();
    tensor.release();
    tensor.row(1, &mut after).unwrap();
    assert_eq!(bits(&before), bits(&after));
}

#[test]
fn floats_have_no_codes() {
    let checkpoint = fixture();
    let error = checkpoint
        .tensor("BF16")
        .unwrap()
        .codes(0, Format::Float(FloatType::Bf16), &mut RowCodes::default())
        .unwrap_err();
    assert!(matches!(error, FormatError::UnsupportedType { got: "BF16", .. }), "{error}");
}

#[test]
fn scales_that_are_no_numbers_are_passed_on() {
    let block = [&0x7e00_u16.to_le_bytes()[..], &[1; 32]].concat();
    let bytes = crate::support::Gguf::new().tensor("t", &[32], crate::support::Q8_0, &block).bytes();
    let checkpoint = Checkpoint::from_bytes(bytes).unwrap();
    let mut codes = RowCodes::default();
    let tensor = checkpoint.tensor("t").unwrap();
    tensor.codes(0, tensor.exact_format().unwrap(), &mut codes).unwrap();
    assert!(codes.scales[0].is_nan());
}

#[test]
fn the_reference_writer_is_understood() {
    let checkpoint = fixture();
    let Metadata::Gguf(table) = &checkpoint.metadata else { panic!("a GGUF file") };
    assert_eq!(table.require::<&str>("general.architecture").unwrap(), "fixture");
    assert_eq!(table.require::<Vec<&str>>("tokens").unwrap(), ["a", "ö", ""]);
    assert_eq!(table.require::<Vec<f32>>("scores").unwrap(), [0.5, -1.0]);
    assert_eq!(table.require::<Vec<i32>>("kinds").unwrap(), [1, -2, 3]);
    assert_eq!(table.require::<u16>("u16").unwrap(), 65_535);
    assert_eq!(table.require::<i64>("i64").unwrap(), -1 << 40);
    assert_eq!(table.require::<f64>("f64").unwrap(), 0.1);
    assert!(table.require::<bool>("bool").unwrap());
    assert_eq!(checkpoint.tensor("F32").unwrap().kind(), TensorKind::F32);
}
