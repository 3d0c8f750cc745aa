//! Odd but valid files that load.

use farthing::load::{Checkpoint, Metadata, Rows, Table, TensorKind, Value};

use crate::support::{
    ARRAY_VALUE, BOOL_VALUE, F16, F32, Gguf, I8, Q4_0, Q4K, Q8_0, STRING_VALUE, array, exercise, gguf_sample, header,
    nested, ramp, safetensors, safetensors_sample, string, strings,
};

/// Loads and reads everything.
fn load(bytes: Vec<u8>) -> Checkpoint {
    let checkpoint = Checkpoint::from_bytes(bytes).unwrap();
    exercise(&checkpoint);
    checkpoint
}

fn table(checkpoint: &Checkpoint) -> &Table {
    let Metadata::Gguf(table) = &checkpoint.metadata else { panic!("a GGUF file") };
    table
}

/// The first value of a tensor of f32.
fn first(checkpoint: &Checkpoint, name: &str) -> f32 {
    let tensor = checkpoint.tensor(name).unwrap();
    let mut row = vec![0.0; tensor.columns()];
    tensor.row(0, &mut row).unwrap();
    row[0]
}

#[test]
fn nothing_but_a_header() {
    let checkpoint = load(Gguf::new().bytes());
    assert_eq!((checkpoint.tensors().len(), table(&checkpoint).len(), checkpoint.file_bytes()), (0, 0, 24));
    assert_eq!(load(safetensors("{}", &[])).tensors().len(), 0);
}

#[test]
fn version_two() {
    let gguf = Gguf { version: 2_u32.to_le_bytes(), ..Gguf::new() }.u32("a", 7).tensor("t", &[8], F32, &ramp(32));
    let checkpoint = load(gguf.bytes());
    assert_eq!(table(&checkpoint).require::<u32>("a").unwrap(), 7);
    assert_eq!(first(&checkpoint, "t"), f32::from_le_bytes([0, 1, 2, 3]));
}

#[test]
fn alignments_of_1_8_and_64() {
    for alignment in [1, 8, 64, 4096] {
        let gguf = Gguf::new().aligned(alignment).tensor("a", &[3], I8, &ramp(3)).tensor("t", &[1], F32, &ramp(4));
        assert_eq!(first(&load(gguf.bytes()), "t"), f32::from_le_bytes([0, 1, 2, 3]), "{alignment}");
    }
}

#[test]
fn zero_dimensions() {
    let gguf = Gguf::new().tensor("rows", &[32, 0], Q4_0, &[]).tensor("columns", &[0, 5], F32, &[]).tensor(
        "t",
        &[1],
        F32,
        &1.5_f32.to_le_bytes(),
    );
    let checkpoint = load(gguf.bytes());
    let shape = |name| checkpoint.tensor(name).unwrap().shape();
    assert_eq!((shape("rows"), shape("columns")), (&[0, 32][..], &[5, 0][..]));
    assert_eq!(checkpoint.tensor("columns").unwrap().rows(), 0);
    assert_eq!(first(&checkpoint, "t"), 1.5);
    // An empty tensor needs no data section at all, wherever its offset points.
    assert_eq!(load(Gguf::new().header("t", &[0], F32, 1 << 40).bytes()).tensors().len(), 1);
    let empty = r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"F16","shape":[3,0],"data_offsets":[0,0]}}"#;
    assert_eq!(load(safetensors(empty, &[])).tensors().len(), 2);
}

#[test]
fn scalars_and_four_dimensions() {
    let gguf =
        Gguf::new().tensor("scalar", &[], F32, &2.5_f32.to_le_bytes()).tensor("t", &[2, 1, 3, 2], F32, &ramp(48));
    let checkpoint = load(gguf.bytes());
    assert_eq!(first(&checkpoint, "scalar"), 2.5);
    let tensor = checkpoint.tensor("t").unwrap();
    assert_eq!((tensor.shape(), tensor.rows(), tensor.columns()), (&[2, 3, 1, 2][..], 6, 2));
    let mut row = [0.0; 2];
    tensor.row(5, &mut row).unwrap();
    assert_eq!(row[1], f32::from_le_bytes([44, 45, 46, 47]));
    let scalar = safetensors(r#"{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#, &2.5_f32.to_le_bytes());
    assert_eq!(first(&load(scalar), "s"), 2.5);
}

#[test]
fn tensors_out_of_order_with_holes() {
    let mut gguf =
        Gguf::new().header("last", &[1], F32, 192).header("first", &[1], F32, 0).header("mid", &[1], F32, 64);
    gguf.data = ramp(196);
    let checkpoint = load(gguf.bytes());
    let names: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.name()).collect();
    assert_eq!(names, ["first", "mid", "last"]);
    assert_eq!(first(&checkpoint, "last"), f32::from_le_bytes([192, 193, 194, 195]));
    assert_eq!(first(&checkpoint, "mid"), f32::from_le_bytes([64, 65, 66, 67]));
}

#[test]
fn bytes_behind_the_last_tensor() {
    let bytes = [Gguf::new().tensor("t", &[1], F32, &ramp(4)).bytes(), ramp(100)].concat();
    assert_eq!(load(bytes).tensors().len(), 1);
}

#[test]
fn types_mixed() {
    let gguf = Gguf::new()
        .tensor("a", &[256, 2], Q4K, &ramp(288))
        .tensor("b", &[32, 3], Q8_0, &ramp(102))
        .tensor("c", &[7], F16, &ramp(14))
        .tensor("d", &[256], 35, &ramp(66));
    let kinds: Vec<String> = load(gguf.bytes()).tensors().map(|tensor| tensor.kind().to_string()).collect();
    assert_eq!(kinds, ["Q4_K", "Q8_0", "F16", "TQ2_0"]);
}

#[test]
fn unknown_keys_and_empty_arrays() {
    let gguf = Gguf::new()
        .u32("someone.else's key / with spaces", 1)
        .key("none", ARRAY_VALUE, &strings(&[]))
        .key("no numbers", ARRAY_VALUE, &array(6, 0, &[]))
        .key("no arrays", ARRAY_VALUE, &array(ARRAY_VALUE, 0, &[]))
        .key("empty string", STRING_VALUE, &string(""))
        .key("deep", ARRAY_VALUE, &nested(4));
    let checkpoint = load(gguf.bytes());
    let table = table(&checkpoint);
    assert_eq!(table.require::<Vec<&str>>("none").unwrap(), [""; 0]);
    assert_eq!(table.require::<Vec<f32>>("no numbers").unwrap(), [0.0; 0]);
    assert_eq!(table.require::<&str>("empty string").unwrap(), "");
}

#[test]
fn values_of_every_type() {
    let numbers = Gguf::new()
        .key("u8", 0, &[200])
        .key("i8", 1, &[200])
        .key("u16", 2, &[1, 2])
        .key("i16", 3, &[255, 255])
        .u32("u32", 70_000)
        .key("i32", 5, &(-5_i32).to_le_bytes())
        .key("f32", 6, &0.5_f32.to_le_bytes())
        .key("bool", BOOL_VALUE, &[1])
        .key("string", STRING_VALUE, &string("s"))
        .key("u64", 10, &u64::MAX.to_le_bytes())
        .key("i64", 11, &i64::MIN.to_le_bytes())
        .key("f64", 12, &0.25_f64.to_le_bytes());
    let elements: [(u32, &[u8]); 13] = [
        (0, &[1, 2]),
        (1, &[1, 2]),
        (2, &[1, 0, 2, 0]),
        (3, &[1, 0, 2, 0]),
        (4, &[1, 0, 0, 0, 2, 0, 0, 0]),
        (5, &[1, 0, 0, 0, 2, 0, 0, 0]),
        (6, &[0, 0, 0, 63, 0, 0, 128, 63]),
        (7, &[0, 1]),
        (8, &[1, 0, 0, 0, 0, 0, 0, 0, b'x', 0, 0, 0, 0, 0, 0, 0, 0]),
        (9, &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (10, &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
        (11, &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
        (12, &[0; 16]),
    ];
    let gguf = elements
        .iter()
        .fold(numbers, |gguf, (kind, bytes)| gguf.key(format!("array {kind}"), ARRAY_VALUE, &array(*kind, 2, bytes)));
    let checkpoint = load(gguf.bytes());
    let table = table(&checkpoint);
    let integers = ["u8", "i8", "u16", "i16", "u32", "i32", "i64"].map(|key| table.require::<i64>(key).unwrap());
    assert_eq!(integers, [200, -56, 513, -1, 70_000, -5, i64::MIN]);
    assert_eq!(table.require::<u64>("u64").unwrap(), u64::MAX);
    assert!(table.require::<u32>("u64").is_err() && table.require::<u64>("i32").is_err());
    assert_eq!(table.require::<f32>("f32").unwrap(), 0.5);
    assert_eq!(table.require::<f64>("f32").unwrap(), 0.5);
    assert_eq!(table.require::<f64>("f64").unwrap(), 0.25);
    assert!(table.require::<bool>("bool").unwrap());
    assert_eq!(table.require::<&str>("string").unwrap(), "s");
    for kind in [0, 1, 2, 3, 4, 5, 10, 11] {
        assert_eq!(table.require::<Vec<u32>>(&format!("array {kind}")).unwrap(), [1, 2], "{kind}");
    }
    assert_eq!(table.require::<Vec<f32>>("array 6").unwrap(), [0.5, 1.0]);
    assert_eq!(table.require::<Vec<bool>>("array 7").unwrap(), [false, true]);
    assert_eq!(table.require::<Vec<&str>>("array 8").unwrap(), ["x", ""]);
    let Some(Value::Array(outer)) = table.get("array 9") else { panic!("an array") };
    let lengths: Vec<usize> =
        outer.values().map(|inner| if let Value::Array(inner) = inner { inner.len() } else { panic!() }).collect();
    assert_eq!(lengths, [1, 0]);
}

#[test]
fn names_and_strings_of_other_scripts() {
    let gguf = Gguf::new()
        .key("größe", STRING_VALUE, &string("値段 🪙"))
        .key("tokens", ARRAY_VALUE, &array(STRING_VALUE, 1, &string([0xf0, 0x9f])))
        .tensor("слой.0", &[1], F32, &ramp(4));
    let checkpoint = load(gguf.bytes());
    assert!(checkpoint.tensor("слой.0").is_some());
    let table = table(&checkpoint);
    assert_eq!(table.require::<&str>("größe").unwrap(), "値段 🪙");
    // Half a character: a token of a byte-level vocabulary. The bytes are there, the text is not.
    assert_eq!(table.require::<Vec<&[u8]>>("tokens").unwrap(), [[0xf0, 0x9f]]);
    assert!(table.require::<Vec<&str>>("tokens").is_err());
    assert_eq!(first(&load(safetensors(header(&[("重み", 2)]), &ramp(8))), "重み"), f32::from_le_bytes([0, 1, 2, 3]));
}

#[test]
fn names_as_long_as_allowed() {
    let name = "n".repeat(63);
    assert!(load(Gguf::new().tensor(&name, &[1], F32, &ramp(4)).bytes()).tensor(&name).is_some());
    let key = "k".repeat(65_535);
    assert_eq!(table(&load(Gguf::new().u32(&key, 1).bytes())).require::<u32>(&key).unwrap(), 1);
}

#[test]
fn safetensors_of_every_look() {
    let spaces = safetensors("{ \"a\" : {\n\"shape\":[2] ,\"dtype\":\"F32\",\"data_offsets\":[0,8]} }     ", &ramp(8));
    assert_eq!(load(spaces).tensor("a").unwrap().shape(), [2]);
    let escaped = safetensors(r#"{"\u0061\"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &ramp(4));
    assert!(load(escaped).tensor("a\"").is_some());
    assert_eq!(load(safetensors(r#"{"__metadata__":{}}"#, &[])).tensors().len(), 0);
    let five = r#"{"a":{"dtype":"F32","shape":[1,1,2,1,2],"data_offsets":[0,16]}}"#;
    assert_eq!(load(safetensors(five, &ramp(16))).tensor("a").unwrap().rows(), 2);
    let small = r#"{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},"b":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[2,5]}}"#;
    let checkpoint = load(safetensors(small, &ramp(5)));
    assert!(checkpoint.tensor("b").unwrap().natural_format().unwrap_err().is_unsupported());
}

#[test]
fn samples_load() {
    assert_eq!(load(gguf_sample()).tensors().len(), 5);
    let checkpoint = load(safetensors_sample());
    assert_eq!(checkpoint.tensors().map(|tensor| tensor.nbytes()).sum::<usize>(), 36);
    assert_eq!(checkpoint.tensor("b").unwrap().kind(), TensorKind::Bf16);
    let mut row = [0.0; 3];
    checkpoint.tensor("b").unwrap().row(1, &mut row).unwrap();
    assert_eq!(row[0].to_bits(), 0x1716_0000);
}
