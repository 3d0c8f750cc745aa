//! The seeds of the fuzz targets in `fuzz/corpus`: written from the tables of this test, and loaded by it.

use std::path::PathBuf;

use farthing::load::Checkpoint;

use crate::support::{exercise, gguf_sample, safetensors_sample};
use crate::{malformed_gguf, malformed_safetensors};

/// Files larger than this teach a fuzzer nothing.
const LARGEST: usize = 4096;

fn directory(target: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus")).join(target)
}

#[test]
fn seeds_load_or_give_an_error() {
    for target in ["gguf_loads_or_errors", "safetensors_loads_or_errors"] {
        let (mut loaded, mut refused) = (0, 0);
        for entry in std::fs::read_dir(directory(target)).unwrap() {
            match Checkpoint::from_bytes(std::fs::read(entry.unwrap().path()).unwrap()) {
                Ok(checkpoint) => {
                    exercise(&checkpoint);
                    loaded += 1;
                }
                Err(_) => refused += 1,
            }
        }
        assert!(loaded >= 1 && refused >= 20, "{target}: {loaded} loaded, {refused} refused");
    }
}

#[test]
#[ignore = "writes fuzz/corpus anew"]
fn write_the_seeds() {
    let gguf = malformed_gguf::cases().into_iter().map(|(name, bytes, _)| (name, bytes));
    let safetensors = malformed_safetensors::all_cases();
    let sample = |bytes| vec![("a valid file", bytes)];
    for (target, seeds) in [
        ("gguf_loads_or_errors", gguf.chain(sample(gguf_sample())).collect::<Vec<_>>()),
        ("safetensors_loads_or_errors", [safetensors, sample(safetensors_sample())].concat()),
    ] {
        std::fs::create_dir_all(directory(target)).unwrap();
        for (name, bytes) in seeds.into_iter().filter(|(_, bytes)| bytes.len() <= LARGEST) {
            let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
            std::fs::write(directory(target).join(name), bytes).unwrap();
        }
    }
}
