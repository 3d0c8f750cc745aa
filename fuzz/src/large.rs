//! Hostile files too large for a fuzzer to grow, each dense in what costs most memory for its bytes.

use crate::model;
use crate::support::{ARRAY_VALUE, Gguf, STRING_VALUE, array, safetensors, string};

const BYTES: usize = 24 << 20;

/// GGUF files of 24 MiB.
pub fn gguf() {
    let mut keys = Gguf::new();
    let mut tensors = Gguf::new();
    for i in 0..65_536 {
        keys = keys.key(format!("{i}"), 0, &[0]);
        tensors = tensors.header(format!("{i}"), &[0, 0, 0, 0], 0, 0);
    }
    let value = |kind, value: &[u8]| Gguf::new().key("k", kind, value).bytes();
    let repeated = |element: u32, one: &[u8]| {
        let count = BYTES / one.len();
        value(ARRAY_VALUE, &array(element, count as u64, &one.repeat(count)))
    };
    for file in [
        keys.bytes(),
        tensors.bytes(),
        value(STRING_VALUE, &string(vec![b'a'; BYTES])),
        repeated(0, &[0]),
        repeated(STRING_VALUE, &string("")),
        repeated(STRING_VALUE, &string("a")),
        repeated(ARRAY_VALUE, &array(0, 0, &[])),
        repeated(ARRAY_VALUE, &array(ARRAY_VALUE, 1, &array(STRING_VALUE, 0, &[]))),
    ] {
        model(&file);
    }
}

/// Safetensors files of up to 24 MiB.
pub fn safetensors_files() {
    let joined = |count: usize, entry: &dyn Fn(usize) -> String| (0..count).map(entry).collect::<Vec<_>>().join(",");
    let tensor = |i: usize| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
    let long = |text: &str| text.repeat((8 << 20) / text.len());
    let wrong = |value: &str| format!(r#"{{"t":{value}}}"#);
    for header in [
        format!("{{{}}}", joined(131_072, &tensor)),
        format!("{{{}}}", joined(BYTES / 60, &tensor)),
        format!(r#"{{"__metadata__":{{{}}}}}"#, joined(65_536, &|i| format!(r#""{i}":"""#))),
        format!(r#"{{"__metadata__":{{{}}}}}"#, joined(BYTES / 12, &|i| format!(r#""{i}":"""#))),
        format!(r#"{{"__metadata__":{{"k":"{}"}}}}"#, long(r"\u0001")),
        format!(r#"{{"{}":0}}"#, long(r"\u0001")),
        wrong(&format!(r#""{}""#, long(r"\u0001"))),
        wrong(&format!(r#"{{"dtype":"{}"}}"#, long(r"\n"))),
        wrong(&format!(r#"{{"shape":["{}"]}}"#, long(r"\n"))),
        wrong(&format!(r#"{{"{}":0}}"#, long("a"))),
        wrong(&format!(r#"{{"shape":[{}1]}}"#, "1,".repeat(BYTES / 2))),
        wrong(&format!(r#"{{"shape":[1,1,1,1,1,1,1,1,{}"#, "[".repeat(BYTES))),
        wrong(&format!(r#"{{"shape":{{{}"#, joined(BYTES / 12, &|i| format!(r#""{i}":0"#)))),
        " ".repeat(BYTES),
        format!("{{{}}}", " ".repeat(BYTES)),
    ] {
        model(&safetensors(header, &[]));
    }
}
