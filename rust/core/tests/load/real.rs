//! Real files, when the environment names a directory of them.

use farthing::load::Checkpoint;

use crate::support::exercise;

/// Opens every GGUF file in `FARTHING_MODELS` and reads a few rows of each tensor.
#[test]
fn real_files_load() {
    let Some(directory) = std::env::var_os("FARTHING_MODELS") else { return };
    let paths = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")) {
        let checkpoint = Checkpoint::open(&path).unwrap();
        exercise(&checkpoint);
        assert!(checkpoint.tensors().len() > 100, "{}", path.display());
        let stored: usize = checkpoint.tensors().map(|tensor| tensor.nbytes()).sum();
        assert!(stored as u64 <= checkpoint.file_bytes() && stored as u64 * 2 > checkpoint.file_bytes());
    }
}
