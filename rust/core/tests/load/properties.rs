//! Random and mutated bytes load or give an error; nothing panics.

use farthing::load::Checkpoint;
use proptest::prelude::*;

use crate::support::{exercise, gguf_sample, safetensors_sample};

fn load(bytes: Vec<u8>) {
    match Checkpoint::from_bytes(bytes) {
        Ok(checkpoint) => exercise(&checkpoint),
        Err(error) => assert!(error.to_string().contains("got"), "{error}"),
    }
}

/// Overwrites, inserts or removes a few bytes at a place.
fn mutate(mut bytes: Vec<u8>, changes: &[(usize, u8, Vec<u8>)]) -> Vec<u8> {
    for (place, how, new) in changes {
        let start = place % (bytes.len() + 1);
        let end = (start + new.len()).min(bytes.len());
        match how % 4 {
            0 => drop(bytes.splice(start..end, new.iter().copied())),
            1 => drop(bytes.splice(start..start, new.iter().copied())),
            2 => drop(bytes.drain(start..end)),
            _ => bytes[start..end].fill(0xff),
        }
    }
    bytes
}

fn changes() -> impl Strategy<Value = Vec<(usize, u8, Vec<u8>)>> {
    prop::collection::vec((any::<usize>(), any::<u8>(), prop::collection::vec(any::<u8>(), 1..9)), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        load(bytes);
    }

    #[test]
    fn random_bytes_behind_a_gguf_start(bytes in prop::collection::vec(any::<u8>(), 0..256), counts: [u8; 2]) {
        let [tensors, keys] = counts.map(|count| u64::from(count % 3).to_le_bytes());
        load([&b"GGUF\x03\0\0\0"[..], &tensors, &keys, &bytes].concat());
    }

    #[test]
    fn random_headers(header in "\\{[\"a{}\\[\\]:,0-9 ]{0,80}\\}?", data in prop::collection::vec(any::<u8>(), 0..8)) {
        load(crate::support::safetensors(header, &data));
    }

    #[test]
    fn mutated_gguf(changes in changes()) {
        load(mutate(gguf_sample(), &changes));
    }

    #[test]
    fn mutated_safetensors(changes in changes()) {
        load(mutate(safetensors_sample(), &changes));
    }
}
